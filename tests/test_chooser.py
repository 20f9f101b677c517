"""The code chooser against a search over every code: any affine read per width, one weight per width and element."""

from typing import Any

import torch
from grids import all_codes, make_grid, rules
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matquant.codes import SLICINGS, CodeChooser, Grid, Slicing, nearest_code, read_rule, slice_codes

relaxed = settings(deadline=None, max_examples=60)
Streams = dict[int, Tensor]


def brute_force(x: Streams, lam: Streams, read: dict[int, tuple[Tensor, Tensor]], grid: Grid, slicing: Slicing) -> Tensor:
    """sum_r lam_r (x_r - scale_r p_r(q) - offset_r)^2 of every code q (rows) and element (columns), in float64."""
    cost = torch.zeros(2**grid.bits, len(next(iter(x.values()))), dtype=torch.float64)
    for r, (scale, offset) in read.items():
        p = slice_codes(all_codes(grid), r, grid, slicing).double()[:, None]
        cost += lam[r].double() * (x[r].double() - scale.double() * p - offset.double()) ** 2
    return cost


@st.composite
def choices_to_make(
    draw: st.DrawFn, counts_parent: bool | None = None
) -> tuple[Grid, Slicing, tuple[int, ...], Streams, Streams, dict[int, tuple[Tensor, Tensor]]]:
    """A grid, targets, and for 9 elements: what each width wants (x), how much it counts (lam) and how it reads (any affine map)."""
    grid, slicing = draw(rules(3 if counts_parent is False else 2))
    top = grid.bits - 1 if counts_parent is False else grid.bits
    targets = tuple(draw(st.lists(st.integers(2, top), min_size=1, unique=True)))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    random = lambda: torch.rand(9, generator=chance)  # noqa: E731
    middle, spread = random() * (grid.max_code + 20) - 10, draw(st.sampled_from([0.5, 4.0, 40.0]))
    x, lam, read = {}, {}, {}
    for r in sorted({*targets, grid.bits}):
        step, shift = read_rule(r, grid, slicing)
        s = 0.01 * (0.5 + random())
        read[r] = s * step * (0.7 + 0.6 * random()), s * (shift - 100 + 10 * random())
        x[r] = s * (middle - 100 + spread * (random() - 0.5))
        lam[r] = (10 ** (6 * random() - 3)).float() if r in targets else torch.zeros(9)
    return grid, slicing, targets, x, lam, read


def choose(grid: Grid, slicing: Slicing, targets: tuple[int, ...], x: Streams, lam: Streams, read: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    chooser = CodeChooser.of(targets, grid, slicing)
    assert chooser.streams == (*sorted({*targets} - {grid.bits}, reverse=True), grid.bits)
    t = torch.stack([(x[r] - read[r][1]) / read[r][0] for r in chooser.streams])
    weight = torch.stack([lam[r] * read[r][0] ** 2 for r in chooser.streams])
    return chooser.choose(t, weight, chooser.tables(t.device))


@given(choices_to_make())
@settings(deadline=None, max_examples=200)
def test_chooser_equals_brute_force(problem: Any) -> None:
    """Every element has weights of its own, and every width reads by an affine map of its own."""
    grid, slicing, _, x, lam, read = problem
    costs = brute_force(x, lam, read, grid, slicing)
    chosen = costs.gather(0, choose(*problem).long()[None])[0]
    noise = sum(lam[r] * scale**2 * (1 + (x[r] - offset).abs() / scale) for r, (scale, offset) in read.items())  # of t, in float32
    best = costs.min(0).values
    assert (chosen <= best * (1 + 1e-4) + 1e-6 * noise).all()


@given(choices_to_make(counts_parent=False))
@relaxed
def test_chooser_breaks_ties_by_the_parent_stream(problem: Any) -> None:
    """Codes that the targets cannot tell apart: the one whose full-width read is nearest to what the parent wants."""
    grid, slicing, targets, x, _, read = problem
    chosen = choose(*problem).long()
    alike = torch.ones(2**grid.bits, len(chosen), dtype=torch.bool)
    for r in targets:
        p = slice_codes(all_codes(grid), r, grid, slicing)
        alike &= p[:, None] == p[chosen]
    miss = brute_force(x, {grid.bits: torch.ones(9)}, {grid.bits: read[grid.bits]}, grid, slicing).sqrt()
    best = miss.masked_fill(~alike, torch.inf).min(0).values
    assert (miss.gather(0, chosen[None])[0] <= best + 1e-4 * read[grid.bits][0]).all()


def test_an_element_that_counts_for_one_width_only_is_rounded_for_it() -> None:
    """Weights differ from element to element: the first belongs to 2 bits alone, the second to 4."""
    chooser = CodeChooser.of((4, 2), make_grid(8), "floor")
    t = torch.tensor([[9.0, 9.0], [3.0, 3.0], [0.0, 0.0]])
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    chosen = chooser.choose(t, weight, chooser.tables(t.device))
    assert (chosen >> 6)[0] == 3 and (chosen >> 4)[1] == 9


@given(st.integers(2, 8), st.sampled_from(SLICINGS), st.lists(st.floats(-40, 300, width=32), min_size=1, max_size=20))
@relaxed
def test_the_parent_as_the_only_target_is_rounding_to_nearest(bits: int, slicing: Slicing, values: list[float]) -> None:
    grid = make_grid(bits)
    chooser = CodeChooser.of((bits,), grid, slicing)
    t = torch.tensor([values])
    assert chooser.choose(t, torch.ones_like(t), chooser.tables(t.device)).equal(nearest_code(t[0], grid))


def test_chooser_enumerates_prefixes_only() -> None:
    assert CodeChooser.of({8: 100.0, 4: 4.0, 3: 2.0, 2: 1.0}, make_grid(8), "floor").prefix_bits == 4
    assert CodeChooser.of({8: 100.0, 4: 4.0, 3: 2.0, 2: 1.0}, make_grid(8), "round").prefix_bits == 5
    assert CodeChooser.of({8: 1.0}, make_grid(8), "floor").prefix_bits == 0
    assert CodeChooser.of({8: 1.0, 2: 1.0}, make_grid(8, overlap=True), "floor").prefix_bits == 4


@given(choices_to_make(), st.integers(1, 6))
@relaxed
def test_planes_that_are_fixed_stay_and_the_others_are_the_best(problem: Any, fixed: int) -> None:
    grid, slicing, targets, x, lam, read = problem
    fixed = min(fixed, 4 if grid.overlap else grid.bits)
    now = torch.randint(0, 2**grid.bits, (9,), generator=torch.Generator().manual_seed(fixed)).to(torch.uint8)
    chooser = CodeChooser.of(targets, grid, slicing, fixed)
    t = torch.stack([(x[r] - read[r][1]) / read[r][0] for r in chooser.streams])
    weight = torch.stack([lam[r] * read[r][0] ** 2 for r in chooser.streams])
    q = chooser.choose(t, weight, chooser.tables(t.device), now)
    assert torch.equal(q >> (grid.bits - fixed), now >> (grid.bits - fixed))
    costs = brute_force(x, lam, read, grid, slicing)
    costs[(all_codes(grid)[:, None] >> (grid.bits - fixed)) != (now >> (grid.bits - fixed))] = torch.inf
    found = costs.gather(0, q.long()[None])[0]
    torch.testing.assert_close(found, costs.amin(0), rtol=1e-4, atol=1e-9)
