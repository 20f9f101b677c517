"""Grids and arguments of the Triton kernels: tensors in, tensors out, with a configuration that somebody else chose. Imports Triton."""

from typing import Any

import torch
import triton
from torch import Tensor

from matquant.errors import ResourceError
from matquant.kernels.gpu import jit, jit_weight
from matquant.kernels.gpu.layout import TILE, Blocking, Reading
from matquant.kernels.gpu.table import GLUON, Config, mma_runs

KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
REPACK_ROWS = 32  # rows of one program
FUSED = {"enable_fp_fusion": True}  # a product and a sum are one instruction; Triton's default is about to change
ADD_BLOCK = 256  # outputs of one program of add_splits
DENSE_ROWS = 64
MMA_ROWS = 8  # of x, in one instruction
ALIGNED = 16  # bytes of a copy
PDL = (9, 0)  # compute capability from which a kernel may start before the last one ended


def tile_plane(words: Tensor, upper: Tensor, lower: Tensor | None, found: Blocking) -> None:
    """Fill one array of layout.ARRAYS from one plane of a checkpoint, or from two."""
    rows, row_bytes = upper.shape
    grid = (triton.cdiv(rows, REPACK_ROWS), found.tiles)
    jit_weight.tile_plane[grid](
        words, upper, lower, rows, row_bytes, found.groups, found.tiles, PAIR=words.ndim == 4, GROUP=found.group, PADDED=found.padded,
        BLOCK_N=REPACK_ROWS, **FUSED,
    )  # fmt: skip


def _read(of: Reading) -> dict[str, Any]:
    return {
        "BITS": of.bits, "HIGH": of.high, "LOW": of.low, "STEP": of.step, "SHIFT": of.shift, "MIDDLE": of.middle, "UNIT": of.unit,
        "FITTED": of.fitted,
    }  # fmt: skip


def product(
    x: Tensor, planes: list[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, bias: Tensor | None, of: Reading, found: Blocking,
    config: Config,
) -> Tensor:  # fmt: skip
    """x [tokens, in] W_r^T + bias by the kernel that `config` names. planes: those of the width, most significant first."""
    if config.kind == "dense":
        return _by_dense(x, planes, scale, fit, zero, bias, of, found, config)
    (tokens, in_features), out = x.shape, len(scale)
    rows = triton.next_power_of_2(tokens)
    step, least_m = {"gemv": (config.block_k, 1), "mma": (config.warps, MMA_ROWS), "dot": (1, config.least_m)}[config.kind]
    block_m = max(least_m, min(config.block_m, rows))
    if config.kind == "mma":
        x, kernel, own = _mma(x, found, config, min(rows, block_m))
    else:
        kernel, blocks = (jit.gemv, {"BLOCK_K": config.block_k}) if config.kind == "gemv" else (jit.dot, {"KIND": KINDS[x.dtype], "RUN": min(found.apply, config.run)})  # fmt: skip
        own = {"PADDED": found.padded, **blocks, **FUSED, "num_stages": config.stages}
    per_split = triton.cdiv(triton.cdiv(found.tiles, min(config.split_k, found.tiles)), step) * step
    splits = triton.cdiv(found.tiles, per_split)
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    into = y if splits == 1 else torch.empty(splits, tokens, out, dtype=torch.float32, device=x.device)
    kernel[(triton.cdiv(out, config.block_n), splits, triton.cdiv(tokens, block_m))](
        x, into, *planes, *[None] * (5 - len(planes)), scale, fit, zero, bias if splits == 1 else None, tokens, out, in_features, found.groups,
        found.tiles, per_split, **_read(of), GROUP=found.group, APPLY=found.apply, BLOCK_M=block_m, BLOCK_N=config.block_n, PARTIAL=splits > 1,
        STAGES=config.stages, **own, num_warps=config.warps,
    )  # fmt: skip
    if splits > 1:
        jit.add_splits[(triton.cdiv(out, ADD_BLOCK), tokens)](into, y, bias, splits, tokens, out, BLOCK=ADD_BLOCK, **FUSED)
    return y


def _mma(x: Tensor, found: Blocking, config: Config, rows: int) -> tuple[Tensor, Any, dict[str, Any]]:
    """(x where copies can begin, the kernel, what it alone takes). It imports what only Triton for NVIDIA has. rows: of x in a program."""
    in_features = x.shape[1]
    if not mma_runs(x.device, x.dtype, in_features, found.group):
        raise ResourceError(
            f"kernel mma needs an NVIDIA GPU of compute capability 8.0, Triton {GLUON[0]}.{GLUON[1]}, 16-bit inputs, groups of a multiple of 32 and "
            f"a multiple of 8 input channels; got {x.device}, {x.dtype}, groups of {found.group}, {in_features} channels; use kind dot"
        )
    from matquant.kernels.gpu.jit_mma import mma

    whole = in_features % TILE == 0 and found.groups % 16 == 0 and found.tiles % config.warps == 0
    pdl = torch.cuda.get_device_capability(x.device) >= PDL
    own = {"W": config.warps, "BFLOAT": x.dtype == torch.bfloat16, "ROWS": rows, "WHOLE": whole, "PDL": pdl}
    return x.clone() if x.data_ptr() % ALIGNED else x, mma, own | {"launch_pdl": pdl, "maxnreg": config.registers or None}


def dense(w: Tensor, first: int, planes: list[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, of: Reading, found: Blocking) -> None:
    """Fill w [rows, in] with rows of the weight, from row `first` on."""
    rows, in_features = w.shape
    jit_weight.dense[(triton.cdiv(rows, DENSE_ROWS), found.tiles)](
        w, *planes, *[None] * (5 - len(planes)), scale, fit, zero, first, rows, in_features, found.groups, found.tiles, **_read(of),
        GROUP=found.group, PADDED=found.padded, BLOCK_N=DENSE_ROWS, **FUSED,
    )  # fmt: skip


def _by_dense(
    x: Tensor, planes: list[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, bias: Tensor | None, of: Reading, found: Blocking,
    config: Config,
) -> Tensor:  # fmt: skip
    """Through a scratch of `config.rows` rows of the weight (0: all), and the library's product of matrices."""
    out = len(scale)
    rows = min(config.rows or out, out)
    y, scratch = torch.empty(len(x), out, dtype=x.dtype, device=x.device), torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, out, rows):
        part, into = scratch[: min(rows, out - first)], y[:, first : first + rows]
        dense(part, first, planes, scale, fit, zero, of, found)
        if bias is None:
            torch.mm(x, part.T, out=into)
        else:
            torch.addmm(bias[first : first + rows].to(x.dtype), x, part.T, out=into)
    return y
