"""Repair: high planes stay, the joint loss of the wider targets falls, and no allowed code is better where it ends."""

from dataclasses import replace

import pytest
import torch
from problems import one_each, prepared, problem, slow_loss

from matquant.methods.gptq import quantize
from matquant.recipe import Recipe
from matquant.repair import repair
from matquant.weight import NestedWeight

RECIPE = Recipe(group_size=8, method="block")


def moved(fixed: int) -> tuple[NestedWeight, NestedWeight, torch.Tensor]:
    """(GPTQ's codes, the same with some of their first `fixed` planes changed and the codes below at the border, the original)."""
    w, _ = problem(12, 32)
    weight = quantize(w, one_each(32, RECIPE), RECIPE).weight
    size = 2 ** (8 - fixed)
    chance = torch.rand(weight.codes.shape, generator=torch.Generator().manual_seed(1))
    codes = weight.codes.int()
    above = (codes // size + 1) * size  # the first code of the next cell
    return weight, replace(weight, codes=torch.where((chance < 0.1) & (above < 256), above, codes).to(torch.uint8)), w


@pytest.mark.parametrize("fixed", [2, 3])
def test_planes_above_stay_and_the_wider_targets_lose_less(fixed: int) -> None:
    _, spoilt, w = moved(fixed)
    inputs = one_each(32, RECIPE)
    found = repair(spoilt, w, inputs, RECIPE, fixed)
    assert torch.equal(found.codes >> (8 - fixed), spoilt.codes >> (8 - fixed))
    assert not torch.equal(found.codes, spoilt.codes)
    objective, _ = prepared(w, inputs, RECIPE)
    loss = lambda weight: sum(  # noqa: E731
        RECIPE.importance[r] / own.double() * slow_loss(goal, weight.read(r).dense(), h)
        for r, goal, h, own in zip(objective.widths, objective.goal, objective.h, objective.weight.reciprocal() * 1.0, strict=True)
        if r > fixed
    )
    assert (loss(found) <= loss(spoilt) * (1 + 1e-6)).all() and loss(found).sum() < 0.9 * loss(spoilt).sum()
    for r in (r for r in (2, 3) if r <= fixed):
        assert torch.equal(found.read(r).dense(), spoilt.read(r).dense()), "a read that is trained already was touched"


def test_it_ends_where_no_allowed_code_is_better() -> None:
    recipe, fixed = replace(RECIPE, targets={8: 1.0, 4: 0.3}, refit_bits=0, sweeps=30, streams=(8, 4)), 3
    w, _ = problem(3, 16)
    inputs = one_each(16, recipe)
    weight = quantize(w, inputs, replace(recipe, sweeps=0)).weight
    found = repair(weight, w, inputs, recipe, fixed)
    objective, _ = prepared(w, inputs, recipe)

    def value(codes: torch.Tensor) -> torch.Tensor:
        tried = replace(found, codes=codes)
        rows = [slow_loss(goal, tried.read(r).dense(), h) for r, goal, h in zip(objective.widths, objective.goal, objective.h, strict=True)]
        return sum(lam.double() * row for lam, row in zip(objective.weight, rows, strict=True))

    best = value(found.codes)
    for column in range(16):
        for code in range(256):
            tried = found.codes.clone()
            allowed = tried[:, column] >> (8 - fixed) == code >> (8 - fixed)
            tried[:, column] = torch.where(allowed, torch.tensor(code, dtype=torch.uint8), tried[:, column])
            assert (value(tried) >= best * (1 - 1e-6)).all()


def test_an_interpolated_width_gets_a_refit_of_the_new_codes() -> None:
    recipe = replace(RECIPE, targets={8: 0.05, 4: 0.25, 2: 1.0}, streams=(4, 2))
    _, spoilt, w = moved(2)
    found = repair(spoilt, w, one_each(32, recipe), recipe, 2)
    assert not torch.equal(found.refits[3].zero, spoilt.refits[3].zero)
    assert torch.equal(found.refits[2].zero, spoilt.refits[2].zero)


def test_nothing_wider_nothing_done() -> None:
    _, spoilt, w = moved(3)
    recipe = replace(RECIPE, targets={3: 1.0, 2: 1.0})
    assert repair(spoilt, w, one_each(32, recipe), recipe, 3) is spoilt
