"""Refit against a dense least-squares solution, one row at a time; clip search and minmax against plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import make_grid
from torch import Tensor

from matquant import methods
from matquant.clip import SHRINKS, joint_cost, search_grid
from matquant.codes import Grid, fit_grid, nearest_code, read_rule, slice_codes
from matquant.methods import minmax
from matquant.recipe import Recipe
from matquant.refit import RIDGE, refit
from matquant.weight import AffineWeight, NestedWeight, Refit

RECIPE = Recipe(group_size=8, scale_dtype="float32", refit_bits=0, clip_search=False)


def problem(out: int = 10, columns: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=g) @ (torch.randn(columns, columns, generator=g) * 0.3 + torch.eye(columns))
    return torch.randn(out, columns, generator=g) * 0.1, x.T @ x / len(x)


def loss(w: Tensor, read: AffineWeight, h: Tensor) -> Tensor:
    error = w - read.dense()
    return ((error @ h) * error).sum(1)


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
    weight = minmax.quantize(w, h, replace(RECIPE, method="minmax", symmetric=symmetric)).weight
    fitted = refit(weight, w, h, (bits,))
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
            assert loss(w, slow.read(bits), h)[row] >= loss(w, weight.read(bits), h)[row] * (1 - 1e-3)
    assert off <= 4, "more than rounding at halves"
    assert taken.float().mean() > (0.4 if bits == 4 else 0.9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_row_gets_worse_and_most_get_better(dtype: str) -> None:
    w, h = problem(out=40)
    weight = methods.load("gptq")(w, h, replace(RECIPE, scale_dtype=dtype)).weight
    fitted = refit(weight, w, h, (4, 3, 2))
    for bits in (4, 3, 2):
        before, after = loss(w, weight.read(bits), h), loss(w, fitted.read(bits), h)
        assert (after <= before * (1 + 1e-5)).all()
        assert bits == 4 or (after < before).float().mean() > 0.9
    assert torch.equal(fitted.read(8).dense(), weight.read(8).dense())
    assert fitted.refits[2].scale.dtype == fitted.refits[2].zero.dtype == torch.uint8


def test_groups_that_say_nothing_keep_the_parents_read() -> None:
    w, h = problem()
    w[0] = 0.0  # all codes equal: scale and offset cannot be told apart
    h[:8, :] = h[:, :8] = 0.0  # no power in the first group
    weight = minmax.quantize(w, h, replace(RECIPE, method="minmax")).weight
    fitted = refit(weight, w, h, (2,)).read(2)
    assert fitted.scale.isfinite().all() and fitted.offset.isfinite().all() and (fitted.scale > 0).all()
    torch.testing.assert_close(fitted.scale[:, 0], weight.read(2).scale[:, 0], rtol=1e-3, atol=0)


# --- clip search --------------------------------------------------------------------------------------------------------


def slow_cost(w: np.ndarray, h: np.ndarray, scale: float, zero: float, targets: dict[int, float], grid: Grid, slicing: str) -> float:
    cost = 0.0
    for weight, power in zip(w, h, strict=True):
        q = torch.tensor([int(min(max(np.floor(weight / scale + zero + 0.5), 0), grid.max_code))], dtype=torch.uint8)
        for bits, lam in targets.items():
            rule = read_rule(bits, grid, slicing)
            cost += lam * power * (weight - scale * (rule.step * int(slice_codes(q, bits, grid, slicing)) + rule.shift - zero)) ** 2
    return cost


@pytest.mark.parametrize("slicing", ["floor", "round", "round-overflow"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_takes_the_cheapest_range_of_each_group(symmetric: bool, slicing: str) -> None:
    w, h = problem(out=3, columns=16, seed=4)
    w = w**3 * 50  # long tails: worth clipping
    grid, targets, power = make_grid(8, 8, symmetric), {8: 0.01, 3: 2.0, 2: 1.0}, torch.diagonal(h)
    scale, zero = search_grid(w, power, targets, grid, slicing, torch.float32)
    for row in range(3):
        for g in range(2):
            members = slice(8 * g, 8 * g + 8)
            costs = []
            for shrink in SHRINKS:
                s, z = fit_grid(w[row, members], grid, torch.float32, shrink)
                costs.append(
                    slow_cost(w[row, members].numpy(), power[members].numpy(), s.item(), 128 if z is None else z.item(), targets, grid, slicing)
                )
            z = 128 if zero is None else zero[row, g].item()
            ours = slow_cost(w[row, members].numpy(), power[members].numpy(), scale[row, g].item(), z, targets, grid, slicing)
            assert ours == pytest.approx(min(costs), rel=1e-4)
    assert not symmetric or (scale < fit_grid(w.reshape(3, 2, 8), grid, torch.float32)[0]).any(), "nothing was clipped: not much of a search"


def test_nearest_parent_code_is_the_joint_minimiser_while_nothing_was_fed_back() -> None:
    """The claim that lets the clip search do without a joint search."""
    grid = make_grid(8, -1)
    t = torch.linspace(-10, 265, 5000)
    for slicing in ("floor", "round"):
        costs = torch.zeros(5000, 256)
        for bits, lam in {8: 1.0, 4: 4.0, 3: 2.0, 2: 1.0}.items():
            rule = read_rule(bits, grid, slicing)
            p = slice_codes(torch.arange(256, dtype=torch.uint8), bits, grid, slicing)
            costs += lam * (t[:, None] - (p * rule.step + rule.shift)) ** 2
        nearest = costs.gather(1, nearest_code(t, grid).long()[:, None])[:, 0]
        at_best = nearest <= costs.min(1).values * (1 + 1e-5) + 1e-3
        inside = (t > 0) & (t < 255)
        assert at_best[inside].float().mean() > (0.999 if slicing == "floor" else 0.9), slicing


def test_joint_cost_adds_up_over_targets() -> None:
    w, h = problem(out=4, columns=16)
    wg, hg = w.reshape(4, 2, 8), torch.diagonal(h).reshape(2, 8)
    scale, _ = fit_grid(wg, make_grid(8, 8), torch.float32)
    one = [joint_cost(wg, hg, scale, None, {bits: lam}, make_grid(8, 8), "floor") for bits, lam in ((8, 3.0), (2, 0.5))]
    torch.testing.assert_close(joint_cost(wg, hg, scale, None, {8: 3.0, 2: 0.5}, make_grid(8, 8), "floor"), one[0] + one[1])


# --- minmax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits,symmetric", [(8, True), (8, False), (3, True), (3, False)])
def test_minmax_is_rounding_to_the_nearest_code(bits: int, symmetric: bool) -> None:
    w, h = problem()
    recipe = replace(RECIPE, method="minmax", parent_bits=bits, bits=(bits,), targets={bits: 1.0}, symmetric=symmetric)
    weight = minmax.quantize(w, h, recipe).weight
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
    w, h = problem()
    w[:, 0] *= 20
    plain = minmax.quantize(w, h, replace(RECIPE, method="minmax", targets={2: 1.0})).weight
    searched = minmax.quantize(w, h, replace(RECIPE, method="minmax", targets={2: 1.0}, clip_search=True)).weight
    power = torch.diagonal(h)
    cost = lambda weight: ((w - weight.read(2).dense()) ** 2 * power).sum()  # noqa: E731
    assert cost(searched) < cost(plain)
    assert isinstance(searched, NestedWeight)
