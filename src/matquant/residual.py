"""The low planes alone: GPTQ for the parent's width with the high nibble of every code fixed.

    e_j = the residual, 0 to 15, whose full-width read 16 b_j .. is nearest to the running weight;  its error is fed on as in GPTQ

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


def fit_residual(weight: NestedWeight, w: Float[Tensor, "out in"], factor: Factor, grid: Grid) -> NestedWeight:
    """`weight` on `grid` (its own, or the same with overlap; floor slicing, 8 bits), its low nibbles fitted to `w` under the Hessian of `factor`."""
    on_grid = replace(weight, grid=grid, refits={r: fit for r, fit in weight.refits.items() if r <= 4})
    scale, offset = (part.T.contiguous() for part in on_grid.affine(grid.bits))
    order, upper = factor.order, factor.upper
    high = (weight.codes >> 4).T[order].float()  # [in, out], in the order visited
    base = high * (8 if grid.overlap else 16)
    running, low = w.T[order].contiguous(), torch.empty_like(high)
    groups = (order // (w.shape[1] // weight.scale.shape[1])).tolist()
    for start in range(0, len(running), BLOCK):
        end = min(start + BLOCK, len(running))
        errors = torch.zeros_like(running[start:end])
        for j in range(start, end):
            g, done = groups[j], j - start
            x = running[j] - upper[start:j, j] @ errors[:done]
            low[j] = ((x - offset[g]) / scale[g] - base[j] + 0.5).floor().clamp(0, 15)
            errors[done] = (x - torch.addcmul(offset[g], base[j] + low[j], scale[g])) / upper[j, j]
        running[end:] -= upper[start:end, end:].T @ errors
    codes = torch.empty_like(weight.codes.T)
    codes[order] = (16 * high + low).to(torch.uint8)
    return replace(on_grid, codes=codes.T.contiguous())
