"""Sweeps against coordinate descent that tries every code and computes the whole objective anew, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import one_each, prepared, problem, slow_loss
from torch import Tensor

from matquant import sweeps
from matquant.codes import slice_codes
from matquant.methods import minmax
from matquant.objective import Objective
from matquant.recipe import Recipe
from matquant.refit import refit
from matquant.sweeps import sweep
from matquant.weight import NestedWeight

RECIPE = Recipe(group_size=8, scale_dtype="float32", clip_search=False, refit_bits=0)


def start(recipe: Recipe, out: int = 4, columns: int = 24, seed: int = 0, refitted: tuple[int, ...] = ()) -> tuple[NestedWeight, Objective]:
    """Weights rounded to nearest, every stream with a Hessian of its own; some widths with a read of their own."""
    w, _ = problem(out, columns, seed)
    inputs = one_each(columns, recipe, seed)
    objective, _ = prepared(w, inputs, recipe)
    weight = minmax.quantize(w, inputs, replace(recipe, method="minmax")).weight
    h = {r: one for r, one in zip(objective.widths, objective.h, strict=True)}
    return refit(weight, dict.fromkeys(refitted, w), h, refitted)[0], objective


def value(weight: NestedWeight, objective: Objective) -> Tensor:
    """The objective of every row, in float64 from the codes alone."""
    parts = zip(objective.widths, objective.weight, objective.goal, objective.h, strict=True)
    return sum(weights.double() * slow_loss(goal, weight.read(r).dense(), h) for r, weights, goal, h in parts)  # type: ignore[return-value]


class Slow:
    """All reads of one row as tables [codes, groups] in float64, and its whole objective."""

    def __init__(self, weight: NestedWeight, objective: Objective, row: int) -> None:
        self.size = weight.codes.shape[1] // weight.scale.shape[1]
        codes = torch.arange(weight.grid.max_code + 1, dtype=torch.uint8)
        self.table, self.parts = {}, []
        for i, r in enumerate(objective.widths):
            scale, offset = (part[row].double().numpy() for part in weight.affine(r))
            self.table[r] = slice_codes(codes, r, weight.grid, weight.slicing).double().numpy()[:, None] * scale + offset
            self.parts.append((r, objective.weight[i, row].item(), objective.goal[i][row].double().numpy(), objective.h[i].double().numpy()))

    def values(self, codes: np.ndarray) -> np.ndarray:
        """Of many rows of codes at once: [many, columns] -> [many]."""
        total = np.zeros(len(codes))
        for r, weight, goal, h in self.parts:
            error = self.table[r][codes, np.arange(codes.shape[1]) // self.size] - goal
            total += weight * np.einsum("ni,ij,nj->n", error, h, error)
        return total

    def sweep(self, codes: np.ndarray, order: list[int]) -> np.ndarray:
        for column in order:
            trials = np.repeat(codes[None], len(next(iter(self.table.values()))), 0)
            trials[:, column] = np.arange(len(trials))
            codes = trials[self.values(trials).argmin()]
        return codes


@pytest.mark.parametrize("refitted", [(), (4, 3, 2)])
@pytest.mark.parametrize("slicing, overlap", [("floor", False), ("floor", True), ("round", False), ("round-overflow", False)])
def test_a_sweep_is_coordinate_descent_over_all_codes(slicing: str, overlap: bool, refitted: tuple[int, ...]) -> None:
    recipe = replace(RECIPE, slicing=slicing, overlap=overlap)
    weight, objective = start(recipe, seed=1, refitted=refitted)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    codes, losses = sweep(weight, objective, order)
    assert (codes != weight.codes).float().mean() > 0.05, "nothing to do"
    for row in range(4):
        expected = Slow(weight, objective, row).sweep(weight.codes[row].numpy().astype(int), order.tolist())
        assert codes[row].tolist() == expected.tolist()
    for r, row_losses, goal, h in zip(objective.widths, losses, objective.goal, objective.h, strict=True):
        torch.testing.assert_close(row_losses, slow_loss(goal, replace(weight, codes=codes).read(r).dense(), h), rtol=1e-4, atol=1e-9)


def test_a_parent_that_is_no_target_takes_no_part() -> None:
    """It only breaks ties: the targets read what coordinate descent without it makes them read."""
    weight, objective = start(replace(RECIPE, targets={4: 0.5, 2: 1.0}), seed=3)
    assert objective.widths == (4, 2, 8) and not objective.weight[2].any()
    codes, _ = sweep(weight, objective, torch.arange(24))
    for row in range(4):
        expected = Slow(weight, objective, row).sweep(weight.codes[row].numpy().astype(int), list(range(24)))
        assert (codes[row] >> 4).tolist() == (expected >> 4).tolist()


recipes = st.builds(
    lambda rule, targets, symmetric, normalize: replace(
        RECIPE, slicing=rule[0], overlap=rule[1], targets=targets, symmetric=symmetric, normalize=normalize
    ),
    st.sampled_from([("floor", False), ("floor", True), ("round", False), ("round-overflow", False)]),
    st.dictionaries(st.integers(2, 8), st.sampled_from([0.02, 0.5, 1.0, 100.0]), min_size=1),
    st.booleans(),
    st.booleans(),
)


@given(recipes, st.integers(0, 999), st.sets(st.integers(2, 8), max_size=2), st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_row_ever_gets_worse(recipe: Recipe, seed: int, refitted: set[int], natural: bool) -> None:
    weight, objective = start(recipe, out=6, seed=seed, refitted=tuple(refitted & set(recipe.targets)))
    order = torch.arange(24) if natural else torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    before = value(weight, objective)
    for _ in range(3):
        codes, losses = sweep(weight, objective, order)
        weight = replace(weight, codes=codes)
        after = value(weight, objective)
        assert (after <= before * (1 + 1e-5) + 1e-12).all()
        torch.testing.assert_close(objective.value(losses), after, rtol=1e-3, atol=1e-9)
        before = after


def test_sweeps_end_where_no_single_code_can_be_bettered() -> None:
    weight, objective = start(RECIPE, out=2, seed=5)
    for _ in range(50):
        codes, _ = sweep(weight, objective, torch.arange(24))
        if torch.equal(codes, weight.codes):
            break
        weight = replace(weight, codes=codes)
    else:
        raise AssertionError("still moving after 50 sweeps")
    for row in range(2):
        now = codes[row].numpy().astype(int)
        slow = Slow(weight, objective, row)
        assert slow.values(slow.sweep(now, list(range(24)))[None])[0] >= slow.values(now[None])[0] * (1 - 1e-6)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_lazy_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, objective = start(RECIPE, columns=152, seed=7)
    order = torch.randperm(152, generator=torch.Generator().manual_seed(8))
    codes, losses = sweep(weight, objective, order)
    monkeypatch.setattr(sweeps, "BLOCK", block)
    others, other_losses = sweep(weight, objective, order)
    assert (codes != others).sum() <= 1  # float32 sums in another order, near a tie
    torch.testing.assert_close(losses, other_losses, rtol=1e-3, atol=1e-9)


def test_rows_do_not_interact() -> None:
    weight, objective = start(RECIPE, seed=9)
    codes, _ = sweep(weight, objective, torch.arange(24))
    alone = replace(weight, codes=weight.codes[1:2], scale=weight.scale[1:2], zero=None if weight.zero is None else weight.zero[1:2])
    one = replace(objective, goal=tuple(goal[1:2] for goal in objective.goal), weight=objective.weight[:, 1:2])
    assert torch.equal(sweep(alone, one, torch.arange(24))[0], codes[1:2])


def test_dead_inputs_stay_finite() -> None:
    weight, objective = start(RECIPE, seed=10)
    for h in objective.h:
        h[3, :] = h[:, 3] = 0
    codes, losses = sweep(weight, objective, torch.arange(24))
    assert losses.isfinite().all() and (value(replace(weight, codes=codes), objective) <= value(weight, objective) * (1 + 1e-5)).all()
