"""What is minimised, against explicit inputs X and sums over columns in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import damped, one_each, prepared, problem, same_for_all, slow_loss
from torch import Tensor

from matquant.activations import Inputs
from matquant.codes import Grid, fit_grid
from matquant.methods import minmax
from matquant.objective import DEDICATED_SHRINKS, expected_loss, row_losses
from matquant.recipe import FAVOR, Recipe

RECIPE = Recipe(group_size=8, scale_dtype="float32", refit_bits=0, targets={8: 0.05, 4: 0.25, 3: 0.5, 2: 1.0})


def test_losses_are_output_errors_on_each_widths_own_inputs() -> None:
    torch.manual_seed(0)
    w, recipe = torch.randn(5, 24) * 0.1, replace(RECIPE, damping=0.02)
    x = {stream: torch.randn(90, 24) * torch.rand(24) for stream in (0, 2, 3, 4)}
    inputs = Inputs({stream: own.T @ own / 90 for stream, own in x.items()})
    objective, _ = prepared(w, inputs, recipe)
    weight = minmax.quantize(w, inputs, replace(recipe, method="minmax")).weight
    losses = objective.losses(weight)
    assert objective.widths == (4, 3, 2, 8) and losses.dtype == torch.float64
    for r, stream, rows in zip(objective.widths, (4, 3, 2, 0), losses, strict=True):
        error = (w - weight.read(r).dense()).double()
        outputs = (x[stream].double() @ error.T).square().sum(0) / 90
        damping = 0.02 * x[stream].double().square().mean() * error.square().sum(1)
        torch.testing.assert_close(rows, outputs + damping, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(objective.value(losses), sum(objective.weight[i].double() * losses[i] for i in range(4)))
    torch.testing.assert_close(row_losses(w, torch.zeros_like(w), inputs.h[2]), slow_loss(w, torch.zeros_like(w), inputs.h[2]), rtol=1e-4, atol=1e-9)


# --- weights ------------------------------------------------------------------------------------------------------------


def slow_expected(w: Tensor, h: Tensor, bits: int, recipe: Recipe, order: np.ndarray) -> np.ndarray:
    """sum_j (w_j - nearest_r(w_j))^2 / U_jj^2 of every row: each group of the r-bit grid clipped as costs that row's group least."""
    dense = damped(h, recipe).numpy()[np.ix_(order, order)]
    cost = np.zeros(len(h))
    cost[order] = 1 / np.diag(np.linalg.cholesky(np.linalg.inv(dense)).T) ** 2
    grid, total = Grid(bits, recipe.group_size, recipe.symmetric, False), np.zeros(len(w))
    for row in range(len(w)):
        for first in range(0, w.shape[1], recipe.group_size):
            members = slice(first, first + recipe.group_size)
            ranges = []
            for shrink in DEDICATED_SHRINKS if bits < 4 else (1.0,):
                s, z = fit_grid(w[row, members], grid, getattr(torch, recipe.scale_dtype), shrink)
                zero = 2 ** (bits - 1) if z is None else z.item()
                q = np.clip(np.floor(w[row, members].double().numpy() / s.item() + zero + 0.5), 0, 2**bits - 1)
                ranges.append(((s.item() * (q - zero) - w[row, members].double().numpy()) ** 2 * cost[members]).sum())
            total[row] += min(ranges)
    return total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_expected_loss_is_its_formula(bits: int, symmetric: bool) -> None:
    recipe = replace(RECIPE, symmetric=symmetric)
    w, _ = problem(6, 24, seed=bits)
    w = w**3 * 50  # long tails: worth clipping
    _, factors = prepared(w, one_each(24, recipe, seed=bits), recipe)
    factor = factors[recipe.stream_of(bits)]
    h = one_each(24, recipe, seed=bits).h[recipe.stream_of(bits)]
    expected = slow_expected(w, h, bits, recipe, factor.order.numpy())
    np.testing.assert_allclose(expected_loss(w, factor, bits, recipe).double().numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"overlap": True},
        {"slicing": "round", "feedback": "mean", "streams": (8,)},
        {"favor": (2,)},
        {"refit_bits": 8},
        {"scale_dtype": "float16"},
    ],
)
def test_what_a_dedicated_run_loses_does_not_depend_on_the_nested_recipe(changes: dict) -> None:
    w, _ = problem(6, 24)
    inputs = same_for_all(problem(6, 24)[1], RECIPE)
    _, factors = prepared(w, inputs, RECIPE)
    ours = expected_loss(w, factors[2], 2, replace(RECIPE, **changes))
    torch.testing.assert_close(ours, expected_loss(w, factors[2], 2, RECIPE), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_expected_loss_is_near_what_gptq_loses(bits: int) -> None:
    """An estimate, but not by an order of magnitude: over rows, within a factor of 2 of a run with the same settings."""
    from matquant import methods

    recipe = Recipe(group_size=8, parent_bits=bits, bits=(bits,), targets={bits: 1.0}, refit_bits=0, sweeps=0)
    w, h = problem(48, 64, seed=bits)
    inputs = same_for_all(h, recipe)
    _, factors = prepared(w, inputs, recipe)
    lost = methods.load("gptq")(w, inputs, recipe).stages["gptq"][bits].sum()
    assert 0.5 < lost / expected_loss(w, factors[bits], bits, recipe).sum() < 2


def test_targets_are_shares_of_the_expected_loss() -> None:
    w, _ = problem(6, 24)
    objective, factors = prepared(w, one_each(24, RECIPE), RECIPE)
    for r, rows in zip(objective.widths, objective.weight, strict=True):
        torch.testing.assert_close(rows, RECIPE.targets[r] / expected_loss(w, factors[RECIPE.stream_of(r)], r, RECIPE))
    bigger, _ = prepared(10 * w, one_each(24, RECIPE), RECIPE)
    torch.testing.assert_close(bigger.weight * 100, objective.weight, rtol=1e-3, atol=0)


def test_raw_weights_are_those_of_the_papers() -> None:
    recipe = replace(RECIPE, normalize=False, targets={8: 100.0, 4: 4.0, 2: 1.0})
    objective, _ = prepared(problem(6, 24)[0], one_each(24, recipe), recipe)
    assert objective.widths == (4, 2, 8) and objective.weight.tolist() == [[4.0] * 6, [1.0] * 6, [100.0] * 6]


@pytest.mark.parametrize("normalize", [True, False])
def test_favoured_widths_weigh_more(normalize: bool) -> None:
    w, inputs = problem(6, 24)[0], one_each(24, RECIPE)
    plain, favoured = (prepared(w, inputs, replace(RECIPE, normalize=normalize, favor=favor))[0] for favor in ((), (4, 2)))
    ratio = favoured.weight / plain.weight
    torch.testing.assert_close(ratio, torch.tensor([FAVOR, 1.0, FAVOR, 1.0])[:, None].expand(4, 6))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_parent_that_is_no_target_has_no_weight(normalize: bool) -> None:
    recipe = replace(RECIPE, targets={4: 1.0}, normalize=normalize)
    objective, _ = prepared(problem(6, 24)[0], one_each(24, recipe), recipe)
    assert objective.widths == (4, 8) and (objective.weight[0] > 0).all() and not objective.weight[1].any()
    importance, weight = objective.by_target(one_each(24, recipe), recipe)
    assert list(importance) == list(weight) == [4]
    torch.testing.assert_close(importance[4], torch.diagonal(one_each(24, recipe).h[4]))


def test_rows_of_zeros_have_finite_weights() -> None:
    w, _ = problem(6, 24)
    w[2] = 0
    for weights in (w, torch.zeros_like(w)):
        objective, _ = prepared(weights, one_each(24, RECIPE), RECIPE)
        assert objective.weight.isfinite().all() and (objective.weight > 0).all()


# --- asymmetric calibration -----------------------------------------------------------------------------------------------


def drifted(seed: int = 0, tokens: int = 120, columns: int = 24) -> tuple[Tensor, dict[int, Tensor]]:
    """(X of the original, X_r of each stream), in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ torch.randn(columns, columns, generator=g, dtype=torch.float64)
    return x, {r: x + size * torch.randn(tokens, columns, generator=g, dtype=torch.float64) for r, size in ((4, 0.3), (3, 0.8), (2, 2.0))}


def moments(x: Tensor, streams: dict[int, Tensor]) -> Inputs:
    cross = {r: ((x - own).T @ own / len(x)).float() for r, own in streams.items()}
    return Inputs({r: (own.T @ own / len(x)).float() for r, own in {0: x, **streams}.items()}, cross)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_asymmetric_goal_is_the_least_squares_solution(act_order: bool) -> None:
    """argmin_V mean ||W x - V x_r||^2 + damping ||V - W||^2, solved from the tokens themselves."""
    x, streams = drifted()
    recipe = replace(RECIPE, asymmetric_calibration=1.0, damping=0.05, act_order=act_order)
    w, _ = problem(5, 24)
    objective, _ = prepared(w, moments(x, streams), recipe)
    for r, goal in zip(objective.widths, objective.goal, strict=True):
        if r == 8:
            assert torch.equal(goal, w)  # the original's stream drifts nowhere
            continue
        ridge = (0.05 * streams[r].square().mean()).sqrt() * torch.eye(24, dtype=torch.float64)
        left = torch.cat([streams[r] / len(x) ** 0.5, ridge])
        right = torch.cat([x @ w.double().T / len(x) ** 0.5, ridge @ w.double().T])
        solution = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(goal.double(), solution, rtol=2e-3, atol=2e-4)
        assert (goal - w).abs().max() > 0.01


def test_a_share_of_the_drift_is_a_share_of_the_way() -> None:
    x, streams = drifted(1)
    w, _ = problem(5, 24)
    none, half, whole = (prepared(w, moments(x, streams), replace(RECIPE, asymmetric_calibration=alpha))[0].goal for alpha in (0.0, 0.5, 1.0))
    for start, middle, end in zip(none, half, whole, strict=True):
        assert torch.equal(start, w)
        torch.testing.assert_close(middle, (start + end) / 2)


@pytest.mark.parametrize("bad", ["h", "cross"])
def test_without_a_factor_the_goal_is_the_weight_itself(bad: str) -> None:
    x, streams = drifted(2)
    inputs = moments(x, streams)
    getattr(inputs, bad)[2][0, 0] = float("inf")
    w, _ = problem(5, 24)
    objective, factors = prepared(w, inputs, replace(RECIPE, asymmetric_calibration=1.0))
    goals = dict(zip(objective.widths, objective.goal, strict=True))
    assert torch.equal(goals[2], w) and not torch.equal(goals[3], w) and factors[2].sound == (bad == "cross")
