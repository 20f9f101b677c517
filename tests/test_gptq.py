"""Nested GPTQ against slow, obvious references: plain loops in float64, written from the papers and from nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import damped, one_each, prepared, problem, same_for_all, slow_loss
from torch import Tensor

from matquant import methods
from matquant.activations import Inputs
from matquant.codes import CodeChooser, fit_grid, levels, read_rule, slice_codes
from matquant.columns import choose_codes
from matquant.recipe import Recipe
from matquant.residual import split
from matquant.weight import NestedWeight

PLAIN = Recipe(group_size=8, symmetric=True, clip_search=False, act_order=False, refit_bits=0, scale_dtype="float32", sweeps=0, normalize=False)
MATGPTQ = replace(PLAIN, slicing="round", feedback="mean", static_groups=False, targets={8: 1.0, 4: 1.0, 3: 1.0, 2: 1.0}, streams=(8,))


def classic_gptq(w: Tensor, h: Tensor, bits: int, scale: np.ndarray, zero: np.ndarray, size: int, damping: float, order: np.ndarray) -> np.ndarray:
    """Codes of Frantar et al. 2022, Algorithm 1, without blocks: H^-1 is updated by elimination, one column after another."""
    w = w.double().numpy().copy()
    hd = h.double().numpy() + damping * float(np.mean(np.diag(h.double().numpy()))) * np.eye(len(h))
    inverse = np.linalg.inv(hd[np.ix_(order, order)])
    codes = np.zeros(w.shape, dtype=np.uint8)
    for step, column in enumerate(order):
        g = column // size
        for row in range(len(w)):
            q = min(max(np.floor(w[row, column] / scale[row, g] + zero[row, g] + 0.5), 0), 2**bits - 1)
            codes[row, column] = q
            error = (w[row, column] - scale[row, g] * (q - zero[row, g])) / inverse[step, step]
            for later in range(step, len(order)):
                w[row, order[later]] -= error * inverse[step, later]
        for a in range(step + 1, len(order)):
            for b in range(step + 1, len(order)):
                inverse[a, b] -= inverse[a, step] * inverse[step, b] / inverse[step, step]
    return codes


def nested_gptq(
    w: Tensor, inputs: Inputs, recipe: Recipe, scale: Tensor, zero: np.ndarray, order: np.ndarray, rows: dict[int, np.ndarray] | None = None
) -> np.ndarray:
    """q_j = argmin over all 2^c codes of sum_r weight_r (W^(r)_j - read_r(q))^2 / U_r,jj^2; one Hessian, one running weight, one error per width.

    rows: the weight of every row by width; without it, the recipe's lambdas for all.
    """
    grid, size, s = recipe.grid, recipe.group_size, scale.double().numpy()
    widths = sorted({*recipe.targets, grid.bits}, reverse=True)
    rows = rows or {r: np.full(len(w), lam) for r, lam in recipe.targets.items()}
    upper = {}
    for r in widths:
        dense = damped(inputs.h[recipe.stream_of(r)], recipe).numpy()
        upper[r] = np.linalg.cholesky(np.linalg.inv(dense[np.ix_(order, order)])).T
    running = {r: w.double().numpy().copy() for r in widths}
    q_all = torch.arange(2**grid.bits, dtype=torch.uint8)
    values = {r: slice_codes(q_all, r, grid, recipe.slicing).double().numpy() for r in widths}
    codes = np.zeros(w.shape, dtype=np.uint8)
    for step, column in enumerate(order):
        g = column // size
        for row in range(len(w)):
            reads = {}
            for r in widths:
                rule = read_rule(r, grid, recipe.slicing)
                reads[r] = s[row, g] * (rule.step * values[r] + rule.shift - zero[row, g])
            cost = sum(rows[r][row] * (running[r][row, column] - reads[r]) ** 2 / upper[r][step, step] ** 2 for r in recipe.targets)
            ties = np.flatnonzero(cost <= cost.min() * (1 + 1e-12) + 1e-18)  # among codes the targets cannot tell apart, the parent decides
            q = ties[np.argmin((running[grid.bits][row, column] - reads[grid.bits][ties]) ** 2)]
            codes[row, column] = q
            misses = {r: running[r][row, column] - reads[r][q] for r in widths}
            if recipe.feedback == "mean":
                misses = dict.fromkeys(widths, np.mean([misses[r] for r in recipe.targets]))
            for r in widths:
                for later in range(step, len(order)):
                    running[r][row, order[later]] -= misses[r] / upper[r][step, step] * upper[r][step, later]
    return codes


def fitted(w: Tensor, recipe: Recipe) -> tuple[Tensor, np.ndarray]:
    scale, zero = fit_grid(w.reshape(len(w), -1, recipe.group_size), recipe.grid, getattr(torch, recipe.scale_dtype))
    return scale, np.full(scale.shape, float(recipe.grid.center)) if zero is None else zero.double().numpy()


def orders(h: Tensor, act_order: bool) -> np.ndarray:
    return np.argsort(-np.diag(h.double().numpy()), kind="stable") if act_order else np.arange(len(h))


def run(w: Tensor, inputs: Inputs, recipe: Recipe) -> NestedWeight:
    return methods.load("gptq")(w, inputs, recipe).weight


def same(ours: Tensor, theirs: np.ndarray, allowed: int = 0) -> None:
    different = int((ours.numpy() != theirs).sum())
    assert different <= allowed, f"{different} of {theirs.size} codes differ"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_own_width_as_only_target_is_classic_gptq_code_for_code(normalize: bool, bits: int, act_order: bool, symmetric: bool) -> None:
    recipe = replace(PLAIN, parent_bits=bits, bits=(bits,), targets={bits: 1.0}, act_order=act_order, symmetric=symmetric, normalize=normalize)
    w, h = problem(seed=bits)
    scale, zero = fitted(w, recipe)
    reference = classic_gptq(w, h, bits, scale.double().numpy(), zero, recipe.group_size, recipe.damping, orders(h, act_order))
    same(run(w, same_for_all(h, recipe), recipe).codes, reference)


@pytest.mark.parametrize("slicing", ["floor", "round", "round-overflow"])
def test_8_bit_target_on_8_bit_parent_does_not_depend_on_the_slicing(slicing: str) -> None:
    w, h = problem()
    recipe = replace(PLAIN, targets={8: 1.0}, slicing=slicing)
    scale, zero = fitted(w, recipe)
    same(run(w, same_for_all(h, recipe), recipe).codes, classic_gptq(w, h, 8, scale.double().numpy(), zero, 8, 0.01, orders(h, False)))


@pytest.mark.parametrize("targets", [{8: 100.0, 4: 4.0, 3: 2.0, 2: 1.0}, {2: 1.0}, {6: 1.0, 2: 3.0}, {4: 0.1, 8: 1.0}])
@pytest.mark.parametrize("slicing,overlap", [("floor", False), ("floor", True), ("round", False), ("round-overflow", False)])
def test_nested_equals_the_slow_reference(slicing: str, overlap: bool, targets: dict[int, float]) -> None:
    """Every width on a Hessian of its own."""
    recipe = replace(PLAIN, slicing=slicing, overlap=overlap, targets=targets, streams=(8, 6, 4, 3, 2))
    w, _ = problem(out=6, columns=24, seed=3)
    inputs = one_each(24, recipe, seed=3)
    scale, zero = fitted(w, recipe)
    scale *= 1.037  # or else the largest weight lies exactly between two codes of an overlapping grid
    objective, factors = prepared(w, inputs, recipe)
    empty = NestedWeight(torch.zeros(w.shape, dtype=torch.uint8), scale, None, recipe.grid, recipe.slicing)
    ours = choose_codes(objective, [factors[recipe.stream_of(r)] for r in objective.widths], empty)
    same(ours.codes, nested_gptq(w, inputs, recipe, scale, zero, np.arange(24)))


def test_every_row_has_weights_of_its_own() -> None:
    """As shares of what a run dedicated to the width loses on that row."""
    recipe = replace(PLAIN, normalize=True, symmetric=False, targets={8: 0.02, 3: 0.5, 2: 1.0}, act_order=True)
    w, h = problem(out=8, columns=24, seed=6)
    w[:4] *= torch.logspace(-2, 1, 4)[:, None]
    inputs = one_each(24, recipe, seed=6)
    objective, factors = prepared(w, inputs, recipe)
    rows = {r: weight.double().numpy() for r, weight in zip(objective.widths, objective.weight, strict=True)}
    assert max(rows[2]) / min(rows[2]) > 1e3
    scale, zero = fitted(w, recipe)
    order = factors[2].order.numpy()
    assert (order != np.arange(24)).any()
    reference = nested_gptq(w, inputs, recipe, scale, zero, order, rows)
    same(run(w, inputs, recipe).codes, reference)
    assert (nested_gptq(w, inputs, recipe, scale, zero, order) != reference).any(), "the weights make no difference here"


def test_matgptq_rule_equals_the_slow_reference() -> None:
    recipe = replace(MATGPTQ, static_groups=True)
    w, h = problem(out=6, columns=24, seed=5)
    scale, zero = fitted(w, recipe)
    inputs = same_for_all(h, recipe)
    assert list(inputs.h) == [8], "one stream for all widths"
    same(run(w, inputs, recipe).codes, nested_gptq(w, inputs, recipe, scale, zero, np.arange(24)))


def test_groups_reached_take_their_scale_from_the_updated_weights() -> None:
    w, h = problem(out=6, columns=24, seed=5)
    inputs = same_for_all(h, MATGPTQ)
    late, early = run(w, inputs, MATGPTQ), run(w, inputs, replace(MATGPTQ, static_groups=True))
    assert torch.equal(late.scale[:, 0], early.scale[:, 0])
    assert not torch.equal(late.scale[:, 1:], early.scale[:, 1:])
    # by hand: quantize the first group alone, feed its error forward, fit the second group
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(h, MATGPTQ))).T.float()
    grid = MATGPTQ.grid
    table = torch.stack([levels(r, grid, "round") for r in (4, 3, 2, 8)])
    chooser = CodeChooser.of(MATGPTQ.targets, grid, "round")
    step = torch.tensor([[16.0], [32.0], [64.0], [1.0]])
    x = w.clone()
    for j in range(8):
        t = x[:, j] / late.scale[:, 0] + 128
        q = chooser.choose(t / step, (step**2).expand(4, 6), chooser.tables(t.device))
        miss = (late.scale[:, 0] * (t - table[:, q.int()])).mean(0)
        x -= (miss / upper[j, j])[:, None] * upper[j]
    expected, _ = fit_grid(x[:, 8:16].contiguous(), grid, torch.float32)
    torch.testing.assert_close(late.scale[:, 1], expected)


@pytest.mark.parametrize("columns", [130, 300])
def test_lazy_updates_across_blocks_change_nothing(columns: int) -> None:
    recipe = replace(PLAIN, group_size=-1, targets={4: 1.0, 2: 1.0}, act_order=True)
    w, h = problem(out=2, columns=columns, seed=7)
    scale, zero = fit_grid(w.reshape(2, 1, -1), recipe.grid, torch.float32)
    inputs = same_for_all(h, recipe)
    reference = nested_gptq(w, inputs, replace(recipe, group_size=columns), scale, np.full((2, 1), 128.0), orders(h, True))
    same(run(w, inputs, recipe).codes, reference, allowed=1)  # float32 against float64 near a tie


def test_each_width_pays_for_nesting_by_its_weight() -> None:
    """lam is the knob: raising lam_8 lowers the 8-bit loss and raises the 2-bit one."""
    w, h = problem(out=64, columns=64, seed=9)

    def losses(lam: float) -> tuple[float, float]:
        recipe = replace(PLAIN, targets={8: lam, 2: 1.0})
        weight = run(w, same_for_all(h, recipe), recipe)
        return tuple(slow_loss(w, weight.read(b).dense(), h).sum().item() for b in (8, 2))

    low, high = losses(1.0), losses(1000.0)
    assert high[0] < low[0] / 3 and low[1] < high[1]


def test_feedback_per_width_beats_the_mean_on_the_joint_objective() -> None:
    w, h = problem(out=64, columns=64, seed=11)
    both = replace(MATGPTQ, static_groups=True)

    def joint(recipe: Recipe) -> float:
        weight = run(w, same_for_all(h, recipe), recipe)
        return sum(lam * slow_loss(w, weight.read(r).dense(), h).sum().item() for r, lam in recipe.targets.items())

    assert joint(replace(both, feedback="per-width")) < 0.9 * joint(both)


def test_a_width_is_best_on_its_own_hessian() -> None:
    """Feedback through H_r: the 2-bit loss under H_2 is lower than with another width's Hessian in its place."""
    recipe = replace(PLAIN, targets={2: 1.0}, parent_bits=2, bits=(2,))
    w, _ = problem(out=64, columns=64, seed=12)
    inputs = one_each(64, recipe, seed=12)
    other = same_for_all(one_each(64, recipe, seed=13).h[2], recipe)
    loss = [slow_loss(w, run(w, given, recipe).read(2).dense(), inputs.h[2]).sum().item() for given in (inputs, other)]
    assert loss[0] < 0.8 * loss[1]


