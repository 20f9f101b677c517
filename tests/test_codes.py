"""The integer arithmetic against the golden table, and against loops over every code."""

import json
import math
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import all_codes, make_grid, rules
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.codes import (
    SLICINGS,
    Grid,
    Slicing,
    check_rule,
    fit_grid,
    levels,
    nearest_code,
    planes_needed,
    read_affine,
    read_rule,
    refit_affine,
    slice_codes,
    snap,
    snap_refit,
)
from matquant.errors import RecipeError

GOLDEN = Path(__file__).parent / "golden"
TABLE: list[dict[str, Any]] = json.loads((GOLDEN / "codes.json").read_text())
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
relaxed = settings(deadline=None, max_examples=60)


def grid_of(entry: dict[str, Any]) -> Grid:
    return make_grid(entry["parent"], overlap=entry["overlap"])


def named(entry: dict[str, Any]) -> str:
    return f"{entry['parent']}to{entry['bits']}-{entry['slicing']}{'-overlap' * entry['overlap']}"


# --- the golden table -----------------------------------------------------------------------------------------------


def test_golden_file_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(GOLDEN / "make.py"))
    assert (GOLDEN / "codes.json").read_text() == script["text"]()


def test_golden_table_is_complete() -> None:
    expected = {(c, r, s, False) for c in range(2, 9) for r in range(2, c + 1) for s in SLICINGS} | {(8, r, "floor", True) for r in range(2, 9)}
    assert {(e["parent"], e["bits"], e["slicing"], e["overlap"]) for e in TABLE} == expected
    assert len(TABLE) == len(expected)


