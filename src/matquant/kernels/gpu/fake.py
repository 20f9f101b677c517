"""Fake quantization of matquant.fake by Triton kernels (jit_fake.py): tensors in, tensors out."""

from typing import Any

import torch
import triton
from torch import Tensor

from matquant.codes import Grid, Slicing
from matquant.kernels.fake import constants, whole
from matquant.kernels.gpu import jit_fake

WEIGHTS = 2048  # of one program, about
LONGEST = 2**14  # weights of a group: a program holds a whole one


def read(w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, bits: int, grid: Grid, slicing: Slicing) -> Tensor:
    """w_r, float32 as all that comes in."""
    w, s, z, m, u = whole(w, s, z, m, u)
    out = torch.empty_like(w)
    options, programs = _options(w, s, m, bits, grid, slicing)
    jit_fake.read[programs](w, s, z, m, u, out, s.numel(), w.numel() // s.numel(), **options)
    return out


def gradients(
    w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, g: Tensor, bits: int, grid: Grid, slicing: Slicing, of_weight: bool = True
) -> tuple[Tensor | None, ...]:
    """(dw, ds, dz, dm, du), the last two None without m and u; dw None if it is not wanted."""
    w, s, z, m, u, g = whole(w, s, z, m, u, g)
    dw, (ds, dz) = torch.empty_like(w) if of_weight else None, (torch.empty_like(s) for _ in range(2))
    dm, du = (None, None) if m is None else (torch.empty_like(s), torch.empty_like(s))
    options, programs = _options(w, s, m, bits, grid, slicing)
    jit_fake.gradients[programs](w, s, z, m, u, g, dw, ds, dz, dm, du, s.numel(), w.numel() // s.numel(), **options)
    return dw, ds, dz, dm, du


def _options(w: Tensor, s: Tensor, m: Tensor | None, bits: int, grid: Grid, slicing: Slicing) -> tuple[dict[str, Any], tuple[int]]:
    """(constants of a kernel, how many programs)."""
    padded = triton.next_power_of_2(w.numel() // s.numel())
    groups = max(WEIGHTS // padded, 1)
    own = {name.upper(): value for name, value in constants(bits, grid, slicing).items()}
    own |= {"OWN": m is not None, "GROUPS": groups, "PADDED": padded}
    # a product and a sum rounded once would be other numbers than torch's
    return own | {"enable_fp_fusion": False, "num_warps": min(max(groups * padded // 512, 1), 8)}, (triton.cdiv(s.numel(), groups),)