# --- after GPTQ -------------------------------------------------------------------------------------------------------

FULL = Recipe(group_size=8)


def test_stages_are_the_losses_on_the_way_and_never_rise() -> None:
    recipe = replace(FULL, targets={8: 0.06, 6: 0.05, 4: 0.25, 3: 0.5, 2: 1.0})  # how much a stage gains depends on these
    w, _ = problem(out=24, columns=32, seed=14)
    inputs = one_each(32, recipe, seed=14)
    chosen = methods.load("gptq")(w, inputs, recipe)
    assert {name: list(stage) for name, stage in chosen.stages.items()} == {
        **{name: [4, 3, 2, 8] for name in ("gptq", "refit", "sweeps")},
        "residual": [4, 3, 2, 8, 6],
    }
    objective, _ = prepared(w, inputs, recipe)
    rows = dict(zip(objective.widths, objective.weight.double(), strict=True))
    value = {name: sum(rows[r] * stage[r] for r in (8, 4, 3, 2)) for name, stage in chosen.stages.items()}
    assert (value["refit"] <= value["gptq"] * (1 + 1e-5)).all() and (value["sweeps"] <= value["refit"] * (1 + 1e-5)).all()
    assert value["sweeps"].sum() < 0.95 * value["refit"].sum() < 0.9 * value["gptq"].sum()
    assert all(torch.equal(chosen.stages["residual"][r], chosen.stages["sweeps"][r]) for r in (4, 3, 2))
    for r in recipe.targets:
        loss = slow_loss(w, chosen.weight.read(r).dense(), damped(inputs.h[recipe.stream_of(r)], recipe))
        torch.testing.assert_close(chosen.stages["residual"][r], loss, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"sweeps": 0}, ["gptq", "refit"]),
        ({"sweeps": 0, "refit_bits": 0}, ["gptq"]),
        ({"sweeps": 1, "refit_bits": 0}, ["gptq", "sweeps", "residual"]),
        ({"sweeps": 1, "targets": {4: 1.0, 2: 1.0}}, ["gptq", "refit", "sweeps"]),
        ({"targets": {8: 1.0}, "sweeps": 0}, ["gptq"]),
    ],
)
def test_only_stages_that_took_place_are_told(changes: dict, names: list[str]) -> None:
    recipe = replace(FULL, **changes)
    w, h = problem(out=3, columns=16)
    chosen = methods.load("gptq")(w, same_for_all(h, recipe), recipe)
    assert list(chosen.stages) == names and sorted([*chosen.stages.values()][-1]) == sorted(recipe.targets)
    told = split(recipe)[0].targets  # by the stages before the residual's
    assert all(sorted(stage) == sorted(told) for name, stage in chosen.stages.items() if name != "residual")


