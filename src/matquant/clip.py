"""Clip search: the range of each group that costs least over all targets.

    a_g = argmin_a  sum_r lam_r sum_{i in g} h_r,i (w_i - read_r(nearest(w_i; a)))^2            a: how far the range shrinks, and where its zero is

One parent grid serves every width, so the search weighs what 8 bits lose at the clipped ends against what 2 bits gain in the
middle. A width that will get a scale and offset of its own (a refit) is counted as if it had the best ones already, in closed
form; otherwise the search would clip 8 bits to mend what the refit mends for nothing.

While no error has been fed back, the nearest parent code is also the joint minimiser under the parent's reads: the cells of all
widths nest with their borders aligned, so a code moved over a border is further from w at every width. Hence no joint search here.
Range search for a single width: https://arxiv.org/abs/2306.00978, section 3.3 and many before it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import fit_grid, levels, nearest_code, read_rule, slice_codes
from matquant.recipe import Recipe

# Half of the largest weight is already below the best 2-bit range of a Gaussian group of 256 (0.66 of its maximum).
SHRINKS = tuple(1.0 - 0.06 * step for step in range(11))

Search = tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"] | None]


def search_grid(
    w: Float[Tensor, "out in"],
    importance: Mapping[int, Float[Tensor, " in"]],
    lam: Mapping[int, Float[Tensor, " out"]],
    recipe: Recipe,
    shrinks: Sequence[float] = SHRINKS,
) -> Search:
    """Scale (and zero, if asymmetric) of every group, snapped to the storage dtype. importance: h_r. lam: of every row."""
    dtype = getattr(torch, recipe.scale_dtype)
    wg = w.reshape(len(w), recipe.grid.groups(w.shape[1]), -1)
    h = {r: power.reshape(wg.shape[1], -1) for r, power in importance.items()}
    grids = _candidates(wg, recipe, dtype, shrinks)
    scale, zero = next(grids)
    best = joint_cost(wg, h, lam, scale, zero, recipe)
    for s, z in grids:
        cost = joint_cost(wg, h, lam, s, z, recipe)
        better = cost < best
        best, scale = torch.where(better, cost, best), torch.where(better, s, scale)
        if zero is not None and z is not None:
            zero = torch.where(better, z, zero)
    return scale, zero


def _candidates(wg: Float[Tensor, "out groups size"], recipe: Recipe, dtype: torch.dtype, shrinks: Sequence[float]) -> Iterator[Search]:
    shifts = zero_shifts(recipe)
    for shrink in shrinks:
        scale, zero = fit_grid(wg, recipe.grid, dtype, shrink)
        for shift in shifts:
            yield scale, None if zero is None else (zero + shift).clamp(0, recipe.grid.max_code)


def zero_shifts(recipe: Recipe) -> tuple[int, ...]:
    """Where a zero may be put, in codes from where the range has it: 0, and what puts the levels that a target reads around the range's middle.

    Rounded slices reach 192 of 255 at 2 bits, so that nothing stands for the largest weights; floor slices lie in the middle by themselves.
    """
    if recipe.grid.symmetric:
        return (0,)
    reads = (levels(r, recipe.grid, recipe.slicing) for r in recipe.targets if r > recipe.refit_bits)
    return tuple(sorted({0, *(math.floor(float(read[0] + read[-1] - recipe.grid.max_code) / 2) for read in reads)}, reverse=True))


def joint_cost(
    wg: Float[Tensor, "out groups size"],
    h: Mapping[int, Float[Tensor, "groups size"]],
    lam: Mapping[int, Float[Tensor, " out"]],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"] | None,
    recipe: Recipe,
) -> Float[Tensor, "out groups"]:
    """sum_r lam_r sum_i h_r,i (w_i - read_r(nearest(w_i)))^2 of every group."""
    grid = recipe.grid
    t = wg / scale[..., None] + (grid.center if zero is None else zero[..., None])
    q = nearest_code(t, grid)
    cost = torch.zeros_like(scale)
    for bits, power in h.items():
        step, shift = read_rule(bits, grid, recipe.slicing)
        p = slice_codes(q, bits, grid, recipe.slicing).float()
        own = bits <= recipe.refit_bits
        error = _after_best_affine(p, t, power) if own else ((p * step + (shift - t)).square_() * power).sum(-1)
        cost += lam[bits][:, None] * error
    return cost * scale**2


def _after_best_affine(p: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """min over a, b of sum_i h_i (t_i - a p_i - b)^2 of every group: variance of t less what p explains."""
    share = h / h.sum(-1, keepdim=True).clamp(min=1e-30)
    dp = p - (p * share).sum(-1, keepdim=True)
    dt = t - (t * share).sum(-1, keepdim=True)
    weighted = dp * h
    slope = (weighted * dt).sum(-1, keepdim=True) / (weighted * dp).sum(-1, keepdim=True).clamp(min=1e-30)
    return ((dt - slope * dp).square_() * h).sum(-1)
