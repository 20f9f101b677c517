"""Repair: the high planes of every code given, the planes below are chosen anew for the wider targets.

    sweeps over the codes (sweeps.py), each allowed the codes that share its first `fixed` planes, and refits (refit.py), in turn

Training moves high planes far from where the wider widths want them (refine.py); neighbours make up for it. Every step lowers
sum_r weight_r loss_r of the widths from `fixed` + 1 bits up, or changes nothing.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from matquant.activations import Inputs
from matquant.factor import factorize_all
from matquant.objective import build, refit_interpolated
from matquant.recipe import Recipe
from matquant.refit import refit
from matquant.sweeps import descend
from matquant.weight import NestedWeight


def repair(weight: NestedWeight, w: Float[Tensor, "out in"], inputs: Inputs, recipe: Recipe, fixed: int) -> NestedWeight:
    """`weight` with its planes from `fixed` on fitted to `w` for the targets wider than `fixed`, and their refits with them."""
    targets = {r: lam for r, lam in recipe.importance.items() if r > fixed}
    if not targets:
        return weight
    offered = tuple(r for r in recipe.bits if r in targets or r not in recipe.targets)  # the others' reads are trained already
    recipe = replace(recipe.aiming_at(targets), bits=offered, overlap=weight.grid.overlap)
    factors = factorize_all(inputs.h, recipe.damping, recipe.act_order)
    objective = build(w, inputs, factors, recipe, fixed)
    goals, hessians = dict(zip(objective.widths, objective.goal, strict=True)), dict(zip(objective.widths, objective.h, strict=True))
    fitted = tuple(r for r in recipe.layout.refit_widths if r in targets)
    for _ in range(max(recipe.sweeps, 1)):
        weight, _ = descend(weight, objective, next(iter(factors.values())).order, objective.losses(weight))
        weight, _ = refit(weight, goals, hessians, fitted)
    return refit_interpolated(weight, objective, factors, recipe)
