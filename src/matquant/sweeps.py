"""Coordinate descent over the codes: each in turn takes the value that is best for all widths at once, the others fixed.

With E_r = read_r(q) - W_r and G_r = E_r H_r, moving the code of column j changes

    L = sum_r weight_r E_r H_r E_r^T   by   sum_r weight_r H_r,jj [ (x_r - read_r(q'))^2 - (x_r - read_r(q))^2 ]
    x_r = read_r(q) - G_r,j / H_r,jj                   where width r alone would like to be

so the code chooser finds the exact minimum over all 2^c codes, and L never rises. GPTQ decides each column once, before it knows
what later ones do; a sweep decides again with all others known. (For one width: https://arxiv.org/abs/2309.01885, QuantEase.)

G is kept up to date lazily, a block of columns at a time, as in GPTQ. Within a block, in terms of kernels/turns.py,

    start = read_r(q) - G_r / H_r,jj,   coupling_jk = H_r,jk / H_r,jj,   count_j = H_r,jj,   p_j = how far the read of column j moves
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matquant.codes import slice_codes
from matquant.kernels.turns import Turns, in_turn
from matquant.objective import Objective
from matquant.weight import NestedWeight

BLOCK = 64


def sliced_table(widths: tuple[int, ...], weight: NestedWeight) -> Float[Tensor, "streams codes"]:
    """The sliced code of every parent code at each width."""
    q = torch.arange(weight.grid.max_code + 1, dtype=torch.uint8, device=weight.codes.device)
    return torch.stack([slice_codes(q, r, weight.grid, weight.slicing) for r in widths]).float()


def affine_reads(widths: tuple[int, ...], weight: NestedWeight) -> tuple[Float[Tensor, "streams groups out"], Float[Tensor, "streams groups out"]]:
    """(scale, offset) of each width's read, groups first: a column's numbers lie together."""
    pairs = [weight.affine(r) for r in widths]
    return torch.stack([a.T for a, _ in pairs]).contiguous(), torch.stack([b.T for _, b in pairs]).contiguous()


def sweep(weight: NestedWeight, objective: Objective, order: Int[Tensor, " in"]) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "streams out"]]:
    """(codes after one pass over all columns in the order given, losses of every row with them)."""
    widths, chooser = objective.widths, objective.chooser
    scale, offset = affine_reads(widths, weight)
    table = sliced_table(widths, weight)
    codes = weight.codes.T[order].contiguous()  # [in, out]
    size = weight.codes.shape[1] // weight.scale.shape[1]
    group_of = (order // size).tolist()
    h = [hessian[order][:, order] for hessian in objective.h]
    read = torch.stack([weight.read(r).dense().T[order] for r in widths])  # [streams, in, out]
    error = torch.stack([now - goal.T[order] for now, goal in zip(read, objective.goal, strict=True)])
    gradient = torch.stack([hessian @ e for hessian, e in zip(h, error, strict=True)])
    power = torch.stack([torch.diagonal(hessian) for hessian in h]).clamp(min=1e-30)  # [streams, in]
    counted = objective.weight[:, None] * scale.square()  # [streams, groups, out]
    for start in range(0, len(codes), BLOCK):
        end = min(start + BLOCK, len(codes))
        corner = torch.stack([hessian[start:end, start:end] for hessian in h])
        now, own = read[:, start:end], power[:, start:end, None]
        turns = Turns(
            chooser, now - gradient[:, start:end] / own, corner / own, own[..., 0], torch.ones_like(own[..., 0]), scale, offset, counted,
            table, group_of[start:end], codes[start:end], origin=now,
        )  # fmt: skip
        codes[start:end], moved = in_turn(turns)
        error[:, start:end] += moved
        for r, hessian in enumerate(h):  # columns passed are brought up to date too: the loss wants them
            gradient[r].addmm_(hessian[:, start:end], moved[r])
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous(), (error * gradient).sum(1, dtype=torch.float64)


def descend(
    weight: NestedWeight, objective: Objective, order: Int[Tensor, " in"], losses: Float[Tensor, "streams out"]
) -> tuple[NestedWeight, Float[Tensor, "streams out"]]:
    """(weight, losses) after a sweep; a row that float32 made worse keeps its codes. losses: of every row of `weight` as it comes."""
    codes, moved = sweep(weight, objective, order)
    better = objective.value(moved) < objective.value(losses)  # but for rounding it always is
    return replace(weight, codes=torch.where(better[:, None], codes, weight.codes)), torch.where(better, moved, losses)
