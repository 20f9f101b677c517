"""The low planes alone, against slow loops in float64; the bounded least squares before them, against projected gradients."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from grids import make_grid
from problems import damped, one_each, same_for_all, slow_loss
from torch import Tensor

from matquant.activations import Inputs
from matquant.factor import Factor, factorize_all
from matquant.recipe import Recipe
from matquant.residual import fit_residual, split, within
from matquant.weight import NestedWeight

RECIPE = Recipe(group_size=8, symmetric=True, targets={8: 1.0, 2: 1.0}, sweeps=0, streams=(2,), refit_bits=0, normalize=False)


def problem(seed: int, overlap: bool) -> tuple[Tensor, Tensor, NestedWeight]:
    """(weights, Hessian, a nested weight whose high nibbles lie up to two cells off)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 32, generator=g) @ (torch.randn(32, 32, generator=g) * 0.3 + torch.diag(torch.rand(32, generator=g) + 0.2))
    w = torch.randn(6, 32, generator=g) * 0.1
    scale = w.reshape(6, 4, 8).abs().amax(-1) / 127
    q = (w.reshape(6, 4, 8) / scale[..., None] + 128).round().clamp(0, 255).reshape(6, 32)
    moved = (q / 16).floor() + torch.randint(-1, 2, q.shape, generator=g)
    codes = (moved.clamp(0, 15) * 16 + 3).to(torch.uint8)
    return w, x.T @ x / 300, NestedWeight(codes, scale, None, make_grid(8, 8, overlap=overlap), "floor")


def factored(inputs: Inputs) -> dict[int, Factor]:
    return factorize_all(inputs.h, RECIPE.damping, act_order=True)


def fit(weight: NestedWeight, w: Tensor, inputs: Inputs, recipe: Recipe, fixed: int = 4) -> tuple[NestedWeight, dict[int, Tensor]]:
    return fit_residual(weight, w, inputs, factored(inputs), recipe, fixed)


def bounded(goal: Tensor, low: Tensor, high: Tensor, h: Tensor) -> Tensor:
    """argmin over low <= x <= high of (goal - x) H (goal - x)^T by projected gradients, in float64."""
    goal, low, high, h = goal.double(), low.double(), high.double(), h.double()
    x, rate = goal.clamp(low, high), 1 / torch.linalg.eigvalsh(h)[-1]
    for _ in range(20_000):
        x = (x - rate * (x - goal) @ h).clamp(low, high)
    return x


def slow(goal: Tensor, h: Tensor, order: Tensor, weight: NestedWeight, lam: dict[int, float]) -> np.ndarray:
    """Nested GPTQ by elimination, the code of each weight searched among the 16 of its high nibble; one H for all widths."""
    inverse = np.linalg.inv(h.numpy()[np.ix_(order, order)])
    running, codes = {r: goal.double().numpy().copy() for r in lam}, weight.codes.numpy().copy()
    for step, column in enumerate(order.tolist()):
        for row in range(len(goal)):
            choices = np.arange(16) + (int(codes[row, column]) & 0xF0)
            candidates = NestedWeight(
                torch.tensor(choices, dtype=torch.uint8)[:, None].repeat(1, 32), weight.scale[row].repeat(16, 1), None, weight.grid, "floor"
            )
            reads = {r: candidates.read(r).dense().double().numpy()[:, column] for r in lam}
            best = int(np.argmin(sum(lam[r] * (reads[r] - running[r][row, column]) ** 2 for r in lam)))
            codes[row, column] = choices[best]
            for r in lam:
                error = (running[r][row, column] - reads[r][best]) / inverse[step, step]
                running[r][row, order.numpy()[step:]] -= error * inverse[step, step:]
        rest = inverse[step + 1 :, step + 1 :] - np.outer(inverse[step + 1 :, step], inverse[step, step + 1 :]) / inverse[step, step]
        inverse[step + 1 :, step + 1 :] = rest
    return codes


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bounds_hold_and_nothing_between_them_is_better(seed: int) -> None:
    w, h, weight = problem(seed, overlap=False)
    h = damped(h, RECIPE).float()
    low, high = (replace(weight, codes=codes).read(8).dense() for codes in (weight.codes & 0xF0, weight.codes | 15))
    found, best = within(w, low, high, h, low), bounded(w, low, high, h)
    assert (found >= low).all() and (found <= high).all() and ((found == low) | (found == high)).float().mean() > 0.2
    assert (slow_loss(w, found, h) <= 1.01 * slow_loss(w, best, h) + 1e-9).all()
    free = within(w, w - 1, w + 1, h, torch.zeros_like(w))
    assert slow_loss(w, free, h).sum() < 0.02 * slow_loss(w, found, h).sum()


