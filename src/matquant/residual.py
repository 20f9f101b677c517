"""The low planes alone: GPTQ for the parent's width with the high nibble of every code fixed.

    e_j = the residual, 0 to 15, whose full-width read is nearest to the running weight; its error is fed on as in GPTQ

and then coordinate descent over the residuals (sweeps.py tells how; here one width has a say, so that the nearest is the best).

Training moves the high nibble far from the original weight; the residual then wins back what its cell allows. With `overlap`
(codes.py) cells reach half a cell past their borders, and 8 bits lose little.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import Grid
from matquant.factor import Factor
from matquant.weight import NestedWeight

BLOCK = 128


def fit_residual(weight: NestedWeight, w: Float[Tensor, "out in"], factor: Factor, grid: Grid, sweeps: int) -> NestedWeight:
    """`weight` on `grid` (its own, or the same with overlap; floor slicing, 8 bits), its low nibbles fitted to `w` under the Hessian of `factor`."""
    on_grid = replace(weight, grid=grid, refits={r: fit for r, fit in weight.refits.items() if r <= 4})
    scale, offset = (part.T.contiguous() for part in on_grid.affine(grid.bits))
    order = factor.order
    groups = order // (w.shape[1] // weight.scale.shape[1])
    high = (weight.codes >> 4).T[order].float()  # [in, out], in the order visited
    base = torch.addcmul(offset[groups], high * (8 if grid.overlap else 16), scale[groups])  # what residual 0 reads as
    scale, goal = scale[groups], w.T[order].contiguous()
    low = _gptq(goal, base, scale, factor.upper)
    h = factor.damped[order][:, order]
    for _ in range(sweeps):
        low = _sweep(low, goal, base, scale, h)
    codes = torch.empty_like(weight.codes.T)
    codes[order] = (16 * high + low).to(torch.uint8)
    return replace(on_grid, codes=codes.T.contiguous())


def _nearest(x: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    return ((x - base) / scale + 0.5).floor().clamp(0, 15)


def _gptq(goal: Tensor, base: Tensor, scale: Tensor, upper: Tensor) -> Tensor:
    """Residuals [in, out], by error feedback."""
    running, low = goal.clone(), torch.empty_like(goal)
    for start in range(0, len(goal), BLOCK):
        end = min(start + BLOCK, len(goal))
        errors = torch.zeros_like(running[start:end])
        for j in range(start, end):
            done = j - start
            x = running[j] - upper[start:j, j] @ errors[:done]
            low[j] = _nearest(x, base[j], scale[j])
            errors[done] = (x - torch.addcmul(base[j], low[j], scale[j])) / upper[j, j]
        running[end:] -= upper[start:end, end:].T @ errors
    return low


def _sweep(low: Tensor, goal: Tensor, base: Tensor, scale: Tensor, h: Tensor) -> Tensor:
    """Residuals after one pass of coordinate descent."""
    low = low.clone()
    read = torch.addcmul(base, low, scale)
    gradient = h @ (read - goal)
    for start in range(0, len(goal), BLOCK):
        end = min(start + BLOCK, len(goal))
        moved = torch.zeros_like(read[start:end])
        for j in range(start, end):
            done = j - start
            slope = gradient[j] + h[j, start:j] @ moved[:done]
            low[j] = _nearest(read[j] - slope / h[j, j].clamp(min=1e-30), base[j], scale[j])
            moved[done] = torch.addcmul(base[j], low[j], scale[j]) - read[j]
        gradient[end:] += h[end:, start:end] @ moved
    return low
