"""Refit: scale and zero of one width by closed-form Hessian-weighted least squares, codes fixed.

A row reads as w_r = sum_g a_g p_g + b_g 1_g, with p_g the sliced codes of group g. All groups of a row are fitted at once,
because H couples them:

    min over (a, b)   (w - B theta)^T H (w - B theta) + rho (theta - theta0)^T diag(B^T H B) (theta - theta0)

theta = (a, b), B = the columns p_g and 1_g, theta0 = what the width reads with now. The ridge rho keeps groups whose codes
say little (all equal, or dead inputs) at these values. Codes are centred before the fit, so that a and b are nearly
orthogonal. The fit is then rounded to the two bytes that a checkpoint stores (codes.py); a row that gets no better by that, or
whose scale would not be positive, keeps the read that it has. So a refit never raises a loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import refit_affine, slice_codes, snap_refit
from matquant.weight import NestedWeight, Refit

RIDGE = 1e-3
ROWS = 256  # rows solved at once: bounds the memory of the [rows, 2 groups, 2 groups] normal matrices


def refit(
    weight: NestedWeight, goal: Mapping[int, Float[Tensor, "out in"]], h: Mapping[int, Float[Tensor, "in in"]], widths: Sequence[int]
) -> NestedWeight:
    """`weight` with a Refit for every width of `widths`, fitted to goal_r under h_r (inputs' second moments)."""
    refits = {bits: _refit_width(weight, bits, goal[bits], h[bits]) for bits in widths}
    return replace(weight, refits={**weight.refits, **refits})


def _refit_width(weight: NestedWeight, bits: int, goal: Tensor, h: Tensor) -> Refit:
    right = goal @ h  # [out, in]; H is symmetric
    parts = [_refit_rows(weight, bits, goal, right, h, slice(row, row + ROWS)) for row in range(0, len(goal), ROWS)]
    return Refit(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def _refit_rows(weight: NestedWeight, bits: int, goal: Tensor, target: Tensor, h: Tensor, rows: slice) -> Refit:
    scale, offset = (part[rows] for part in weight.affine(bits))
    groups = scale.shape[1]
    middle = (2**bits - 1) / 2
    p = slice_codes(weight.codes[rows], bits, weight.grid, weight.slicing).float() - middle
    start = torch.cat([scale, offset + middle * scale], 1)
    normal, right = _normal_equations(p, h, target[rows], groups)
    ridge = RIDGE * torch.diagonal(normal, dim1=1, dim2=2)
    damped = normal + torch.diag_embed(ridge + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(damped)
    theta = torch.cholesky_solve((right + ridge * start)[..., None], factor)[..., 0]
    good = (failed == 0) & theta.isfinite().all(1) & (theta[:, :groups] > 0).all(1)
    a, b = torch.where(good[:, None], theta, start.double()).float().split(groups, 1)
    grid, slicing = weight.grid, weight.slicing
    parent = weight.scale[rows]
    k, u = snap_refit(a, b - middle * a, parent, bits, grid, slicing)
    snapped, shift = refit_affine(parent, k, u, bits, grid, slicing)
    now_k, now_u = _now(weight, bits, rows)
    losses = _loss(p, snapped, shift + middle * snapped, goal[rows], h), _loss(p, scale, offset + middle * scale, goal[rows], h)
    keep = (good & (losses[0] < losses[1]))[:, None]
    return Refit(torch.where(keep, k, now_k), torch.where(keep, u, now_u))


def _now(weight: NestedWeight, bits: int, rows: slice) -> tuple[Tensor, Tensor]:
    """The two bytes that give the read as it is."""
    if bits in weight.refits:
        return weight.refits[bits].scale[rows], weight.refits[bits].zero[rows]
    unit = 2 ** (8 - weight.grid.bits)
    zero = torch.full_like(weight.scale[rows], weight.grid.center) if weight.zero is None else weight.zero[rows]
    return torch.full_like(zero, 128, dtype=torch.uint8), (zero.float() * unit).to(torch.uint8)


def _normal_equations(p: Tensor, h: Tensor, target: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(B^T H B [out, 2 groups, 2 groups], B^T H w [out, 2 groups]) in float64, B = the columns p_g and 1_g."""
    out, columns = p.shape
    size = columns // groups
    normal = torch.empty(out, 2 * groups, 2 * groups, dtype=torch.float64, device=p.device)
    ones = h.reshape(groups, size, groups, size).sum((1, 3), dtype=torch.float64)
    normal[:, groups:, groups:] = ones
    for g in range(groups):
        members = slice(g * size, (g + 1) * size)
        t = p[:, members] @ h[members]  # row o: p_g^T H
        normal[:, g, :groups] = (t * p).reshape(out, groups, size).sum(-1)
        normal[:, g, groups:] = t.reshape(out, groups, size).sum(-1)
        normal[:, groups:, g] = normal[:, g, groups:]
    split = target.reshape(out, groups, size)
    right = torch.cat([(split * p.reshape(out, groups, size)).sum(-1), split.sum(-1)], 1).double()
    return (normal + normal.transpose(1, 2)) / 2, right


def _loss(p: Tensor, scale: Tensor, offset: Tensor, w: Tensor, h: Tensor) -> Tensor:
    out, groups = scale.shape
    error = w - (p.reshape(out, groups, -1) * scale[..., None] + offset[..., None]).reshape(out, -1)
    return ((error @ h) * error).sum(1)
