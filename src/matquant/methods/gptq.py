"""Nested GPTQ: one error feedback per width, coupled only through the shared code.

Classic GPTQ (https://arxiv.org/abs/2210.17323) chooses the code of column j and moves its error into the columns to come.
With several targets we keep one running weight W^(r) per width:

    for each column j, in order of descending diag H, groups fixed beforehand:
        q_j   = argmin_q  sum_r lam_r (W^(r)_j - read_r(q))^2
        err_r = (W^(r)_j - read_r(q_j)) / U_jj              U = chol(H^-1), upper
        W^(r)_{j:} -= err_r U_{j,j:}

which greedily and exactly minimises sum_r lam_r loss_r; with {c: 1} it is classic GPTQ. MatGPTQ (https://arxiv.org/abs/2602.03537)
keeps one running weight and feeds back the unweighted mean of the errors over r; `feedback="mean"` is that rule.

A width that is offered but not a target has no stream; the parent always has one, because its t also breaks ties (codes.py).
Columns are updated lazily, a block at a time: inside a block, column j collects its updates in one matrix-vector product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matquant.clip import search_grid
from matquant.codes import CodeChooser, fit_grid, levels
from matquant.methods import Chosen
from matquant.recipe import Recipe
from matquant.weight import NestedWeight

BLOCK = 128
DAMPING_RAISES = (1, 10, 100)  # times the recipe's damping, tried in turn when H^-1 has no Cholesky factor


@dataclass(frozen=True)
class Factor:
    """order: columns in the order they are visited. upper: U = chol(H^-1) in that order. notes: what had to be mended."""

    order: Tensor
    upper: Float[Tensor, "in in"]
    notes: tuple[str, ...]


def factor(h: Float[Tensor, "in in"], damping: float, act_order: bool) -> Factor:
    """Damp, order and factor H. Where no damping helps, U = identity: no feedback, that is, rounding to nearest."""
    notes: list[str] = []
    columns = len(h)
    diagonal = torch.diagonal(h).clone()
    if not h.isfinite().all():
        identity = torch.eye(columns, device=h.device)
        return Factor(torch.arange(columns, device=h.device), identity, ("the Hessian is not finite: rounded to nearest",))
    dead = diagonal <= 0
    if dead.any():
        notes.append(f"{int(dead.sum())} of {columns} inputs are always 0: their weights are rounded to nearest")
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns, device=h.device)
    matrix = h.double()
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), device=h.device)
    matrix[dead, dead] = mean.double()  # such an input has no covariance with any other: it gets and gives no feedback
    matrix = matrix[order][:, order]
    for raise_by in DAMPING_RAISES:
        damped = matrix + torch.eye(columns, dtype=torch.float64, device=h.device) * (damping * raise_by * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            if raise_by > 1:
                notes.append(f"damping raised to {damping * raise_by:g}: the Hessian had no Cholesky factor below")
            return Factor(order, upper.float(), tuple(notes))
    notes.append(f"no Cholesky factor up to damping {damping * DAMPING_RAISES[-1]:g}: rounded to nearest")
    return Factor(order, torch.eye(columns, device=h.device), tuple(notes))


def quantize(w: Float[Tensor, "out in"], h: Float[Tensor, "in in"], recipe: Recipe) -> Chosen:
    """Codes for `w` (float32) that minimise the output error under `h` (second moments of the inputs, float32)."""
    grid, dtype = recipe.grid, getattr(torch, recipe.scale_dtype)
    decomposition = factor(h, recipe.damping, recipe.act_order)
    wg = w.reshape(w.shape[0], grid.groups(w.shape[1]), -1)
    if recipe.clip_search:
        importance = torch.nan_to_num(torch.diagonal(h), nan=1.0, posinf=1.0).clamp(min=1e-12)
        scale, zero = search_grid(w, importance, recipe.targets, grid, recipe.slicing, dtype)
    else:
        scale, zero = fit_grid(wg, grid, dtype)
    codes, scale, zero = choose_codes(w, decomposition, scale, zero, recipe)
    weight = NestedWeight(codes, scale.to(dtype), None if zero is None else zero.to(torch.uint8), grid, recipe.slicing)
    return Chosen(weight, decomposition.notes)


def choose_codes(
    w: Float[Tensor, "out in"],
    decomposition: Factor,
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"] | None,
    recipe: Recipe,
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out groups"], Float[Tensor, "out groups"] | None]:
    """The column loop. Returns codes with the scales and zeros used (renewed on the way unless `static_groups`)."""
    grid, upper = recipe.grid, decomposition.upper
    out, columns = w.shape
    size = columns // scale.shape[1]
    chooser = CodeChooser.of(recipe.targets, grid, recipe.slicing)
    tables = chooser.tables(w.device)
    table = torch.stack([levels(r, grid, recipe.slicing) for r in chooser.streams]).to(w.device)
    counted = torch.tensor([r in recipe.targets for r in chooser.streams], device=w.device)
    streams = len(table) if recipe.feedback == "per-width" else 1
    running = w.T[decomposition.order][:, None].repeat(1, streams, 1)  # [in, streams, out], in processing order
    codes = torch.empty(columns, out, dtype=torch.uint8, device=w.device)
    scale, zero = scale.T.contiguous(), None if zero is None else zero.T.contiguous()  # [groups, out]
    group_of = (decomposition.order // size).tolist()
    block = BLOCK if recipe.static_groups else size
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if not recipe.static_groups:
            fresh, fresh_zero = fit_grid(running[start:end, 0].T.contiguous(), grid, getattr(torch, recipe.scale_dtype))
            scale[start // size] = fresh
            if zero is not None and fresh_zero is not None:
                zero[start // size] = fresh_zero
        errors = torch.zeros(end - start, streams, out, device=w.device)
        for j in range(start, end):
            done = j - start
            x = running[j] - torch.mv(errors[:done].reshape(done, -1).T, upper[start:j, j]).reshape(streams, out) if done else running[j]
            s = scale[group_of[j]]
            z = grid.center if zero is None else zero[group_of[j]]
            t = x / s + z
            q = chooser.choose(t.expand(len(table), -1), tables)
            miss = s * (t - table[:, q.int()])
            if recipe.feedback == "mean":
                miss = miss[counted].mean(0, keepdim=True)
            errors[done] = miss / upper[j, j]
            codes[j] = q
        running[end:] -= torch.mm(upper[start:end, end:].T, errors.reshape(end - start, -1)).reshape(-1, streams, out)
    back = torch.empty_like(codes)
    back[decomposition.order] = codes
    return back.T.contiguous(), scale.T.contiguous(), None if zero is None else zero.T.contiguous()
