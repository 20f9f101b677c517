"""Nested GPTQ: one error feedback per width, coupled only through the shared code; then sweeps and refits.

Classic GPTQ (https://arxiv.org/abs/2210.17323) chooses the code of column j and moves its error into the columns to come.
With several targets we keep one running weight W^(r) per width, each with the Hessian H_r of its own activations:

    for each column j, in order of descending diag H, groups fixed beforehand:
        q_j   = argmin_q  sum_r weight_r (W^(r)_j - read_r(q))^2 / U_r,jj^2
        err_r = (W^(r)_j - read_r(q_j)) / U_r,jj             U_r = chol(H_r^-1), upper
        W^(r)_{j:} -= err_r U_r,{j,j:}

which greedily and exactly minimises sum_r weight_r loss_r (objective.py); with {c: 1} it is classic GPTQ. MatGPTQ
(https://arxiv.org/abs/2602.03537) keeps one running weight and feeds back the unweighted mean of the errors over r;
`feedback="mean"` is that rule.

Then `sweeps` rounds of: refit the low widths' scales and zeros (refit.py), sweep over the codes (sweeps.py); and a last refit.
Last, the planes below those of the narrow targets are fitted anew for the wide ones (residual.py). None of it ever raises the objective.

A width that is offered but not a target has no running weight; the parent always has one, because its t also breaks ties
(codes.py).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.activations import Inputs
from matquant.clip import Search, search_grid
from matquant.codes import fit_grid
from matquant.columns import choose_codes
from matquant.factor import Factor, factorize_all
from matquant.methods import Chosen
from matquant.objective import Objective, build, refit_interpolated
from matquant.recipe import Recipe
from matquant.refit import refit
from matquant.residual import fit_residual, split
from matquant.sweeps import descend
from matquant.weight import NestedWeight

Losses = Mapping[int, Float[Tensor, " out"]]


def quantize(w: Float[Tensor, "out in"], inputs: Inputs, recipe: Recipe) -> Chosen:
    """Codes for `w` (float32) that minimise the output error of every target on its own `inputs`."""
    factors = factorize_all(inputs.h, recipe.damping, recipe.act_order)
    first, fixed = split(recipe)
    objective = build(w, inputs, factors, first)
    of_stream = [factors[recipe.stream_of(r)] for r in objective.widths]
    weight = choose_codes(objective, of_stream, _empty(w, objective, inputs, first), recipe.feedback, recipe.static_groups)
    weight, stages = improve(weight, objective, factors, first)
    if fixed:
        weight, wide = fit_residual(weight, w, inputs, factors, recipe, fixed)
        stages = {**stages, "residual": {**stages["sweeps"], **wide}}
    weight = refit_interpolated(weight, objective, factors, first)
    notes = dict.fromkeys(note for factor in factors.values() for note in factor.notes)
    return Chosen(weight, tuple(notes), stages)


def _empty(w: Tensor, objective: Objective, inputs: Inputs, recipe: Recipe) -> NestedWeight:
    """A weight with its scales and zeros, and no codes yet."""
    scale, zero = _grid(w, objective, inputs, recipe)
    snapped = scale.to(getattr(torch, recipe.scale_dtype))
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    return NestedWeight(codes, snapped, None if zero is None else zero.to(torch.uint8), recipe.grid, recipe.slicing)


def _grid(w: Tensor, objective: Objective, inputs: Inputs, recipe: Recipe) -> Search:
    if not recipe.clip_search:
        return fit_grid(w.reshape(len(w), recipe.grid.groups(w.shape[1]), -1), recipe.grid, getattr(torch, recipe.scale_dtype))
    return search_grid(w, *objective.by_target(inputs, recipe), recipe)


def improve(weight: NestedWeight, objective: Objective, factors: Mapping[int, Factor], recipe: Recipe) -> tuple[NestedWeight, Mapping[str, Losses]]:
    """(weight after `recipe.sweeps` rounds of refit and sweep and a last refit, row losses of every target after each stage)."""
    order = next(iter(factors.values())).order
    goals, hessians = dict(zip(objective.widths, objective.goal, strict=True)), dict(zip(objective.widths, objective.h, strict=True))
    losses = objective.losses(weight)
    stages = {"gptq": losses}
    fitted = tuple(r for r in recipe.layout.refit_widths if r in goals)
    for round_ in range(recipe.sweeps + 1):
        if fitted:
            weight, new = refit(weight, goals, hessians, fitted)
            losses = torch.stack([new.get(r, row) for r, row in zip(objective.widths, losses, strict=True)])
            stages["refit" if round_ == 0 else "sweeps"] = losses
        if round_ < recipe.sweeps:
            weight, losses = descend(weight, objective, order, losses)
            stages["sweeps"] = losses
    kept = [(r, row) for row, r in enumerate(objective.widths) if r in recipe.targets]
    return weight, {name: {r: table[row] for r, row in kept} for name, table in stages.items()}
