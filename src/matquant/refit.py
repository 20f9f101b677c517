"""Refit: the read of one width by closed-form Hessian-weighted least squares, codes fixed.

A row reads as w_r = sum_g a_g p_g + b_g 1_g, with p_g the sliced codes of group g. All groups of a row are fitted at once,
because H couples them:

    min over (a, b)   (w - B theta)^T H (w - B theta) + rho (theta - theta0)^T diag(B^T H B) (theta - theta0)

theta = (a, b), B = the columns p_g and 1_g, theta0 = what the parent grid implies. The ridge rho keeps groups whose codes
say little (all equal, or dead inputs) at the parent's values. Codes are centred before the fit, so that a and b are nearly
orthogonal. The fit is then rounded to the two bytes that a checkpoint holds (codes.snap_refit). A row that gets no better by
these, or whose scale would not be positive, keeps the parent's read.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import UNIT, refit_affine, snap_refit
from matquant.weight import AffineWeight, NestedWeight, Refit

RIDGE = 1e-3
ROWS = 256  # rows solved at once: bounds the memory of the [rows, 2 groups, 2 groups] normal matrices


def refit(weight: NestedWeight, w: Float[Tensor, "out in"], h: Float[Tensor, "in in"], widths: tuple[int, ...]) -> NestedWeight:
    """`weight` with a Refit for every width of `widths`, fitted to the original `w` under `h` (inputs' second moments)."""
    target = w @ h  # [out, in]; H is symmetric
    refits = {bits: _refit_width(weight, bits, w, h, target) for bits in widths}
    return replace(weight, refits={**weight.refits, **refits})


def _refit_width(weight: NestedWeight, bits: int, w: Tensor, h: Tensor, target: Tensor) -> Refit:
    rule = (bits, weight.grid, weight.slicing)
    plain = replace(weight, refits={})
    read = plain.read(bits)
    scale, zero = plain_refit(plain)
    for row in range(0, len(w), ROWS):
        rows = slice(row, row + ROWS)
        a, b, good = _fit_rows(read, h, target, rows)
        k, u = snap_refit(a, b, weight.scale[rows], *rule)
        p = read.codes[rows].float()
        before = _loss(p, read.scale[rows], read.offset[rows], w[rows], h)
        after = _loss(p, *refit_affine(weight.scale[rows], k, u, *rule), w[rows], h)
        keep = (good & (after < before))[:, None]
        scale[rows], zero[rows] = torch.where(keep, k, scale[rows]), torch.where(keep, u, zero[rows])
    return Refit(scale, zero)


def plain_refit(weight: NestedWeight) -> tuple[Tensor, Tensor]:
    """The (k, u) [out, groups] that read exactly as the parent grid does."""
    grid, scale = weight.grid, torch.full(weight.scale.shape, UNIT, dtype=torch.uint8, device=weight.scale.device)
    zero = torch.full_like(scale, grid.center) if weight.zero is None else weight.zero
    return scale, zero << (8 - grid.bits)


def _fit_rows(read: AffineWeight, h: Tensor, target: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, offset, which rows are sound) of the float fit; unsound rows keep the parent's read."""
    scale, offset = read.scale[rows], read.offset[rows]
    out, groups = scale.shape
    middle = (2**read.bits - 1) / 2
    p = read.codes[rows].float() - middle
    start = torch.cat([scale, offset + middle * scale], 1)
    normal, right = _normal_equations(p, h, target[rows], groups)
    ridge = RIDGE * torch.diagonal(normal, dim1=1, dim2=2)
    damped = normal + torch.diag_embed(ridge + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(damped)
    theta = torch.cholesky_solve((right + ridge * start)[..., None], factor)[..., 0].float()
    good = (failed == 0) & theta.isfinite().all(1) & (theta[:, :groups] > 0).all(1)
    a, b = torch.where(good[:, None], theta, start).split(groups, 1)
    return a, b - middle * a, good


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
