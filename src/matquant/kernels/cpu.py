"""x @ W_r^T on a CPU, from planes in memory, reading those of r bits and no others (csrc/layout.h has the layout and the arithmetic).

A weight is packed once for the widths that are to be served; the width is an argument of every product. Inputs are rounded to 8 bits in blocks
of 64 channels, sums are integers inside a block; `exact` multiplies floats instead. The library is plain C, loaded here; nothing in it
depends on the version of torch.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.errors import InputError, MissingPlanesError, ResourceError, choices
from matquant.weight import NestedWeight

ISAS = ("avx512", "avx2", "neon", "scalar")
ALIGNED = 64  # bytes, of every array


class _Weight(ctypes.Structure):
    """mq_weight of csrc/layout.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out", "in_features", "group", "groups", "padded", "tiles", "lanes", "parent_bits", "overlap")),
        ("pair", ctypes.c_void_p * 4),
        ("single", ctypes.c_void_p * 2),
        ("scale", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("zero", ctypes.c_void_p),
        ("k", ctypes.c_void_p * 9),
        ("u", ctypes.c_void_p * 9),
    ]  # fmt: skip


@cache
def library() -> Any:
    """The compiled kernels. Raises ResourceError where they were not built."""
    found = sorted(Path(__file__).parent.glob("libmatquant.*"))
    if not found:
        raise ResourceError("matquant's CPU kernels were not built; reinstall matquant where a C++ compiler is at hand")
    loaded = ctypes.CDLL(str(found[0]))
    loaded.mq_lanes.restype, loaded.mq_lanes.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    loaded.mq_best_isa.restype = ctypes.c_char_p
    loaded.mq_pack.argtypes = [ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64]
    loaded.mq_pack_rows.argtypes = [ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    loaded.mq_linear.restype = ctypes.c_int
    loaded.mq_linear.argtypes = [
        ctypes.POINTER(_Weight), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p,
    ]  # fmt: skip
    p, n = ctypes.c_void_p, ctypes.c_int64
    loaded.mq_step.restype = ctypes.c_int
    loaded.mq_step.argtypes = [p, p, n, p, p, p, p, p, n, n, n, p, n, p, n, n, ctypes.c_char_p]
    loaded.mq_choose_in_turn.restype, loaded.mq_choose_in_turn.argtypes = ctypes.c_int, [p, n]
    loaded.mq_fake_read.restype, loaded.mq_fake_read.argtypes = None, [p, p, n]
    loaded.mq_fake_gradients.restype, loaded.mq_fake_gradients.argtypes = None, [p, p, p, p, p, p, p, n]
    return loaded


def available() -> bool:
    """Whether the kernels were built."""
    try:
        library()
    except ResourceError:
        return False
    return True


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine and this build have, fastest first."""
    return tuple(isa for isa in ISAS if library().mq_lanes(isa.encode()))


@dataclass(frozen=True)
class PackedWeight:
    """One weight as the kernels read it. widths: that can be read. arrays: what `struct` points to.

    shape: (out, in). isa: the instruction set whose tiles these are.
    """

    shape: tuple[int, int]
    widths: tuple[int, ...]
    isa: str
    struct: _Weight
    arrays: dict[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def read_bytes(self, bits: int) -> int:
        """Bytes that one product at `bits` reads of it."""
        own = [name for name in PLANES if PLANES[name] < bits] + ["scale"]
        own += [f"k{bits}", f"u{bits}"] if f"k{bits}" in self.arrays else ["zero"]
        return sum(self.arrays[name].nbytes for name in own if name in self.arrays)


PLANES = {"pair0": 0, "single0": 2, "single1": 3, "pair2": 4, "pair3": 6}  # array -> its first plane


def pack(weight: NestedWeight, widths: Iterable[int], isa: str | None = None, threads: int | None = None) -> PackedWeight:
    """The planes of `weight` that reads at `widths` need, tiled for `isa` (None: the fastest that is here).

    Raises InputError for a slicing other than floor, MissingPlanesError for planes that are not held, ResourceError for an instruction set that
    is not here.
    """
    wanted, chosen = tuple(sorted(set(widths), reverse=True)), isa or isas()[0]
    if weight.slicing != "floor":
        raise InputError(f"CPU kernels read slicing floor, not {weight.slicing}; use the reference kernel")
    if wanted[0] > weight.planes:
        raise MissingPlanesError(
            f"{wanted[0]} bits need planes 0-{wanted[0] - 1}, but only 0-{weight.planes - 1} are here; get the missing plane files"
        )
    lanes = library().mq_lanes(chosen.encode())
    if not lanes:
        raise ResourceError(f"this machine or build has no {chosen}; {choices(chosen, isas())}")
    (out, in_features), groups = weight.codes.shape, weight.scale.shape[1]
    group = in_features // groups
    struct = _Weight(
        out=out, in_features=in_features, group=group, groups=groups, padded=-(-group // 32) * 32, tiles=-(-out // lanes), lanes=lanes,
        parent_bits=weight.grid.bits, overlap=weight.grid.overlap, half=weight.scale.dtype == torch.float16,
    )  # fmt: skip
    chunks = groups * struct.padded // 16
    sizes = {
        name: struct.tiles * chunks * 4 * lanes // (2 if name.startswith("single") else 1) for name, plane in PLANES.items() if plane < wanted[0]
    }
    arrays = {name: _aligned(size, torch.uint8) for name, size in sizes.items()}
    for name, array in arrays.items():
        getattr(struct, name[:-1])[int(name[-1])] = array.data_ptr()
    codes = weight.codes.contiguous()
    library().mq_pack(ctypes.byref(struct), codes.data_ptr(), threads or torch.get_num_threads())

    def add(name: str, rows: Tensor) -> int:
        """Put an [out, groups] tensor into tiles. Returns where it lies."""
        rows = rows.contiguous()
        arrays[name] = _aligned(struct.tiles * groups * lanes, rows.dtype)
        library().mq_pack_rows(ctypes.byref(struct), rows.data_ptr(), arrays[name].data_ptr(), rows.element_size())
        return arrays[name].data_ptr()

    struct.scale = add("scale", weight.scale if struct.half else weight.scale.float())
    if weight.zero is not None and any(r not in weight.refits for r in wanted):
        struct.zero = add("zero", weight.zero)
    for r in wanted:
        if r in weight.refits:
            struct.k[r], struct.u[r] = add(f"k{r}", weight.refits[r].scale), add(f"u{r}", weight.refits[r].zero)
    return PackedWeight((out, in_features), wanted, chosen, struct, arrays)


def _aligned(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised numbers that begin at a multiple of ALIGNED bytes."""
    spare = ALIGNED // dtype.itemsize
    raw = torch.empty(count + spare, dtype=dtype)
    skip = -raw.data_ptr() % ALIGNED // dtype.itemsize
    return raw[skip : skip + count]


def linear(
    x: Float[Tensor, "*batch in"],
    weight: PackedWeight,
    bits: int,
    bias: Float[Tensor, " out"] | None = None,
    exact: bool = False,
    threads: int | None = None,
) -> Float[Tensor, "*batch out"]:
    """x W_r^T + bias, in the dtype of x. Equal to the bit for any number of threads, and for a row by itself or among others.

    Raises MissingPlanesError for a width that `weight` was not packed for.
    """
    if bits not in weight.widths:
        raise MissingPlanesError(f"{bits} bits were not packed; {choices(bits, weight.widths)}")
    out, in_features = weight.shape
    rows = x.reshape(-1, in_features).to(device="cpu", dtype=torch.float32).contiguous()
    y = torch.empty(len(rows), out)
    of_bias = None if bias is None else bias.float().contiguous()
    failed = library().mq_linear(
        ctypes.byref(weight.struct), bits, rows.data_ptr(), len(rows), None if of_bias is None else of_bias.data_ptr(), y.data_ptr(),
        exact, threads or torch.get_num_threads(), weight.isa.encode(),
    )  # fmt: skip
    assert not failed, f"mq_linear returned {failed}"
    return y.reshape(*x.shape[:-1], out).to(x.dtype)
