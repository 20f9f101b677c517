"""Clip search: the range of each group that costs least over all targets.

    shrink_g = argmin_a  sum_r lam_r sum_{i in g} h_i (w_i - read_r(nearest(w_i; a)))^2,   h = diag H

One parent grid serves every width, so the search weighs what 8 bits lose at the clipped ends against what 2 bits gain in the
middle. While no error has been fed back, the nearest parent code is also the joint minimiser: the cells of all widths nest with
their borders aligned, so a code moved over a border is further from w at every width. Hence no joint search in here.
Range search for a single width: https://arxiv.org/abs/2306.00978, section 3.3 and many before it.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import Grid, Slicing, fit_grid, nearest_code, read_rule, slice_codes

# Half of the largest weight is already below the best 2-bit range of a Gaussian group of 256 (0.66 of its maximum).
SHRINKS = tuple(1.0 - 0.03 * step for step in range(21))


def search_grid(
    w: Float[Tensor, "out in"],
    importance: Float[Tensor, " in"],
    targets: Mapping[int, float],
    grid: Grid,
    slicing: Slicing,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"] | None]:
    """Scale (and zero, if asymmetric) of every group, snapped to `dtype`. `importance` is diag H, any positive scale."""
    out = w.shape[0]
    wg = w.reshape(out, grid.groups(w.shape[1]), -1)
    h = importance.reshape(wg.shape[1], -1)
    scale, zero = fit_grid(wg, grid, dtype)
    best = joint_cost(wg, h, scale, zero, targets, grid, slicing)
    for shrink in SHRINKS[1:]:
        s, z = fit_grid(wg, grid, dtype, shrink)
        cost = joint_cost(wg, h, s, z, targets, grid, slicing)
        better = cost < best
        best, scale = torch.where(better, cost, best), torch.where(better, s, scale)
        if zero is not None and z is not None:
            zero = torch.where(better, z, zero)
    return scale, zero


def joint_cost(
    wg: Float[Tensor, "out groups size"],
    h: Float[Tensor, "groups size"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"] | None,
    targets: Mapping[int, float],
    grid: Grid,
    slicing: Slicing,
) -> Float[Tensor, "out groups"]:
    """sum_r lam_r sum_i h_i (w_i - read_r(nearest(w_i)))^2 of every group."""
    t = wg / scale[..., None] + (grid.center if zero is None else zero[..., None])
    q = nearest_code(t, grid)
    error = torch.zeros_like(t)
    for bits, lam in targets.items():
        step, shift = read_rule(bits, grid, slicing)
        error += lam * (slice_codes(q, bits, grid, slicing) * step + (shift - t)) ** 2
    return (error * h).sum(-1) * scale**2
