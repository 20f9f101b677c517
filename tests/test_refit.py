"""Refit against a dense least-squares solution, one row at a time, and that it never raises a loss; minmax against plain loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import hessian, problem, same_for_all, slow_loss
from torch import Tensor

import matquant.refit as refitting
from matquant.codes import read_rule
from matquant.methods import minmax
from matquant.recipe import Recipe
from matquant.refit import RIDGE, refit
from matquant.weight import AffineWeight, NestedWeight, Refit

RECIPE = Recipe(group_size=8, scale_dtype="float32", refit_bits=0, clip_search=False)


def rounded(w: Tensor, h: Tensor, **changes: Any) -> NestedWeight:
    recipe = replace(RECIPE, method="minmax", **changes)
    return minmax.quantize(w, same_for_all(h, recipe), recipe).weight


def loss(goal: Tensor, weight: NestedWeight, bits: int, h: Tensor) -> Tensor:
    return slow_loss(goal, weight.read(bits).dense(), h)


def slow_refit(read: AffineWeight, w: Tensor, h: Tensor, row: int) -> tuple[np.ndarray, np.ndarray]:
    """scale and offset of one row: whiten by chol(H), append the ridge as rows, solve with numpy's least squares."""
    groups, size = read.scale.shape[1], w.shape[1] // read.scale.shape[1]
    middle = (2**read.bits - 1) / 2
    p = read.codes[row].double().numpy() - middle
    design = np.zeros((w.shape[1], 2 * groups))
    for g in range(groups):
        members = slice(g * size, (g + 1) * size)
        design[members, g], design[members, groups + g] = p[members], 1.0
    root = np.linalg.cholesky(h.double().numpy()).T
    start = np.concatenate([read.scale[row].numpy(), (read.offset[row] + middle * read.scale[row]).numpy()])
    weights = np.sqrt(RIDGE * np.diag(design.T @ h.double().numpy() @ design))
    left = np.concatenate([root @ design, np.diag(weights)])
    right = np.concatenate([root @ w[row].double().numpy(), weights * start])
    theta = np.linalg.lstsq(left, right, rcond=None)[0]
    return theta[:groups], theta[groups:] - middle * theta[:groups]