@pytest.mark.parametrize("targets", [{8: 1.0, 2: 1.0}, {8: 1.0, 6: 0.7, 2: 1.0}, {6: 1.0, 4: 1.0}])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_reference(seed: int, overlap: bool, targets: dict[int, float]) -> None:
    w, h, weight = problem(seed, overlap)
    recipe = replace(RECIPE, targets=targets)
    inputs = same_for_all(h, recipe)
    fitted, losses = fit(weight, w, inputs, recipe)
    dense, order = damped(h, recipe), factored(inputs)[0].order
    lam = {r: weight for r, weight in targets.items() if r > 4}
    low, high = (replace(weight, codes=codes).read(8).dense() for codes in (weight.codes & 0xF0, weight.codes | 15))
    goal = within(w, low, high, factored(inputs)[0].damped, weight.read(8).dense())
    told_apart = 8 - max(lam)  # where the parent does not count, its wish breaks ties
    assert ((fitted.codes >> told_apart).numpy() != slow(goal, dense, order, weight, lam) >> told_apart).sum() <= 1  # float32 near a tie
    assert fitted.grid == weight.grid and list(losses) == sorted(lam)
    for r, loss in losses.items():
        torch.testing.assert_close(loss, slow_loss(w, fitted.read(r).dense(), dense), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("overlap", [False, True])
def test_high_planes_stay_and_neither_sweeps_nor_a_second_fit_raise_the_loss(overlap: bool) -> None:
    w, h, weight = problem(2, overlap)
    losses = []
    for sweeps in range(4):
        fitted, loss = fit(weight, w, same_for_all(h, RECIPE), replace(RECIPE, sweeps=sweeps))
        assert torch.equal(fitted.codes >> 4, weight.codes >> 4)
        for bits in (4, 3, 2):
            assert torch.equal(fitted.read(bits).dense(), weight.read(bits).dense())
        losses.append(loss[8])
    assert all((after <= before * (1 + 1e-6)).all() for before, after in pairwise(losses))
    again, loss = fit(fitted, w, same_for_all(h, RECIPE), RECIPE)  # no sweeps: many rows would be worse
    assert (loss[8] <= losses[-1] * (1 + 1e-6)).all() and (again.codes == fitted.codes).all(1).any()


def test_aiming_within_the_cells_beats_aiming_past_them() -> None:
    """Against the same loop with the weights themselves as its goal."""
    ratios = []
    for seed in range(4):
        w, h, weight = problem(seed, overlap=False)
        dense, order = damped(h, RECIPE), factored(same_for_all(h, RECIPE))[0].order
        past = replace(weight, codes=torch.from_numpy(slow(w, dense, order, weight, {8: 1.0})))
        loss = fit(weight, w, same_for_all(h, RECIPE), RECIPE)[1][8]
        ratios.append((loss.sum() / slow_loss(w, past.read(8).dense(), dense).sum()).item())
    assert max(ratios) < 1 and np.mean(ratios) < 0.8


def test_each_width_has_its_own_inputs_and_its_share() -> None:
    recipe = replace(RECIPE, targets={8: 1.0, 6: 1.0, 2: 1.0}, streams=(6, 2), sweeps=2)
    w, _, weight = problem(4, overlap=False)
    inputs = one_each(32, recipe, seed=4)
    _, both = fit(weight, w, inputs, recipe)
    _, alone = fit(weight, w, inputs, replace(recipe, targets={8: 1.0, 2: 1.0}))
    six, _ = fit(weight, w, inputs, replace(recipe, targets={6: 1.0, 2: 1.0}))
    narrow = slow_loss(w, six.read(6).dense(), damped(inputs.h[6], recipe)).sum()
    assert narrow < 0.99 * both[6].sum() and alone[8].sum() < 0.99 * both[8].sum()
    assert both[6].sum() < 1.3 * narrow


def test_overlap_wins_back_what_cells_do_not_reach() -> None:
    losses = {}
    for overlap in (False, True):
        w, h, weight = problem(3, overlap)
        losses[overlap] = fit(weight, w, same_for_all(h, RECIPE), replace(RECIPE, sweeps=2))[1][8].sum()
    assert losses[True] < losses[False] / 2


def test_without_a_wide_target_the_parent_is_fitted() -> None:
    w, h, weight = problem(5, overlap=False)
    none = fit(weight, w, same_for_all(h, RECIPE), replace(RECIPE, targets={4: 1.0, 2: 1.0}))
    eight = fit(weight, w, same_for_all(h, RECIPE), replace(RECIPE, targets={8: 1.0, 2: 1.0}))
    assert torch.equal(none[0].codes, eight[0].codes) and list(none[1]) == [8]


DEFAULT = Recipe().targets
WITHOUT_6 = {r: lam for r, lam in DEFAULT.items() if r != 6}


@pytest.mark.parametrize(
    "changes, targets, fixed",
    [
        ({}, WITHOUT_6, 4),
        ({"favor": (6, 2)}, {**WITHOUT_6, 2: 3.0}, 4),
        ({"targets": {8: 1.0, 6: 2.0, 3: 1.0}}, {8: 1.0, 3: 1.0}, 3),
        ({"targets": {6: 2.0, 5: 1.0, 2: 1.0}}, {6: 2.0, 5: 1.0, 2: 1.0}, 2),
        ({"parent_bits": 6, "bits": (6, 5, 4, 2), "targets": {6: 1.0, 5: 1.0, 4: 1.0}}, {6: 1.0, 4: 1.0}, 4),
        ({"targets": {8: 1.0, 6: 1.0}}, {8: 1.0, 6: 1.0}, 0),
        ({"targets": {4: 1.0, 2: 1.0}}, {4: 1.0, 2: 1.0}, 0),
        ({"sweeps": 0}, DEFAULT, 0),
        ({"slicing": "round"}, DEFAULT, 0),
        ({"feedback": "mean", "streams": (8,)}, DEFAULT, 0),
    ],
)
def test_who_has_a_say_in_the_high_planes(changes: dict, targets: dict[int, float], fixed: int) -> None:
    recipe = replace(Recipe(), **changes)
    first, planes = split(recipe)
    assert (first.importance, planes) == (targets, fixed)
    assert all(first.stream_of(r) == recipe.stream_of(r) for r in recipe.bits)
