"""Nested GPTQ against slow, obvious references: plain loops in float64, written from the papers and from nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import make_grid
from torch import Tensor

from matquant import methods
from matquant.codes import CodeChooser, fit_grid, levels, read_rule, slice_codes
from matquant.methods.gptq import choose_codes, factor
from matquant.recipe import Recipe
from matquant.weight import NestedWeight

PLAIN = Recipe(group_size=8, symmetric=True, clip_search=False, act_order=False, refit_bits=0, scale_dtype="float32")
MATGPTQ = replace(PLAIN, slicing="round", feedback="mean", static_groups=False, targets={8: 1.0, 4: 1.0, 3: 1.0, 2: 1.0})


def problem(out: int = 12, columns: int = 32, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(weights, Hessian) with strongly correlated inputs of very different power."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) * 0.4 + torch.diag(torch.rand(columns, generator=g) * 2 + 0.1)
    x = torch.randn(rank or 400, columns, generator=g) @ mix
    return torch.randn(out, columns, generator=g) * 0.1, x.T @ x / len(x)


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


def nested_gptq(w: Tensor, h: Tensor, recipe: Recipe, scale: Tensor, zero: np.ndarray, order: np.ndarray) -> np.ndarray:
    """design: q_j = argmin over all 2^c codes of sum_r lam_r (W^(r)_j - read_r(q))^2; one error, fed back, per width."""
    grid, size, s = recipe.grid, recipe.group_size, scale.double().numpy()
    hd = h.double().numpy() + recipe.damping * float(np.mean(np.diag(h.double().numpy()))) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(hd[np.ix_(order, order)])).T
    streams = sorted({*recipe.targets, grid.bits}, reverse=True)
    running = {r: w.double().numpy().copy() for r in streams}
    q_all = torch.arange(2**grid.bits, dtype=torch.uint8)
    values = {r: slice_codes(q_all, r, grid, recipe.slicing).double().numpy() for r in streams}
    codes = np.zeros(w.shape, dtype=np.uint8)
    for step, column in enumerate(order):
        g = column // size
        for row in range(len(w)):
            reads = {}
            for r in streams:
                rule = read_rule(r, grid, recipe.slicing)
                reads[r] = s[row, g] * (rule.step * values[r] + rule.shift - zero[row, g])
            cost = sum(lam * (running[r][row, column] - reads[r]) ** 2 for r, lam in recipe.targets.items())
            ties = np.flatnonzero(cost <= cost.min() * (1 + 1e-12) + 1e-18)  # among codes the targets cannot tell apart, the parent decides
            q = ties[np.argmin((running[grid.bits][row, column] - reads[grid.bits][ties]) ** 2)]
            codes[row, column] = q
            misses = {r: running[r][row, column] - reads[r][q] for r in streams}
            if recipe.feedback == "mean":
                misses = dict.fromkeys(streams, np.mean([misses[r] for r in recipe.targets]))
            for r in streams:
                for later in range(step, len(order)):
                    running[r][row, order[later]] -= misses[r] / upper[step, step] * upper[step, later]
    return codes


def fitted(w: Tensor, recipe: Recipe) -> tuple[Tensor, np.ndarray]:
    scale, zero = fit_grid(w.reshape(len(w), -1, recipe.group_size), recipe.grid, getattr(torch, recipe.scale_dtype))
    return scale, np.full(scale.shape, float(recipe.grid.center)) if zero is None else zero.double().numpy()


def orders(h: Tensor, act_order: bool) -> np.ndarray:
    return np.argsort(-np.diag(h.double().numpy()), kind="stable") if act_order else np.arange(len(h))


def same(ours: Tensor, theirs: np.ndarray, allowed: int = 0) -> None:
    different = int((ours.numpy() != theirs).sum())
    assert different <= allowed, f"{different} of {theirs.size} codes differ"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_own_width_as_only_target_is_classic_gptq_code_for_code(bits: int, act_order: bool, symmetric: bool) -> None:
    recipe = replace(PLAIN, parent_bits=bits, bits=(bits,), targets={bits: 1.0}, act_order=act_order, symmetric=symmetric)
    w, h = problem(seed=bits)
    scale, zero = fitted(w, recipe)
    reference = classic_gptq(w, h, bits, scale.double().numpy(), zero, recipe.group_size, recipe.damping, orders(h, act_order))
    same(methods.load("gptq")(w, h, recipe).weight.codes, reference)


@pytest.mark.parametrize("slicing", ["floor", "round", "round-overflow"])
def test_8_bit_target_on_8_bit_parent_does_not_depend_on_the_slicing(slicing: str) -> None:
    w, h = problem()
    recipe = replace(PLAIN, targets={8: 1.0}, slicing=slicing)
    scale, zero = fitted(w, recipe)
    same(methods.load("gptq")(w, h, recipe).weight.codes, classic_gptq(w, h, 8, scale.double().numpy(), zero, 8, 0.01, orders(h, False)))


@pytest.mark.parametrize("targets", [{8: 100.0, 4: 4.0, 3: 2.0, 2: 1.0}, {2: 1.0}, {6: 1.0, 2: 3.0}, {4: 0.1, 8: 1.0}])
@pytest.mark.parametrize("slicing,overlap", [("floor", False), ("floor", True), ("round", False), ("round-overflow", False)])
def test_nested_equals_the_slow_reference(slicing: str, overlap: bool, targets: dict[int, float]) -> None:
    recipe = replace(PLAIN, slicing=slicing, overlap=overlap, targets=targets, act_order=True)
    w, h = problem(out=6, columns=24, seed=3)
    scale, zero = fitted(w, recipe)
    scale *= 1.037  # or else the largest weight lies exactly between two codes of an overlapping grid
    reference = nested_gptq(w, h, recipe, scale, zero, orders(h, True))
    same(choose_codes(w, factor(h, recipe.damping, True), scale, None, recipe)[0], reference)


def test_matgptq_rule_equals_the_slow_reference() -> None:
    recipe = replace(MATGPTQ, static_groups=True)
    w, h = problem(out=6, columns=24, seed=5)
    scale, zero = fitted(w, recipe)
    same(methods.load("gptq")(w, h, recipe).weight.codes, nested_gptq(w, h, recipe, scale, zero, np.arange(24)))


def test_groups_reached_take_their_scale_from_the_updated_weights() -> None:
    w, h = problem(out=6, columns=24, seed=5)
    late = methods.load("gptq")(w, h, MATGPTQ).weight
    early = methods.load("gptq")(w, h, replace(MATGPTQ, static_groups=True)).weight
    assert torch.equal(late.scale[:, 0], early.scale[:, 0])
    assert not torch.equal(late.scale[:, 1:], early.scale[:, 1:])
    # by hand: quantize the first group alone, feed its error forward, fit the second group
    upper = factor(h, MATGPTQ.damping, False).upper
    grid = MATGPTQ.grid
    table = torch.stack([levels(r, grid, "round") for r in (4, 3, 2, 8)])
    chooser = CodeChooser.of(MATGPTQ.targets, grid, "round")
    x = w.clone()
    for j in range(8):
        t = x[:, j] / late.scale[:, 0] + 128
        q = chooser.choose(t.expand(4, -1), chooser.tables(t.device))
        miss = (late.scale[:, 0] * (t - table[:, q.int()])).mean(0)
        x -= (miss / upper[j, j])[:, None] * upper[j]
    expected, _ = fit_grid(x[:, 8:16].contiguous(), grid, torch.float32)
    torch.testing.assert_close(late.scale[:, 1], expected)


@pytest.mark.parametrize("columns", [130, 300])
def test_lazy_updates_across_blocks_change_nothing(columns: int) -> None:
    recipe = replace(PLAIN, group_size=-1, targets={4: 1.0, 2: 1.0}, act_order=True)
    w, h = problem(out=2, columns=columns, seed=7)
    scale, zero = fit_grid(w.reshape(2, 1, -1), recipe.grid, torch.float32)
    reference = nested_gptq(w, h, replace(recipe, group_size=columns), scale, np.full((2, 1), 128.0), orders(h, True))
    same(methods.load("gptq")(w, h, recipe).weight.codes, reference, allowed=1)  # float32 against float64 near a tie


def test_each_width_pays_for_nesting_by_its_weight() -> None:
    """lam is the knob: raising lam_8 lowers the 8-bit loss and raises the 2-bit one."""
    w, h = problem(out=64, columns=64, seed=9)

    def losses(lam: float) -> tuple[float, float]:
        weight = methods.load("gptq")(w, h, replace(PLAIN, targets={8: lam, 2: 1.0})).weight
        return tuple((((w - weight.read(b).dense()) @ h) * (w - weight.read(b).dense())).sum().item() for b in (8, 2))

    low, high = losses(1.0), losses(1000.0)
    assert high[0] < low[0] / 3 and low[1] < high[1]


def test_feedback_per_width_beats_the_mean_on_the_joint_objective() -> None:
    w, h = problem(out=64, columns=64, seed=11)
    both = replace(MATGPTQ, static_groups=True)

    def joint(recipe: Recipe) -> float:
        weight = methods.load("gptq")(w, h, recipe).weight
        return sum(lam * (((w - weight.read(r).dense()) @ h) * (w - weight.read(r).dense())).sum().item() for r, lam in recipe.targets.items())

    assert joint(replace(both, feedback="per-width")) < 0.9 * joint(both)


# --- Hessians that give trouble ---------------------------------------------------------------------------------------


def test_dead_inputs_are_rounded_to_nearest_and_leave_the_rest_alone() -> None:
    w, h = problem(columns=32)
    dead = h.clone()
    dead[5, :] = dead[:, 5] = 0
    chosen = methods.load("gptq")(w, dead, PLAIN)
    assert chosen.notes == ("1 of 32 inputs are always 0: their weights are rounded to nearest",)
    scale, zero = fitted(w, PLAIN)
    nearest = (w[:, 5] / scale[:, 0] + 128.5).floor().clamp(0, 255).to(torch.uint8)
    assert torch.equal(chosen.weight.codes[:, 5], nearest)


def test_no_input_at_all_is_rounding_to_nearest() -> None:
    w, h = problem()
    ours = methods.load("gptq")(w, torch.zeros_like(h), PLAIN).weight
    assert torch.equal(ours.codes, methods.load("minmax")(w, h, replace(PLAIN, method="minmax")).weight.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_rounding_to_nearest(bad: float) -> None:
    w, h = problem()
    h[3, 4] = bad
    chosen = methods.load("gptq")(w, h, replace(PLAIN, clip_search=True, act_order=True))
    assert chosen.notes == ("the Hessian is not finite: rounded to nearest",)
    assert chosen.weight.read(2).dense().isfinite().all()


def test_damping_is_raised_until_there_is_a_factor() -> None:
    _, h = problem(columns=16)
    shifted = h - torch.eye(16) * (torch.linalg.eigvalsh(h)[0] + 0.05 * torch.diagonal(h).mean())  # smallest eigenvalue: -5 % of the mean
    decomposition = factor(shifted, 0.01, False)
    assert decomposition.notes == ("damping raised to 0.1: the Hessian had no Cholesky factor below",)
    mean = torch.diagonal(shifted).double().mean()
    expected = np.linalg.cholesky(np.linalg.inv((shifted.double() + 0.1 * mean * torch.eye(16)).numpy())).T
    torch.testing.assert_close(decomposition.upper, torch.tensor(expected).float(), rtol=1e-3, atol=1e-4)


def test_a_hopeless_hessian_is_rounding_to_nearest() -> None:
    h = torch.diag(torch.tensor([1.0] * 8)) - 50 * torch.ones(8, 8).fill_diagonal_(0)
    decomposition = factor(h, 0.01, False)
    assert torch.equal(decomposition.upper, torch.eye(8))
    assert decomposition.notes == ("no Cholesky factor up to damping 1: rounded to nearest",)


def test_choose_codes_keeps_the_scales_it_was_given() -> None:
    w, h = problem()
    scale, _ = fit_grid(w.reshape(12, 4, 8), make_grid(8, 8), torch.float32)
    codes, kept, zero = choose_codes(w, factor(h, 0.01, True), scale, None, replace(PLAIN, act_order=True))
    assert torch.equal(kept, scale) and zero is None and codes.shape == w.shape
    NestedWeight(codes, kept, zero, PLAIN.grid, "floor")
