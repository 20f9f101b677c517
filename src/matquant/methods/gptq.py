"""Nested GPTQ: one error feedback per width, coupled only through the shared code; then sweeps and refits.

Classic GPTQ (https://arxiv.org/abs/2210.17323) chooses the code of column j and moves its error into the columns to come.
With several targets we keep one running weight W^(r) per width, each with the Hessian H_r of its own activations:

    for each column j, in order of descending diag H, groups fixed beforehand:
        q_j   = argmin_q  sum_r weight_r (W^(r)_j - read_r(q))^2 / U_r,jj^2
        err_r = (W^(r)_j - read_r(q_j)) / U_r,jj             U_r = chol(H_r^-1), upper
        W^(r)_{j:} -= err_r U_r,{j,j:}

which greedily and exactly minimises sum_r weight_r loss_r (objective.py); with {c: 1} it is classic GPTQ. MatGPTQ
(https://arxiv.org/abs/2602.03537) keeps one running weight and feeds back the unweighted mean of the errors over r;
`feedback="mean"` is that rule.

Then `sweeps` rounds of: refit the low widths' scales and zeros (refit.py), sweep over the codes (sweeps.py); and a last refit.
Neither ever raises the objective.

A width that is offered but not a target has no running weight; the parent always has one, because its t also breaks ties
(codes.py). Columns are updated lazily, a block at a time: inside a block, column j collects its updates in one product.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matquant.activations import Inputs
from matquant.clip import Search, search_grid
from matquant.codes import fit_grid
from matquant.factor import Factor, factorize, visiting_order
from matquant.methods import Chosen
from matquant.objective import Objective, build, refit_interpolated
from matquant.recipe import Recipe
from matquant.refit import refit
from matquant.sweeps import affine_reads, descend, sliced_table
from matquant.threads import for_steps_of
from matquant.weight import NestedWeight

BLOCK = 128


def quantize(w: Float[Tensor, "out in"], inputs: Inputs, recipe: Recipe) -> Chosen:
    """Codes for `w` (float32) that minimise the output error of every target on its own `inputs`."""
    order = visiting_order(inputs.h.values(), recipe.act_order)
    factors = {stream: factorize(h, recipe.damping, order) for stream, h in inputs.h.items()}
    objective = build(w, inputs, factors, recipe)
    scale, zero = _grid(w, objective, inputs, recipe)
    of_stream = [factors[recipe.stream_of(r)] for r in objective.widths]
    weight = choose_codes(objective, of_stream, scale, zero, recipe)
    weight, stages = improve(weight, objective, factors, recipe)
    notes = dict.fromkeys(note for factor in factors.values() for note in factor.notes)
    return Chosen(weight, tuple(notes), stages)


def _grid(w: Tensor, objective: Objective, inputs: Inputs, recipe: Recipe) -> Search:
    if not recipe.clip_search:
        return fit_grid(w.reshape(len(w), recipe.grid.groups(w.shape[1]), -1), recipe.grid, getattr(torch, recipe.scale_dtype))
    return search_grid(w, *objective.by_target(inputs, recipe), recipe)


def improve(
    weight: NestedWeight, objective: Objective, factors: Mapping[int, Factor], recipe: Recipe
) -> tuple[NestedWeight, Mapping[str, Mapping[int, Float[Tensor, " out"]]]]:
    """(weight after `recipe.sweeps` rounds of refit and sweep and a last refit, row losses of every target after each stage)."""
    order = next(iter(factors.values())).order
    goals, hessians = dict(zip(objective.widths, objective.goal, strict=True)), dict(zip(objective.widths, objective.h, strict=True))
    losses = objective.losses(weight)
    stages = {"gptq": losses}
    fitted = tuple(r for r in recipe.layout.refit_widths if r in goals)
    for round_ in range(recipe.sweeps + 1):
        if fitted:
            weight, new = refit(weight, goals, hessians, fitted)
            losses = torch.stack([new.get(r, row) for r, row in zip(objective.widths, losses, strict=True)])
            stages["refit" if round_ == 0 else "sweeps"] = losses
        if round_ < recipe.sweeps:
            weight, losses = descend(weight, objective, order, losses)
            stages["sweeps"] = losses
    weight = refit_interpolated(weight, objective, factors, recipe)
    kept = [(r, row) for row, r in enumerate(objective.widths) if r in recipe.targets]
    return weight, {name: {r: table[row] for r, row in kept} for name, table in stages.items()}


def choose_codes(
    objective: Objective,
    factors: list[Factor],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"] | None,
    recipe: Recipe,
) -> NestedWeight:
    """The column loop. factors: in the order of `objective.widths`. Scales are renewed on the way unless `static_groups`."""
    dtype, order = getattr(torch, recipe.scale_dtype), factors[0].order
    out, columns = objective.goal[0].shape
    size = columns // scale.shape[1]
    codes = torch.empty(columns, out, dtype=torch.uint8, device=scale.device)
    state = NestedWeight(
        codes.T,
        scale.to(dtype).clone(),
        None if zero is None else zero.to(torch.uint8).clone(),
        recipe.grid,
        recipe.slicing,
        planes=recipe.parent_bits,
    )
    upper = [factor.upper for factor in factors]
    running = torch.stack([goal.T[order] for goal in objective.goal])  # [streams, in, out], in the order visited
    block = BLOCK if recipe.static_groups else size
    reads = affine_reads(objective.widths, state)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if not recipe.static_groups:
            s, z = fit_grid(running[0, start:end].T.contiguous(), recipe.grid, dtype)
            state.scale[:, start // size] = s.to(dtype)
            if state.zero is not None and z is not None:
                state.zero[:, start // size] = z.to(torch.uint8)
            reads = affine_reads(objective.widths, state)
        groups = (order[start:end] // size).tolist()
        corner = torch.stack([u[start:end, start:end] for u in upper])
        with for_steps_of(out * 2**objective.chooser.prefix_bits):
            codes[start:end], errors = _block(running[:, start:end], corner, reads, groups, objective, state, recipe.feedback == "mean")
        for r, u in enumerate(upper):
            running[r, end:] -= u[start:end, end:].T @ errors[r]
    back = torch.empty_like(codes)
    back[order] = codes
    return replace(state, codes=back.T.contiguous())


def _block(
    running: Float[Tensor, "streams block out"],
    upper: Float[Tensor, "streams block block"],
    reads: tuple[Float[Tensor, "streams groups out"], Float[Tensor, "streams groups out"]],
    groups: list[int],
    objective: Objective,
    state: NestedWeight,
    mean: bool,
) -> tuple[UInt8[Tensor, "block out"], Float[Tensor, "streams block out"]]:
    """(codes of a block of columns, err_r of each)."""
    chooser, (scale, offset) = objective.chooser, reads
    prefixes, table = chooser.tables(running.device), sliced_table(objective.widths, state)
    counted = objective.weight[:, None] * scale.square()
    targets = torch.tensor([r < state.grid.bits or chooser.parent_counts for r in objective.widths], device=running.device)
    errors = torch.zeros_like(running)
    codes = torch.empty(running.shape[1:], dtype=torch.uint8, device=running.device)
    for j, g in enumerate(groups):
        x = running[:, j]
        if j:
            x = x - torch.bmm(upper[:, :j, j : j + 1].transpose(1, 2), errors[:, :j])[:, 0]
        pivot = upper[:, j, j, None]
        q = chooser.choose((x - offset[:, g]) / scale[:, g], counted[:, g] / pivot.square(), prefixes)
        miss = x - torch.addcmul(offset[:, g], table[:, q.int()], scale[:, g])
        if mean:
            miss = miss[targets].mean(0, keepdim=True)
        errors[:, j] = miss / pivot
        codes[j] = q
    return codes, errors