def test_widths_between_the_targets_are_refitted_to_their_own_inputs() -> None:
    """3 bits is offered, not a target: its read is better than the parent's, and codes do not depend on whether it is offered."""
    recipe = replace(FULL, targets={8: 0.02, 4: 0.25, 2: 1.0})
    w, _ = problem(out=24, columns=32, seed=15)
    inputs = one_each(32, recipe, seed=15)
    weight, without = run(w, inputs, recipe), run(w, inputs, replace(recipe, bits=(8, 4, 2)))
    assert sorted(weight.refits) == [2, 3, 4] and sorted(without.refits) == [2, 4] and torch.equal(weight.codes, without.codes)
    h = inputs.h[recipe.stream_of(3)]
    assert slow_loss(w, weight.read(3).dense(), h).sum() < 0.9 * slow_loss(w, without.read(3).dense(), h).sum()


# --- Hessians that give trouble ---------------------------------------------------------------------------------------


def test_dead_inputs_are_rounded_to_nearest_and_leave_the_rest_alone() -> None:
    w, h = problem(columns=32)
    h[5, :] = h[:, 5] = 0
    chosen = methods.load("gptq")(w, same_for_all(h, PLAIN), PLAIN)
    assert chosen.notes == ("1 of 32 inputs are always 0: their weights are rounded to nearest",)
    scale, zero = fitted(w, PLAIN)
    nearest = (w[:, 5] / scale[:, 0] + 128.5).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(chosen.weight.codes[:, 5], nearest)


