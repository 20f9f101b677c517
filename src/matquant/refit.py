"""Refit: scale and zero of one width by closed-form Hessian-weighted least squares, codes fixed.

A row reads as w_r = sum_g a_g p_g + b_g 1_g, with p_g the sliced codes of group g. All groups of a row are fitted at once,
because H couples them:

    min over theta = (a, b)   (w - B theta)^T H (w - B theta) + rho (theta - theta0)^T diag(B^T H B) (theta - theta0)

B = the columns p_g and 1_g, theta0 = what the width reads with now. The ridge rho keeps groups whose codes
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
) -> tuple[NestedWeight, dict[int, Float[Tensor, " out"]]]:
    """(`weight` with a Refit for every width of `widths`, fitted to goal_r under h_r, the inputs' second moments; losses of its rows)."""
    refits: dict[int, Refit] = {}
    losses: dict[int, Tensor] = {}
    for bits in widths:
        rows = [_refit_rows(weight, bits, goal[bits], h[bits], slice(row, row + ROWS)) for row in range(0, len(weight.codes), ROWS)]
        refits[bits] = Refit(torch.cat([fit.scale for fit, _ in rows]), torch.cat([fit.zero for fit, _ in rows]))
        losses[bits] = torch.cat([loss for _, loss in rows])
    return replace(weight, refits={**weight.refits, **refits}), losses


def _refit_rows(weight: NestedWeight, bits: int, goal: Tensor, h: Tensor, rows: slice) -> tuple[Refit, Tensor]:
    """The fit of some rows, and their losses with it.

    E = w - B theta0 is the error of the read as it is. The fit is that of E to the same columns, so that one product E H gives the
    right side of the equations and the loss to beat.
    """
    scale, offset = (part[rows] for part in weight.affine(bits))
    out, groups = scale.shape
    p = slice_codes(weight.codes[rows], bits, weight.grid, weight.slicing).float()
    error = goal[rows] - _dense(p, scale, offset)
    pull = error @ h
    before = (pull * error).sum(1).double()
    middle = (2**bits - 1) / 2
    centred = p - middle
    normal, right = _normal_equations(centred, h, pull, groups)
    ridge = RIDGE * torch.diagonal(normal, dim1=1, dim2=2)
    factor, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge + 1e-30))
    change = torch.cholesky_solve(right[..., None], factor)[..., 0]
    change = torch.where(((failed == 0) & change.isfinite().all(1))[:, None], change, 0.0).float()
    a, b = scale + change[:, :groups], offset + middle * scale + change[:, groups:]
    k, u = snap_refit(a.clamp(min=1e-30), b - middle * a, weight.scale[rows], bits, weight.grid, weight.slicing)
    error = goal[rows] - _dense(p, *refit_affine(weight.scale[rows], k, u, bits, weight.grid, weight.slicing))
    after = ((error @ h) * error).sum(1).double()
    keep = (a > 0).all(1) & (after < before)
    now = _now(weight, bits, rows)
    fit = Refit(torch.where(keep[:, None], k, now.scale), torch.where(keep[:, None], u, now.zero))
    return fit, torch.where(keep, after, before)


def _dense(p: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    out, groups = scale.shape
    return torch.addcmul(offset[..., None], p.reshape(out, groups, -1), scale[..., None]).reshape(out, -1)


def _now(weight: NestedWeight, bits: int, rows: slice) -> Refit:
    """The two bytes that give the read as it is."""
    if bits in weight.refits:
        return Refit(weight.refits[bits].scale[rows], weight.refits[bits].zero[rows])
    unit = 2 ** (8 - weight.grid.bits)
    zero = torch.full_like(weight.scale[rows], weight.grid.center) if weight.zero is None else weight.zero[rows]
    return Refit(torch.full_like(zero, 128, dtype=torch.uint8), (zero.float() * unit).to(torch.uint8))


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