def slow_bytes(weight: NestedWeight, bits: int, a: np.ndarray, b: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
    """k / 128 = a / (s step), and u from the weight that the middle of the parent's range, 127.5, reads as."""
    rule, s = read_rule(bits, weight.grid, weight.slicing), weight.scale[row].double().numpy()
    at_middle = a * (127.5 - rule.shift) / rule.step + b
    return np.clip(np.round(128 * a / (s * rule.step)), 1, 255), np.clip(np.round(127.5 - at_middle / s), 0, 255)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_refit_is_the_ridge_least_squares_solution_in_two_bytes(bits: int, symmetric: bool) -> None:
    """Or the parent's read, where the rounded solution is no better."""
    w, h = problem(out=40, seed=bits)
    weight = rounded(w, h, symmetric=symmetric)
    fitted, losses = refit(weight, {bits: w}, {bits: h}, (bits,))
    parents = torch.full((40, 4), 128, dtype=torch.uint8) if weight.zero is None else weight.zero
    taken, off = torch.zeros(40, dtype=torch.bool), 0
    for row in range(len(w)):
        k, u = slow_bytes(weight, bits, *slow_refit(weight.read(bits), w, h, row), row)
        got = fitted.refits[bits].scale[row].numpy().astype(float), fitted.refits[bits].zero[row].numpy().astype(float)
        taken[row] = not ((got[0] == 128).all() and (got[1] == parents[row].numpy()).all())
        if taken[row]:
            np.testing.assert_allclose(got, (k, u), atol=1)
            off += (got[0] != k).sum() + (got[1] != u).sum()
        else:
            slow = replace(weight, refits={bits: Refit(*(torch.tensor(x, dtype=torch.uint8).expand(40, -1) for x in (k, u)))})
            assert loss(w, slow, bits, h)[row] >= loss(w, weight, bits, h)[row] * (1 - 1e-3)
    assert off <= 4, "more than rounding at halves"
    assert taken.float().mean() > (0.4 if bits == 4 else 0.9)
    torch.testing.assert_close(losses[bits], loss(w, fitted, bits, h), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_row_gets_worse_and_most_get_better(dtype: str) -> None:
    """Snapped to two bytes; every width to a goal and a Hessian of its own."""
    w, _ = problem(out=40)
    h = {bits: hessian(32, bits) for bits in (4, 3, 2)}
    goal = {bits: w + 0.01 * torch.randn(40, 32, generator=torch.Generator().manual_seed(bits)) for bits in h}
    weight = rounded(w, h[2], scale_dtype=dtype)
    fitted, losses = refit(weight, goal, h, (4, 3, 2))
    for bits in (4, 3, 2):
        before, after = loss(goal[bits], weight, bits, h[bits]), loss(goal[bits], fitted, bits, h[bits])
        assert (after <= before * (1 + 1e-5)).all()
        torch.testing.assert_close(losses[bits], after, rtol=1e-3, atol=1e-9)
        assert (after < before).float().mean() > (0.3 if bits == 4 else 0.9)
        alone, _ = refit(weight, goal, h, (bits,))
        assert torch.equal(alone.read(bits).dense(), fitted.read(bits).dense()) and list(alone.refits) == [bits]
    assert torch.equal(fitted.read(8).dense(), weight.read(8).dense()) and torch.equal(fitted.codes, weight.codes)
    assert fitted.refits[2].scale.dtype == fitted.refits[2].zero.dtype == torch.uint8


rules = st.sampled_from(
    [("floor", False, 8), ("floor", True, 8), ("round", False, 8), ("round-overflow", False, 8), ("floor", False, 4), ("round", False, 3)]
)


@given(rules, st.booleans(), st.integers(0, 999), st.sampled_from([0.01, 1.0, 100.0]))
@settings(deadline=None, max_examples=40)
def test_refitting_again_and_again_never_raises_a_loss(rule: tuple[str, bool, int], symmetric: bool, seed: int, size: float) -> None:
    """Starting from codes that are noise, from the parent's read and from a refit; h of few tokens has no full rank."""
    slicing, overlap, parent = rule
    chance = torch.Generator().manual_seed(seed)
    w, h = torch.randn(6, 32, generator=chance) * size, hessian(32, seed, rank=20)
    weight = rounded(w, h, slicing=slicing, overlap=overlap, parent_bits=parent, bits=(2,), targets={2: 1.0}, symmetric=symmetric)
    noise = torch.randint(0, 2**parent, weight.codes.shape, dtype=torch.uint8, generator=chance)
    weight = replace(weight, codes=torch.where(torch.rand(6, 32, generator=chance) < 0.2, noise, weight.codes))
    before = loss(w, weight, 2, h)
    for _ in range(3):
        weight, _ = refit(weight, {2: w}, {2: h}, (2,))
        after = loss(w, weight, 2, h)
        assert (after <= before * (1 + 1e-4) + 1e-9 * size**2).all()
        before = after


def test_rows_are_solved_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(out=10)
    weight = rounded(w, h)
    whole, losses = refit(weight, {2: w}, {2: h}, (2,))
    monkeypatch.setattr(refitting, "ROWS", 3)
    parts, others = refit(weight, {2: w}, {2: h}, (2,))
    assert torch.equal(whole.read(2).dense(), parts.read(2).dense())
    torch.testing.assert_close(losses[2], others[2])


def test_groups_that_say_nothing_keep_the_parents_read() -> None:
    w, h = problem()
    w[0] = 0.0  # all codes equal: scale and offset cannot be told apart
    h[:8, :] = h[:, :8] = 0.0  # no power in the first group
    weight = rounded(w, h)
    fitted = refit(weight, {2: w}, {2: h}, (2,))[0].read(2)
    assert fitted.scale.isfinite().all() and fitted.offset.isfinite().all() and (fitted.scale > 0).all()
    torch.testing.assert_close(fitted.scale[:, 0], weight.read(2).scale[:, 0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_a_solution_the_read_stays_as_it_is(symmetric: bool) -> None:
    """Not with H = 0 (nothing to gain), nor where the best scale is negative (codes in reverse)."""
    w, h = problem()
    weight = rounded(w, h, symmetric=symmetric)
    still, losses = refit(weight, {3: w}, {3: torch.zeros_like(h)}, (3,))
    assert torch.equal(still.read(3).dense(), weight.read(3).dense()) and not losses[3].any()
    reverse = replace(weight, codes=255 - weight.codes)
    kept, _ = refit(reverse, {3: w}, {3: h}, (3,))
    torch.testing.assert_close(kept.read(3).dense(), reverse.read(3).dense(), rtol=0, atol=0)
    assert torch.equal(refit(kept, {3: w}, {3: h}, (3,))[0].read(3).dense(), reverse.read(3).dense())


# --- minmax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits,symmetric", [(8, True), (8, False), (3, True), (3, False)])
def test_minmax_is_rounding_to_the_nearest_code(bits: int, symmetric: bool) -> None:
    w, h = problem()
    recipe = replace(RECIPE, method="minmax", parent_bits=bits, bits=(bits,), targets={bits: 1.0}, symmetric=symmetric)
    weight = minmax.quantize(w, same_for_all(h, recipe), recipe).weight
    for row in range(len(w)):
        for column in range(w.shape[1]):
            group = w[row, column // 8 * 8 : column // 8 * 8 + 8]
            if symmetric:
                s, z = 2 * group.abs().max() / (2**bits - 1), 2 ** (bits - 1)
            else:
                low, high = group.min().clamp(max=0), group.max().clamp(min=0)
                s = (high - low) / (2**bits - 1)
                z = torch.floor(-low / s + 0.5)
            t = float(w[row, column] / s + z)
            assert abs(int(weight.codes[row, column]) - min(max(t, 0), 2**bits - 1)) <= 0.5 + 1e-4


def test_minmax_with_clip_search_uses_it() -> None:
    recipe = replace(RECIPE, method="minmax", targets={2: 1.0}, normalize=False)
    w, h = problem()
    w[:, 0] *= 20
    plain, searched = (minmax.quantize(w, same_for_all(h, each), each).weight for each in (recipe, replace(recipe, clip_search=True)))
    power = torch.diagonal(h)
    cost = lambda weight: ((w - weight.read(2).dense()) ** 2 * power).sum()  # noqa: E731
    assert cost(searched) < cost(plain)
