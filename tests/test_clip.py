"""Clip search against plain loops, with the closed-form own read of a refitted width against least squares."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import make_grid
from problems import hessian
from torch import Tensor

from matquant.clip import SHRINKS, joint_cost, search_grid
from matquant.codes import fit_grid, nearest_code, read_rule, slice_codes
from matquant.recipe import Recipe

RECIPE = Recipe(group_size=8, scale_dtype="float32", refit_bits=0, targets={8: 0.01, 3: 2.0, 2: 1.0})


def slow_cost(w: np.ndarray, h: dict[int, np.ndarray], lam: dict[int, float], scale: float, zero: float, recipe: Recipe) -> float:
    """Of one group: each width's error at its nearest code, or after the best scale and offset that it could have."""
    grid, total = recipe.grid, 0.0
    q = torch.tensor(np.clip(np.floor(w / scale + zero + 0.5), 0, grid.max_code)).to(torch.uint8)
    for bits, power in h.items():
        rule, p = read_rule(bits, grid, recipe.slicing), slice_codes(q, bits, grid, recipe.slicing).double().numpy()
        read = scale * (rule.step * p + rule.shift - zero)
        if bits <= recipe.refit_bits:
            root = np.sqrt(power)
            columns = np.stack([p, np.ones_like(p)], 1)
            read = columns @ np.linalg.lstsq(columns * root[:, None], w * root, rcond=None)[0]
        total += lam[bits] * (power * (w - read) ** 2).sum()
    return total


def problem(recipe: Recipe, out: int = 8, columns: int = 16, seed: int = 13) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """(weights with long tails, worth clipping; importance by width; weight of every row by width)."""
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(out, columns, generator=g) * 0.1) ** 3 * 50
    importance = {r: torch.diagonal(hessian(columns, seed + r)) for r in recipe.targets}
    return w, importance, {r: lam * (0.5 + torch.rand(out, generator=g)) for r, lam in recipe.targets.items()}


@pytest.mark.parametrize("refit_bits", [0, 2, 8])
@pytest.mark.parametrize("slicing", ["floor", "round", "round-overflow"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_takes_the_cheapest_range_of_each_group(symmetric: bool, slicing: str, refit_bits: int) -> None:
    recipe = replace(RECIPE, symmetric=symmetric, slicing=slicing, refit_bits=refit_bits)
    w, importance, lam = problem(recipe)
    scale, zero = search_grid(w, importance, lam, recipe)
    plain, _ = fit_grid(w.reshape(8, 2, 8), recipe.grid, torch.float32)
    tops = [256 - 2 ** (8 - r) for r in recipe.targets if r > refit_bits] if slicing == "round" and not symmetric else []
    shifts = {0, *((top - 255) // 2 for top in tops)}  # what puts 0 and the top level equally far from the middle
    clipped, shifted = False, False
    for row in range(8):
        for g in range(2):
            members = slice(8 * g, 8 * g + 8)
            group, h = w[row, members].double().numpy(), {r: power[members].double().numpy() for r, power in importance.items()}
            rows = {r: weight[row].item() for r, weight in lam.items()}
            costs = []
            for shrink in SHRINKS:
                s, z = fit_grid(w[row, members], recipe.grid, torch.float32, shrink)
                for shift in sorted(shifts, reverse=True):
                    costs.append(slow_cost(group, h, rows, s.item(), 128 if z is None else min(max(z.item() + shift, 0), 255), recipe))
            ours = slow_cost(group, h, rows, scale[row, g].item(), 128 if zero is None else zero[row, g].item(), recipe)
            assert ours == pytest.approx(min(costs), rel=1e-3, abs=1e-9)
            at = costs.index(min(costs))
            clipped, shifted = clipped or at >= len(shifts), shifted or at % len(shifts) > 0
    assert shifted if len(shifts) > 1 else clipped and (scale < plain).any(), "not much of a search"


@pytest.mark.parametrize("refit_bits", [0, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_joint_cost_is_its_formula(symmetric: bool, refit_bits: int) -> None:
    recipe = replace(RECIPE, symmetric=symmetric, refit_bits=refit_bits)
    w, importance, lam = problem(recipe, seed=5)
    wg = w.reshape(8, 2, 8)
    wg[0, 0] = wg[0, 0].abs()
    scale, zero = fit_grid(wg, recipe.grid, torch.float32, 0.8)
    cost = joint_cost(wg, {r: h.reshape(2, 8) for r, h in importance.items()}, lam, scale, zero, recipe)
    for row in range(8):
        for g in range(2):
            h = {r: power.reshape(2, 8)[g].double().numpy() for r, power in importance.items()}
            rows, z = {r: weight[row].item() for r, weight in lam.items()}, 128 if zero is None else zero[row, g].item()
            expected = slow_cost(wg[row, g].double().numpy(), h, rows, scale[row, g].item(), z, recipe)
            assert cost[row, g].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_an_own_read_of_equal_codes_or_dead_inputs_costs_no_less_than_nothing() -> None:
    """The closed form divides by what the codes explain; here that is nothing."""
    recipe = replace(RECIPE, targets={2: 1.0}, refit_bits=2)
    wg = torch.zeros(2, 1, 8)
    wg[1] = torch.linspace(-0.01, 0.01, 8)
    scale = torch.ones(2, 1)
    zero = torch.full((2, 1), 100.0)
    one = {2: torch.ones(2)}
    cost = joint_cost(wg, {2: torch.ones(1, 8)}, one, scale, zero, recipe)
    torch.testing.assert_close(cost[:, 0], ((wg - wg.mean(-1, keepdim=True)) ** 2).sum((1, 2)), rtol=1e-3, atol=1e-7)
    assert torch.equal(joint_cost(wg, {2: torch.zeros(1, 8)}, one, scale, zero, recipe), torch.zeros(2, 1))


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
