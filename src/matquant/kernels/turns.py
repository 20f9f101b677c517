"""Codes of a block of columns, one column after another: what the column loop of GPTQ (columns.py) and a sweep (sweeps.py) share.

Of each stream, for column j of a block, with k the columns before it:

    x_j = start_j - sum_k coupling_jk p_k                                  where the width would like to be
    q_j = argmin_q  sum_r weight_r count_rj ((x_j - offset_r) / scale_r - sliced_r(q))^2
    p_j = factor_j (read_r(q_j) - origin_j),     origin_j = x_j if none is given

`in_turn_reference` says what this means, and is what runs on a GPU; on a CPU a column has too few rows for a call of torch to pay for itself,
and the loop runs in C++ (csrc/turns.cpp), rows in vectors, threads sharing them.
"""

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matquant.codes import CodeChooser
from matquant.kernels.cpu import available, library
from matquant.threads import for_steps_of

WORTH = 2**20  # operations from which another thread pays: some 50 us of one core


@dataclass(frozen=True)
class Turns:
    """A block of columns; float32. Streams are those of `chooser`.

    now: codes as they are, of which the planes that `chooser` holds fixed stay. groups: the group of each column.
    scale, offset: of the reads. weight: of each row's loss. table: the sliced code of every code.
    shared: which streams' p is averaged, before the factor, into what all get; None: each has its own.
    """

    chooser: CodeChooser
    start: Float[Tensor, "streams columns out"]
    coupling: Float[Tensor, "streams columns columns"]
    count: Float[Tensor, "streams columns"]
    factor: Float[Tensor, "streams columns"]
    scale: Float[Tensor, "streams groups out"]
    offset: Float[Tensor, "streams groups out"]
    weight: Float[Tensor, "streams groups out"]
    table: Float[Tensor, "streams codes"]
    groups: list[int]
    now: UInt8[Tensor, "columns out"]
    origin: Float[Tensor, "streams columns out"] | None = None
    shared: list[bool] | None = None


Found = tuple[UInt8[Tensor, "columns out"], Float[Tensor, "streams columns out"]]


def in_turn(turns: Turns) -> Found:
    """(codes, p)."""
    return in_turn_native(turns) if turns.start.device.type == "cpu" and available() else in_turn_reference(turns)


def in_turn_reference(turns: Turns) -> Found:
    """The same, column by column in torch."""
    chooser, start = turns.chooser, turns.start
    tables = chooser.tables(start.device)
    passed, codes = torch.zeros_like(start), torch.empty_like(turns.now)
    with for_steps_of(start.shape[2] * chooser.candidates):
        for j, g in enumerate(turns.groups):
            x, scale, offset = start[:, j], turns.scale[:, g], turns.offset[:, g]
            if j:
                x = x - torch.bmm(turns.coupling[:, j : j + 1, :j], passed[:, :j])[:, 0]
            q = chooser.choose((x - offset) / scale, turns.weight[:, g] * turns.count[:, j, None], tables, turns.now[j])
            miss = torch.addcmul(offset, turns.table[:, q.int()], scale) - (x if turns.origin is None else turns.origin[:, j])
            if turns.shared is not None:
                miss = miss[torch.tensor(turns.shared, device=miss.device)].mean(0, keepdim=True)
            passed[:, j] = miss * turns.factor[:, j, None]
            codes[j] = q
    return codes, passed


class _Turns(ctypes.Structure):
    """mq_turns of csrc/turns.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("streams", "columns", "rows", "groups")),
        ("start", ctypes.c_void_p), ("start_stride", ctypes.c_int64), ("origin", ctypes.c_void_p), ("origin_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("coupling", "count", "factor", "scale", "offset", "weight", "group", "table")),
        ("codes", ctypes.c_int64), ("below", ctypes.c_void_p), ("base", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("prefixes", "residuals", "last_counts", "choices")),
        *((name, ctypes.c_void_p) for name in ("shared", "now", "chosen", "passed")),
    ]  # fmt: skip


def in_turn_native(turns: Turns, threads: int | None = None) -> Found:
    """The same in C++. Equal to the bit for any number of threads; to the reference but for rounding. Tensors are on the CPU."""
    chooser, tables = turns.chooser, turns.chooser.tables(torch.device("cpu"))
    streams, columns, rows = turns.start.shape
    group = torch.tensor(turns.groups)
    shared = None if turns.shared is None else torch.tensor(turns.shared, dtype=torch.uint8)
    start, origin = _columns(turns.start), None if turns.origin is None else _columns(turns.origin)
    flat = {
        name: getattr(turns, name).contiguous() for name in ("coupling", "count", "factor", "scale", "offset", "weight", "table", "now")
    } | {"below": tables.below.contiguous(), "base": tables.base.contiguous()}  # fmt: skip
    codes, passed = torch.empty_like(flat["now"]), torch.empty(turns.start.shape)
    struct = _Turns(
        streams=streams, columns=columns, rows=rows, groups=turns.scale.shape[1], start=start.data_ptr(), start_stride=start.stride(0),
        origin=None if origin is None else origin.data_ptr(), origin_stride=0 if origin is None else origin.stride(0), group=group.data_ptr(),
        codes=turns.table.shape[1], prefixes=len(tables.base), residuals=tables.residuals, last_counts=chooser.parent_counts,
        choices=chooser.candidates, shared=None if shared is None else shared.data_ptr(), chosen=codes.data_ptr(), passed=passed.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in flat.items()},
    )  # fmt: skip
    work = turns.start.numel() * (2 * chooser.candidates + columns // 2)
    worth = max(1, min(torch.get_num_threads(), work // WORTH))
    failed = library().mq_choose_in_turn(ctypes.byref(struct), threads or worth)
    assert not failed, f"mq_choose_in_turn returned {failed}"
    return codes, passed


def _columns(tensor: Tensor) -> Tensor:
    """The same, each stream's columns one after another in memory."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()