@pytest.mark.parametrize("entry", TABLE, ids=named)
def test_codes_equal_the_golden_table(entry: dict[str, Any]) -> None:
    grid, bits, slicing = grid_of(entry), entry["bits"], entry["slicing"]
    codes = all_codes(grid)
    sliced = slice_codes(codes, bits, grid, slicing)
    assert sliced.dtype == torch.uint8
    assert sliced.tolist() == entry["codes"]
    assert (2 * levels(bits, grid, slicing)).tolist() == entry["twice"]
    step, shift = read_rule(bits, grid, slicing)
    assert [2 * (step * p + shift) for p in entry["codes"]] == entry["twice"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", [e for e in TABLE if e["parent"] in (3, 8)], ids=named)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_read_is_affine(entry: dict[str, Any], dtype: torch.dtype, symmetric: bool) -> None:
    """scale p + offset equals s (value - z) in exact rational arithmetic, for scales in either 16-bit type."""
    grid = make_grid(entry["parent"], symmetric=symmetric, overlap=entry["overlap"])
    scale = snap(torch.tensor([[0.0117, 3e-6, 1.0, 411.0]]), dtype)
    zero = None if symmetric else torch.tensor([[0, 1, 2, grid.max_code]], dtype=torch.uint8)
    scale_r, offset_r = read_affine(scale, zero, entry["bits"], grid, entry["slicing"])
    for g in range(4):
        z = Fraction(grid.center) if zero is None else Fraction(zero[0, g].item())
        for p, twice in zip(entry["codes"], entry["twice"], strict=True):
            exact = Fraction(scale[0, g].item()) * (Fraction(twice, 2) - z)
            read = Fraction(scale_r[0, g].item()) * p + Fraction(offset_r[0, g].item())
            tolerance = 0 if dtype != torch.float32 else Fraction(scale[0, g].item()) / 2**14
            assert abs(read - exact) <= tolerance


def refit_exactly(s: float, k: int, u: int, bits: int, grid: Grid, slicing: Slicing) -> tuple[Fraction, Fraction]:
    """(scale_r, offset_r) by the formula of docs/FORMAT.md in rational arithmetic."""
    step, shift = map(Fraction, read_rule(bits, grid, slicing))
    m, mid = Fraction(k, 128), Fraction(2**grid.bits - 1, 2)
    return Fraction(s) * m * step, Fraction(s) * (m * (shift - mid) + mid - Fraction(u, 2 ** (8 - grid.bits)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", TABLE, ids=named)
def test_a_refit_is_the_formula_rounded_once(entry: dict[str, Any], dtype: torch.dtype) -> None:
    grid, bits, slicing = grid_of(entry), entry["bits"], entry["slicing"]
    chance = torch.Generator().manual_seed(entry["parent"] * 10 + bits)
    k, u = (torch.randint(low, 256, (3, 40), dtype=torch.uint8, generator=chance) for low in (1, 0))
    k[0, :3], u[0, :3] = torch.tensor([1, 255, 128]), torch.tensor([255, 0, 128])
    scale = snap(torch.rand(3, 40, generator=chance) * 0.03, dtype)
    read = refit_affine(scale.to(dtype), k, u, bits, grid, slicing)
    for s, one_k, one_u, *got in zip(*(x.flatten().tolist() for x in (scale, k, u, *read)), strict=True):
        exact = refit_exactly(s, one_k, one_u, bits, grid, slicing)
        assert got == [torch.tensor(float(x), dtype=torch.float64).float().item() for x in exact]  # float64 holds both: 42 bits
        assert dtype == torch.float32 or Fraction(got[0]) == exact[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", TABLE, ids=named)
def test_every_refit_comes_back_from_its_read(entry: dict[str, Any], dtype: torch.dtype) -> None:
    grid, bits, slicing = grid_of(entry), entry["bits"], entry["slicing"]
    k, u = torch.meshgrid(torch.arange(1, 256, 7, dtype=torch.uint8), torch.arange(0, 256, 5, dtype=torch.uint8), indexing="ij")
    scale = snap(torch.rand(k.shape, generator=torch.Generator().manual_seed(1)) + 1e-4, dtype)
    found = snap_refit(*refit_affine(scale, k, u, bits, grid, slicing), scale, bits, grid, slicing)
    assert found[0].equal(k) and found[1].equal(u)


@pytest.mark.parametrize("entry", TABLE, ids=named)
def test_a_refit_of_128_and_the_zero_is_the_parents_read(entry: dict[str, Any]) -> None:
    grid, bits, slicing = make_grid(entry["parent"], symmetric=False, overlap=entry["overlap"]), entry["bits"], entry["slicing"]
    zero = all_codes(grid)[None]
    scale = snap(torch.rand(zero.shape, generator=torch.Generator().manual_seed(1)), torch.float16)
    plain = read_affine(scale, zero, bits, grid, slicing)
    k, u = torch.full_like(zero, 128), zero * 2 ** (8 - grid.bits)
    assert all(map(torch.equal, refit_affine(scale, k, u, bits, grid, slicing), plain))
    assert all(map(torch.equal, snap_refit(*plain, scale, bits, grid, slicing), (k, u)))


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_snapping_a_refit_keeps_the_middle_and_clamps(bits: int, slicing: Slicing) -> None:
    """The read at the middle of the range moves by at most half a step of u, whatever k rounds to; values beyond the bytes end at them."""
    grid, chance = make_grid(8), torch.Generator().manual_seed(bits)
    scale = torch.rand(4, 50, generator=chance) + 0.1
    step, shift = read_rule(bits, grid, slicing)
    m, u = torch.rand(4, 50, generator=chance) * 1.9 + 0.05, torch.rand(4, 50, generator=chance) * 255
    a, b = scale * m * step, scale * (m * (shift - 127.5) + 127.5 - u)
    got_k, got_u = snap_refit(a, b, scale, bits, grid, slicing)
    new_a, new_b = refit_affine(scale, got_k, got_u, bits, grid, slicing)
    assert ((new_a - a).abs() <= scale * step / 128 * 0.501).all()
    assert (((new_a - a) * (127.5 - shift) / step + new_b - b).abs() <= scale * 0.501).all()
    ends = snap_refit(*(torch.tensor([[x, -x, 0.0]]) for x in (1e4, 1e6)), torch.ones(1, 3), bits, grid, slicing)
    assert ends[0].tolist() == [[255, 1, 1]] and ends[1].tolist()[0][:2] == [0, 255]


@pytest.mark.parametrize("entry", [e for e in TABLE if e["bits"] == e["parent"]], ids=named)
def test_a_symmetric_full_width_read_has_an_integer_zero(entry: dict[str, Any]) -> None:
    grid = grid_of(entry)
    scale = torch.ones(1, 1)
    scale_r, offset_r = read_affine(scale, None, grid.bits, grid, entry["slicing"])
    zero = -offset_r / scale_r
    if entry["overlap"]:
        return  # p is not the code there; the next test says what overlap promises
    assert zero.item() == grid.center == 2 ** (grid.bits - 1)
    assert 0.0 in (levels(grid.bits, grid, entry["slicing"]) - grid.center).tolist()


def test_overlap_doubles_the_residual_step_and_keeps_the_low_widths() -> None:
    plain, overlap = make_grid(8), make_grid(8, overlap=True)
    for bits in (2, 3, 4):
        assert levels(bits, plain, "floor").equal(levels(bits, overlap, "floor"))
    wide = levels(8, overlap, "floor").reshape(16, 16)
    assert (wide.diff(dim=1) == 2).all()
    assert (wide.diff(dim=0) == 16).all()
    assert wide[0, 0] == 7.5 - 15 and wide[15, 15] == 247.5 + 15


# --- slicing --------------------------------------------------------------------------------------------------------


@given(rules(), st.data())
@relaxed
def test_a_slice_touches_only_the_planes_it_says(rule: tuple[Grid, Slicing], data: st.DataObject) -> None:
    grid, slicing = rule
    bits = data.draw(st.integers(2, grid.bits))
    need = planes_needed(bits, grid.bits, slicing)
    assert need == (bits if slicing == "floor" else min(bits + 1, grid.bits))
    noise = data.draw(st.integers(0, 2 ** (grid.bits - need) - 1))
    codes = all_codes(grid)
    held = (codes >> (grid.bits - need)) << (grid.bits - need)
    assert slice_codes(held | noise, bits, grid, slicing).equal(slice_codes(codes, bits, grid, slicing))


def test_round_needs_the_plane_after_its_own() -> None:
    assert not slice_codes(torch.tensor([0, 8], dtype=torch.uint8), 4, make_grid(8), "round").diff().eq(0).any()


def test_rounding_is_half_up_and_not_to_even() -> None:
    halves = torch.tensor([8, 24, 40, 56], dtype=torch.uint8)  # 0.5, 1.5, 2.5, 3.5 cells of 16
    assert slice_codes(halves, 4, make_grid(8), "round").tolist() == [1, 2, 3, 4]
    assert nearest_code(torch.tensor([0.5, 1.5, 2.5, 3.5]), make_grid(8)).tolist() == [1, 2, 3, 4]


def test_rounding_starts_from_the_parent_code() -> None:
    """8 -> 4 -> 2 differs from 8 -> 2 on 24 of 256 codes."""
    codes = all_codes(make_grid(8))
    twice = slice_codes(slice_codes(codes, 4, make_grid(8), "round"), 2, make_grid(4), "round")
    assert (twice != slice_codes(codes, 2, make_grid(8), "round")).sum() == 24


@pytest.mark.parametrize("bits", range(2, 8))
def test_uint8_does_not_wrap_at_the_top(bits: int) -> None:
    top = torch.full((1,), 255, dtype=torch.uint8)
    assert slice_codes(top, bits, make_grid(8), "round").item() == 2**bits - 1
    assert slice_codes(top, bits, make_grid(8), "round-overflow").item() == 2**bits
    assert slice_codes(top, 8, make_grid(8, overlap=True), "floor").item() == 135


def test_levels_hands_out_copies() -> None:
    levels(4, make_grid(8), "floor").zero_()
    assert levels(4, make_grid(8), "floor").sum() > 0


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "parent_bits is 9; allowed: 2 to 8"),
        ({"bits": 1}, "parent_bits is 1"),
        ({"group_size": 0}, "group_size is 0; allowed: a positive number"),
        ({"group_size": -2}, "group_size is -2"),
        ({"bits": 4, "overlap": True}, "overlap needs parent_bits 8, not 4"),
    ],
)
def test_grid_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_grid(**arguments)


def test_groups_must_divide_the_row() -> None:
    assert make_grid(group_size=-1).groups(48) == 1
    assert make_grid(group_size=16).groups(48) == 3
    with pytest.raises(RecipeError, match="group_size 32 does not divide 48 input channels"):
        make_grid(group_size=32).groups(48)


@pytest.mark.parametrize(
    ("bits", "grid", "slicing", "message"),
    [
        (1, make_grid(8), "floor", "cannot read 1 bits from a 8-bit parent; allowed: 2 to 8"),
        (5, make_grid(4), "floor", "cannot read 5 bits from a 4-bit parent; allowed: 2 to 4"),
        (4, make_grid(8), "rond", r"slicing is 'rond'; choose from floor, round, round-overflow \(did you mean round\?\)"),
        (4, make_grid(8, overlap=True), "round", "overlap needs slicing floor, not round"),
    ],
)
def test_check_rule_refuses(bits: int, grid: Grid, slicing: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_rule(bits, grid, slicing)


# --- fitting a grid -------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, width=32, allow_nan=False), min_size=1, max_size=20), st.sampled_from(DTYPES))
@relaxed
def test_snap_is_positive_finite_storable_and_idempotent(values: list[float], dtype: torch.dtype) -> None:
    once = snap(torch.tensor(values), dtype)
    assert once.isfinite().all() and (once > 0).all()
    assert once.to(dtype).float().equal(once)
    assert snap(once, dtype).equal(once)


def test_snap_handles_the_ends() -> None:
    for dtype in DTYPES:
        ends = snap(torch.tensor([0.0, 1e-45, float("inf"), 1e38]), dtype)
        assert ends.isfinite().all() and (ends > 0).all()
    assert snap(torch.tensor([0.1]), torch.float16).item() == torch.tensor(0.1).half().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fit_grid_against_plain_python(bits: int, dtype: torch.dtype, symmetric: bool) -> None:
    w = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(bits))
    w[0, 0], w[0, 1], w[0, 2] = 0.0, w[0, 1].abs() + 1, -w[0, 2].abs() - 1  # all zero, all positive, all negative
    grid = make_grid(bits, symmetric=symmetric)
    scale, zero = fit_grid(w, grid, dtype, shrink=0.9)
    assert (zero is None) == symmetric
    for o in range(3):
        for g in range(5):
            row = [0.9 * v for v in w[o, g].tolist()]
            low, high = min(0.0, *row), max(0.0, *row)
            wanted = 2 * max(map(abs, row)) / (2**bits - 1) if symmetric else (high - low) / (2**bits - 1)
            got = scale[o, g].item()
            assert got == pytest.approx(wanted, rel=torch.finfo(dtype).eps) or (wanted == 0 and 0 < got < 1e-7)
            if zero is not None:
                assert zero[o, g].item() == pytest.approx(min(max(math.floor(-low / got + 0.5), 0), 2**bits - 1), abs=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fitted_grid_holds_every_weight_within_half_a_step(symmetric: bool) -> None:
    grid = make_grid(8, symmetric=symmetric)
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    scale, zero = fit_grid(w, grid, torch.float32)
    z = grid.center if zero is None else zero[:, None]
    codes = nearest_code(w / scale[:, None] + z, grid)
    # a symmetric grid ends half a step beyond its largest weight on one side only, so that weight may be half a step off
    assert ((scale[:, None] * (codes.float() - z) - w).abs() <= 0.5001 * scale[:, None]).all()


# --- choosing codes -------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.lists(st.floats(-40, 300, width=32), min_size=1, max_size=30))
@relaxed
def test_nearest_code_is_the_nearest(bits: int, values: list[float]) -> None:
    grid = make_grid(bits)
    for t, q in zip(values, nearest_code(torch.tensor(values), grid).tolist(), strict=True):
        assert abs(t - q) <= min(abs(t - other) for other in range(2**bits)) + 1e-5


@given(st.lists(st.floats(-40, 300, width=32), min_size=1, max_size=30))
@relaxed
def test_nearest_code_with_overlap_takes_the_cell_that_holds_the_value(values: list[float]) -> None:
    grid = make_grid(8, overlap=True)
    reads = levels(8, grid, "floor").double()
    for t, q in zip(values, nearest_code(torch.tensor(values), grid).tolist(), strict=True):
        cell = min(max(math.floor((t + 0.5) / 16), 0), 15)
        assert q // 16 == cell or abs((t + 0.5) / 16 - round((t + 0.5) / 16)) < 1e-5
        inside = reads[16 * (q // 16) : 16 * (q // 16) + 16]
        assert abs(reads[q] - t) <= (inside - t).abs().min() + 1e-4
