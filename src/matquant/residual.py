"""The low planes alone, for the widths above 4 bits: the high planes of every code given, GPTQ and sweeps over what is left.

A code says which cell of the narrow widths a weight lies in; a wide read can reach any place in that cell and none outside. At
wide groups a fifth of all weights end at the border of their cell, and half of the error at 8 bits is theirs. GPTQ feeds such
errors on to columns that meet borders of their own later, and coordinate descent over codes gets stuck where every step of one
parent code is a loss. So the borders are solved for first, with all columns at once and nothing rounded, and GPTQ aims at that:

    x* = argmin (w - x) H (w - x)^T    over    low <= x <= high        what the cell reads as at its first and at its last code
    codes: GPTQ with x* in the place of w, then sweeps towards w (sweeps.py), the fixed planes staying

This is a quadratic program with bounds for each row, all with one H, so ADMM (https://stanford.edu/~boyd/papers/admm_distr_stats.html,
section 5.2) needs one inverse for all rows and a product a step; the penalty is a share of diag H, as H has powers of all sizes:

    v = (w H + (z - u) R) (H + R)^-1,    R = RHO diag H
    z' = clip(v' + u),    u' = u + v' - z',    v' = RELAX v + (1 - RELAX) z

With `overlap` (codes.py) cells reach half a cell past their borders, and 8 bits lose little. A row keeps its codes unless the
wide targets together lose less.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.activations import Inputs
from matquant.columns import choose_codes
from matquant.factor import Factor
from matquant.objective import Objective, build
from matquant.recipe import Recipe
from matquant.sweeps import descend
from matquant.weight import NestedWeight

HIGH = 4  # bits of the high nibble: wider reads have only what lies below to themselves
RHO = 0.3  # from .1 to 1 alike
RELAX = 1.6
STEPS = 20  # within 1e-3 of the minimum on every layer tried (docs/LOG.md)


def fit_residual(
    weight: NestedWeight, w: Float[Tensor, "out in"], inputs: Inputs, factors: Mapping[int, Factor], recipe: Recipe, fixed: int
) -> tuple[NestedWeight, dict[int, Float[Tensor, " out"]]]:
    """(`weight` with its planes from `fixed` on fitted to `w` for the targets wider than `fixed`, or for the parent if there are none;
    row losses of these targets).

    factors: of each stream's H, by the stream's width.
    """
    targets = {r: lam for r, lam in recipe.importance.items() if r > fixed} or {recipe.parent_bits: 1.0}
    recipe = replace(recipe.aiming_at(targets), overlap=weight.grid.overlap)
    used = {recipe.stream_of(r) for r in (*targets, recipe.parent_bits)}
    objective = build(w, inputs, {stream: factors[stream] for stream in used}, recipe, fixed)
    own = [factors[recipe.stream_of(r)] for r in objective.widths]
    fitted = choose_codes(replace(objective, goal=_aims(weight, objective, own, fixed)), own, weight)
    losses = objective.losses(fitted)
    for _ in range(recipe.sweeps):
        fitted, losses = descend(fitted, objective, own[0].order, losses)
    before = objective.losses(weight)
    better = objective.value(losses) < objective.value(before)
    kept = torch.where(better, losses, before)
    found = replace(weight, codes=torch.where(better[:, None], fitted.codes, weight.codes))
    return found, {r: row for r, row in zip(objective.widths, kept, strict=True) if r in targets}


def split(recipe: Recipe) -> tuple[Recipe, int]:
    """(the recipe that the high planes are chosen with, how many of them stay when the residual is fitted; 0 = it is not).

    The parent speaks for all widths above 4 bits where the high planes are chosen: one more would multiply the codes to search and
    its say is small. Papers' settings, without sweeps, stay as they are.
    """
    narrow, wide = [r for r in recipe.targets if r <= HIGH], [r for r in recipe.targets if r > HIGH]
    if not narrow or not wide or not recipe.sweeps or recipe.slicing != "floor" or recipe.feedback == "mean":
        return recipe, 0
    if recipe.parent_bits not in wide:
        return recipe, max(narrow)
    targets = {r: lam for r, lam in recipe.importance.items() if r <= HIGH or r == recipe.parent_bits}
    return recipe.aiming_at(targets), max(narrow)


def _aims(weight: NestedWeight, objective: Objective, factors: list[Factor], fixed: int) -> tuple[Float[Tensor, "out in"], ...]:
    """x* of every width; widths of one stream share that of the first, whose cells are cut finest or nearly so."""
    below = 2 ** (weight.grid.bits - fixed) - 1
    first = replace(weight, codes=weight.codes & (255 - below))
    last = replace(weight, codes=weight.codes | below)
    found: dict[int, Tensor] = {}
    for bits, goal, factor in reversed(list(zip(objective.widths, objective.goal, factors, strict=True))):  # the parent first
        if id(factor) not in found:
            low, high = (end.read(bits).dense() for end in (first, last))
            found[id(factor)] = within(goal, low, high, factor.damped, weight.read(bits).dense())
    return tuple(found[id(factor)] for factor in factors)


def within(
    goal: Float[Tensor, "out in"],
    low: Float[Tensor, "out in"],
    high: Float[Tensor, "out in"],
    h: Float[Tensor, "in in"],
    start: Float[Tensor, "out in"],
) -> Float[Tensor, "out in"]:
    """argmin over low <= x <= high of (goal - x) H (goal - x)^T, row by row."""
    penalty = RHO * torch.diagonal(h)
    inverse = torch.linalg.inv((h + torch.diag(penalty)).double()).float()
    pull = goal @ h
    z, u = start.clamp(low, high), torch.zeros_like(goal)
    for _ in range(STEPS):
        v = ((z - u) * penalty + pull) @ inverse
        v = torch.lerp(z, v, RELAX)
        z = (v + u).clamp(low, high)
        u += v - z
    return z