def test_no_input_at_all_is_rounding_to_nearest() -> None:
    w, h = problem()
    inputs = same_for_all(torch.zeros_like(h), PLAIN)
    assert torch.equal(run(w, inputs, PLAIN).codes, methods.load("minmax")(w, inputs, replace(PLAIN, method="minmax")).weight.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", [PLAIN, FULL, replace(FULL, asymmetric_calibration=1.0)])
def test_a_hessian_that_is_not_finite_is_rounding_to_nearest(recipe: Recipe, bad: float) -> None:
    """In one stream or in all; what remains is finite, and the note is given once."""
    w, h = problem()
    broken = h.clone()
    broken[3, 4] = bad
    for some in ({2}, streams := {0, 4, 3, 2}):
        moments = {stream: broken if stream in some else h for stream in streams}
        cross = {stream: torch.full_like(h, bad) for stream in some} if recipe.asymmetric_calibration else {}
        chosen = methods.load("gptq")(w, Inputs(moments, cross), recipe)
        assert chosen.notes == ("the Hessian is not finite: rounded to nearest",)
        for bits in recipe.bits:
            read = chosen.weight.read(bits).dense()
            assert (read - w).square().sum() < {8: 0.01, 6: 0.01, 4: 0.03, 3: 0.15, 2: 0.5}[bits] * w.square().sum()


def test_choose_codes_keeps_the_scales_it_was_given() -> None:
    w, h = problem()
    recipe = replace(PLAIN, act_order=True)
    scale, _ = fit_grid(w.reshape(12, 4, 8), recipe.grid, torch.float32)
    objective, factors = prepared(w, same_for_all(h, recipe), recipe)
    empty = NestedWeight(torch.zeros(w.shape, dtype=torch.uint8), scale, None, recipe.grid, recipe.slicing)
    weight = choose_codes(objective, [factors[recipe.stream_of(r)] for r in objective.widths], empty)
    assert torch.equal(weight.scale, scale) and not empty.codes.any() and weight.zero is None and weight.codes.shape == w.shape and not weight.refits
