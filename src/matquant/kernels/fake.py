"""Fake quantization of matquant.fake on a CPU, one pass over a weight each way (csrc/fake.cpp): tensors in, tensors out."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from matquant.codes import Grid, Slicing, read_rule
from matquant.kernels.cpu import library

WORTH = 2**17  # weights from which another thread pays


class _Fake(ctypes.Structure):
    """mq_fake of csrc/fake.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "size", "max_code", "cut", "half_up", "top", "under")),
        *((name, ctypes.c_float) for name in ("step", "added", "mid")),
        *((name, ctypes.c_void_p) for name in ("w", "scale", "zero", "m", "u")),
    ]


def read(w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, bits: int, grid: Grid, slicing: Slicing) -> Tensor:
    """w_r, float32 as all that comes in; equal to the bit to that of torch, for any number of threads."""
    tensors = whole(w, s, z, m, u)
    out = torch.empty_like(tensors[0])
    library().mq_fake_read(ctypes.byref(_struct(tensors, bits, grid, slicing)), out.data_ptr(), _threads(w))
    return out


def gradients(
    w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, g: Tensor, bits: int, grid: Grid, slicing: Slicing, of_weight: bool = True
) -> tuple[Tensor | None, ...]:
    """(dw, ds, dz, dm, du), the last two None without m and u; dw None if it is not wanted."""
    *tensors, g = whole(w, s, z, m, u, g)
    dw, own = torch.empty_like(tensors[0]) if of_weight else None, m is not None
    parts = [torch.empty_like(tensors[1]) if here else None for here in (True, True, own, own)]
    struct = _struct(tensors, bits, grid, slicing)
    library().mq_fake_gradients(ctypes.byref(struct), g.data_ptr(), _pointer(dw), *(_pointer(part) for part in parts), _threads(w))
    return dw, *parts


def _struct(tensors: Any, bits: int, grid: Grid, slicing: Slicing) -> _Fake:
    """tensors: w, s, z, m and u, which the caller keeps alive."""
    w, s = tensors[:2]
    pointers = dict(zip(("w", "scale", "zero", "m", "u"), map(_pointer, tensors), strict=True))
    return _Fake(groups=s.numel(), size=w.numel() // s.numel(), **constants(bits, grid, slicing), **pointers)


def constants(bits: int, grid: Grid, slicing: Slicing) -> dict[str, Any]:
    """What a kernel slices with, as csrc/fake.h names and explains it."""
    (step, shift), mid = read_rule(bits, grid, slicing), grid.max_code / 2
    cut, top = grid.bits - bits, 2**bits - (slicing == "round")
    under = grid.max_code + 1 - (2 ** (cut - 1) if slicing == "round" and cut else 0)
    codes = {"max_code": grid.max_code, "cut": cut, "half_up": slicing != "floor", "top": top, "under": under}
    return codes | {"step": step, "added": shift - mid, "mid": mid}


def whole(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same, each in one piece of memory."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(w: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), w.numel() // WORTH))
