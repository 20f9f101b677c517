"""The column loop of nested GPTQ (methods/gptq.py has the formulas): every code in turn, each width's error fed on to the columns to come.

Columns are updated lazily, a block at a time: inside a block, column j collects its updates in one product.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matquant.codes import fit_grid
from matquant.factor import Factor
from matquant.objective import Objective
from matquant.recipe import Feedback
from matquant.sweeps import affine_reads, sliced_table
from matquant.threads import for_steps_of
from matquant.weight import NestedWeight

BLOCK = 128


def choose_codes(
    objective: Objective, factors: Sequence[Factor], start: NestedWeight, feedback: Feedback = "per-width", static_groups: bool = True
) -> NestedWeight:
    """`start` with new codes, but for the planes that `objective.chooser` holds fixed.

    factors: in the order of `objective.widths`. Unless `static_groups`, scales are fitted anew when their group is reached.
    """
    order, out, columns = factors[0].order, *objective.goal[0].shape
    size = columns // start.scale.shape[1]
    zero = None if start.zero is None else start.zero.clone()
    state = replace(start, scale=start.scale.clone(), zero=zero)
    now = start.codes.T[order].contiguous()  # [in, out], in the order visited
    codes = torch.empty_like(now)
    upper = [factor.upper for factor in factors]
    running = torch.stack([goal.T[order] for goal in objective.goal])  # [streams, in, out]
    block = BLOCK if static_groups else size
    reads = affine_reads(objective.widths, state)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        if not static_groups:
            s, z = fit_grid(running[0, begin:end].T.contiguous(), state.grid, state.scale.dtype)
            state.scale[:, begin // size] = s.to(state.scale.dtype)
            if state.zero is not None and z is not None:
                state.zero[:, begin // size] = z.to(torch.uint8)
            reads = affine_reads(objective.widths, state)
        groups = (order[begin:end] // size).tolist()
        corner = torch.stack([u[begin:end, begin:end] for u in upper])
        with for_steps_of(out * objective.chooser.candidates):
            codes[begin:end], errors = _block(running[:, begin:end], corner, reads, groups, now[begin:end], objective, state, feedback == "mean")
        for r, u in enumerate(upper):
            running[r, end:] -= u[begin:end, end:].T @ errors[r]
    back = torch.empty_like(codes)
    back[order] = codes
    return replace(state, codes=back.T.contiguous())


def _block(
    running: Float[Tensor, "streams block out"],
    upper: Float[Tensor, "streams block block"],
    reads: tuple[Float[Tensor, "streams groups out"], Float[Tensor, "streams groups out"]],
    groups: list[int],
    now: UInt8[Tensor, "block out"],
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
    codes = torch.empty_like(now)
    for j, g in enumerate(groups):
        x = running[:, j]
        if j:
            x = x - torch.bmm(upper[:, :j, j : j + 1].transpose(1, 2), errors[:, :j])[:, 0]
        pivot = upper[:, j, j, None]
        q = chooser.choose((x - offset[:, g]) / scale[:, g], counted[:, g] / pivot.square(), prefixes, now[j])
        miss = x - torch.addcmul(offset[:, g], table[:, q.int()], scale[:, g])
        if mean:
            miss = miss[targets].mean(0, keepdim=True)
        errors[:, j] = miss / pivot
        codes[j] = q
    return codes, errors
