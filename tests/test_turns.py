"""Codes in turn: the native loop against the one in torch, for every kind of chooser, and both against choices one by one."""

import pytest
import torch
from grids import make_grid, rules
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.codes import CodeChooser, Grid, Slicing, slice_codes
from matquant.kernels.cpu import available
from matquant.kernels.turns import Turns, in_turn, in_turn_native, in_turn_reference

relaxed = settings(deadline=None, max_examples=80)


def problem(grid: Grid, slicing: Slicing, targets: tuple[int, ...], fixed: int, seed: int, columns: int = 9, rows: int = 70) -> Turns:
    """Numbers are small multiples of powers of 2, so that every sum is exact and ties are ties for both loops."""
    g = torch.Generator().manual_seed(seed)
    chooser = CodeChooser.of(targets, grid, slicing, fixed)
    streams, groups = len(chooser.streams), 3

    def draw(*shape: int, low: int, high: int, unit: float) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g) * unit

    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    table = torch.stack([slice_codes(codes, r, grid, slicing) for r in chooser.streams]).float()
    per = torch.tensor([2.0 ** (grid.bits - r) for r in chooser.streams])
    return Turns(
        chooser,
        start=draw(streams, columns, rows, low=-20, high=20 + 4 * 2**grid.bits, unit=0.25),
        coupling=draw(streams, columns, columns, low=-2, high=3, unit=0.125),
        count=draw(streams, columns, low=1, high=4, unit=0.5),
        factor=draw(streams, columns, low=-2, high=3, unit=0.5),
        scale=per[:, None, None] * 2.0 ** draw(streams, groups, rows, low=-1, high=2, unit=1),
        offset=draw(streams, groups, rows, low=-4, high=5, unit=0.5),
        weight=draw(streams, groups, rows, low=0, high=4, unit=0.5),
        table=table,
        groups=torch.randint(0, groups, (columns,), generator=g).tolist(),
        now=torch.randint(0, 2**grid.bits, (columns, rows), generator=g).to(torch.uint8),
        origin=draw(streams, columns, rows, low=-20, high=300, unit=0.25) if seed % 2 else None,
        shared=[r in targets for r in chooser.streams] if seed % 3 == 0 else None,
    )


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[Grid, Slicing, tuple[int, ...], int, int, int, int]:
    grid, slicing = draw(rules(2))
    targets = tuple(draw(st.lists(st.integers(2, grid.bits), min_size=1, unique=True)))
    fixed = draw(st.integers(0, 4 if grid.overlap else grid.bits))
    return grid, slicing, targets, fixed, draw(st.integers(0, 2**20)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 63, 64, 131]))


@given(settings_of())
@relaxed
def test_native_equals_the_reference(given_settings: tuple[Grid, Slicing, tuple[int, ...], int, int, int, int]) -> None:
    """Over the first column to the bit; over the others until rounding has told them apart."""
    turns = problem(*given_settings)
    (codes, passed), (expected, expected_passed) = in_turn_native(turns), in_turn_reference(turns)
    same = (codes == expected).cummin(0).values  # a tie decided otherwise changes what follows in that row
    assert same[0].all() and same.float().mean() > 0.95
    torch.testing.assert_close(passed[:, same], expected_passed[:, same], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fixed", [0, 4])
def test_threads_and_memory_layout_change_nothing(fixed: int) -> None:
    turns = problem(make_grid(8), "floor", (8, 6, 3), fixed, 7, 40, 300)
    one = in_turn_native(turns, threads=1)
    wide = torch.zeros(len(turns.start), 50, 300)
    wide[:, 5:45] = turns.start
    for other in (
        in_turn_native(turns, threads=2),
        in_turn_native(turns, threads=7),
        in_turn_native(Turns(**{**vars(turns), "start": wide[:, 5:45]})),
    ):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_each_code_is_the_best_of_all_given_those_before_it() -> None:
    """Row by row, column by column, over all 256 codes, in float64."""
    turns = problem(make_grid(8), "floor", (8, 4, 2), 0, 5, 12, 20)
    codes, passed = in_turn(turns)
    assert turns.origin is not None
    for row in range(20):
        for j, g in enumerate(turns.groups):
            scale, offset = turns.scale[:, g, row].double(), turns.offset[:, g, row].double()
            x = turns.start[:, j, row].double() - (turns.coupling[:, j, :j].double() * passed[:, :j, row].double()).sum(1)
            weight = (turns.weight[:, g, row] * turns.count[:, j]).double()
            cost = (weight[:, None] * (((x - offset) / scale)[:, None] - turns.table.double()) ** 2).sum(0)
            q = int(codes[j, row])
            assert cost[q] <= cost.min() * (1 + 1e-5) + 1e-6
            moved = (offset + scale * turns.table[:, q].double() - turns.origin[:, j, row]) * turns.factor[:, j]
            torch.testing.assert_close(passed[:, j, row].double(), moved, rtol=1e-5, atol=1e-4)


def test_what_is_no_number_still_gets_a_code() -> None:
    turns = problem(make_grid(8), "floor", (8, 4, 2), 2, 5)
    turns.start[:] = float("nan")
    codes, _ = in_turn_native(turns)
    assert torch.equal(codes >> 6, turns.now >> 6)


def test_the_library_is_there() -> None:
    assert available(), "the compiled loop was not tested"
