"""The column loop of nested GPTQ (methods/gptq.py has the formulas): every code in turn, each width's error fed on to the columns to come.

Columns are updated lazily, a block at a time: inside a block, column j collects its updates in one product. In terms of kernels/turns.py

    start = W^(r),   coupling_jk = U_kj,   count_j = 1 / U_jj^2,   p_j = err_j = (x_j - read_r(q_j)) / U_jj
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from matquant.codes import fit_grid
from matquant.factor import Factor
from matquant.kernels.turns import Turns, in_turn
from matquant.objective import Objective
from matquant.recipe import Feedback
from matquant.sweeps import affine_reads, sliced_table
from matquant.weight import NestedWeight

BLOCK = 128


def choose_codes(
    objective: Objective, factors: Sequence[Factor], start: NestedWeight, feedback: Feedback = "per-width", static_groups: bool = True
) -> NestedWeight:
    """`start` with new codes, but for the planes that `objective.chooser` holds fixed.

    factors: in the order of `objective.widths`. Unless `static_groups`, scales are fitted anew when their group is reached.
    """
    order, columns = factors[0].order, objective.goal[0].shape[1]
    size = columns // start.scale.shape[1]
    zero = None if start.zero is None else start.zero.clone()
    state = replace(start, scale=start.scale.clone(), zero=zero)
    now = start.codes.T[order].contiguous()  # [in, out], in the order visited
    codes = torch.empty_like(now)
    upper = [factor.upper for factor in factors]
    running = torch.stack([goal.T[order] for goal in objective.goal])  # [streams, in, out]
    counted = [r < start.grid.bits or objective.chooser.parent_counts for r in objective.widths]
    table = sliced_table(objective.widths, state)
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
        pivot = torch.diagonal(corner, dim1=1, dim2=2)  # [streams, block]
        turns = Turns(
            objective.chooser, running[:, begin:end], corner.transpose(1, 2), pivot.square().reciprocal(), -pivot.reciprocal(),
            *reads, objective.weight[:, None] * reads[0].square(), table, groups, now[begin:end],
            shared=counted if feedback == "mean" else None,
        )  # fmt: skip
        codes[begin:end], errors = in_turn(turns)
        for r, u in enumerate(upper):
            running[r, end:] -= u[begin:end, end:].T @ errors[r]
    back = torch.empty_like(codes)
    back[order] = codes
    return replace(state, codes=back.T.contiguous())
