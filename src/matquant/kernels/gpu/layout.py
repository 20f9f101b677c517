"""A nested weight in the memory of a GPU: planes in tiles, scales as the checkpoint has them.

A tile is 512 columns of a row in 16 slots of 32. Word k of 16 holds columns 2k (low half) and 2k + 1 (high half) of every slot, so that one shift
moves a slot of 32 weights into place, in halves that are neighbours in an operand of a tensor core. Arrays, most significant planes first:

    pair0, pair4, pair6   planes 0|1, 4|5, 6|7   int32 [out, tiles, 2, 16]   slot s = 8h + 4e + i: bits 4i + 2e + 1 and 4i + 2e of a half, set h
    single2, single3      planes 2, 3            int32 [out, tiles, 16]      slot s = 4q + i:      bit 4i + q

Slots 4q to 4q + 3 are the four nibbles of a half: with q = 2h + e, pairs land in the upper and single planes in the lower bits of these nibbles
after one shift and one mask for eight weights. A thread's load is four words of a row; a row's tiles are contiguous. Every array is contiguous
over the weight, so that reading r bits touches the arrays of r planes and no other (5 bits touch plane 5 too, and 7 bits plane 7).

Groups are padded to a multiple of 32 columns, rows to a multiple of 512. Scales, zeros and refits stay [out, groups], as they are on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from matquant.codes import Grid, read_rule
from matquant.errors import InputError, MissingPlanesError
from matquant.weight import NestedWeight, Refit

SLOT, SLOTS, WORDS = 32, 16, 16
TILE = SLOT * SLOTS
ARRAYS = {"pair0": 0, "single2": 2, "single3": 3, "pair4": 4, "pair6": 6}  # array -> its first plane


class Reading(NamedTuple):
    """What a kernel needs to know of a width (jit.py). high, low: what 16 steps of the nibbles, or 4 of two bits, count in p."""

    bits: int
    high: float
    low: float
    step: float
    shift: float
    middle: float
    unit: float
    fitted: bool


def reading(bits: int, grid: Grid, fitted: bool) -> Reading:
    """Of `bits` bits of a floor slice. Raises RecipeError as codes.check_rule."""
    step, shift = read_rule(bits, grid, "floor")
    low = 0.0 if bits <= 4 else 2.0 ** (bits - 4)  # a low nibble of which r - 4 bits are read counts e' = e / 2^(8-r)
    high = 2.0**bits if bits <= 4 else 16 * low / (2 if grid.overlap else 1)
    middle = grid.max_code / 2 if fitted else float(grid.center)
    return Reading(bits, high, low, step, shift, middle, 2.0 ** (grid.bits - 8), fitted)


class Blocking(NamedTuple):
    """How a row falls into groups and tiles. padded: columns of a group with padding. apply: slots in a row that share a group, 1 to 16."""

    group: int
    groups: int
    padded: int
    apply: int
    tiles: int


def blocking(in_features: int, group: int) -> Blocking:
    """Of rows of `in_features` in groups of `group`."""
    groups, padded = in_features // group, -(-group // SLOT) * SLOT
    return Blocking(group, groups, padded, gcd(padded // SLOT, SLOTS), -(-groups * padded // TILE))


@dataclass
class TiledWeight:
    """One weight in tiles.

    planes: leading ones that are here, evicted ones too. arrays: of ARRAYS, on the device; evicted: those that wait in host memory. zero, refits: as
    in NestedWeight. moved: how often planes were evicted or restored.
    """

    shape: tuple[int, int]
    grid: Grid
    planes: int
    arrays: dict[str, Tensor]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"] | None
    refits: Mapping[int, Refit]
    evicted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    moved: int = 0

    @property
    def group(self) -> int:
        """Input channels that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    def read(self, bits: int) -> list[Tensor]:
        """The arrays that a product at `bits` is handed, and no other. Raises MissingPlanesError."""
        wanted = names(bits)
        if gone := [name for name in wanted if name in self.evicted]:
            raise MissingPlanesError(f"{bits} bits need plane {ARRAYS[gone[0]]}, which was evicted to host memory; call restore({bits})")
        if bits > self.planes:
            raise MissingPlanesError(
                f"{bits} bits need planes 0-{bits - 1}, but only 0-{self.planes - 1} are here; load the model with keep={bits} or more"
            )
        return [self.arrays[name] for name in wanted]

    def fit(self, bits: int) -> tuple[Tensor | None, Tensor | None]:
        """(k, u) of the width's refit, or (None, the zeros or None)."""
        refit = self.refits.get(bits)
        return (None, self.zero) if refit is None else (refit.scale, refit.zero)

    def read_bytes(self, bits: int) -> int:
        """Bytes of planes and metadata that one product at `bits` reads."""
        return sum(tensor.nbytes for tensor in (*self.read(bits), self.scale, *self.fit(bits)) if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        refits = (tensor for refit in self.refits.values() for tensor in (refit.scale, refit.zero))
        return sum(tensor.nbytes for tensor in (*self.arrays.values(), self.scale, self.zero, *refits) if tensor is not None)

    def addresses(self, bits: int) -> tuple[int, ...]:
        """Where what a product at `bits` reads lies: a captured graph holds for as long as these stay."""
        return tuple(tensor.data_ptr() for tensor in (*self.read(bits), self.scale, *self.fit(bits)) if tensor is not None)

    def evict(self, bits: int) -> int:
        """Move the planes that `bits` bits do not need to host memory (pinned, from CUDA). What stays is not touched. Returns bytes freed."""
        freed = 0
        for name in [name for name in self.arrays if name not in names(bits)]:
            array = self.arrays[name]
            host = torch.empty(array.shape, dtype=array.dtype, pin_memory=array.is_cuda)
            self.evicted[name] = host.copy_(array)
            del self.arrays[name]
            freed += array.nbytes
        self.moved += freed > 0
        return freed

    def restore(self, bits: int) -> int:
        """Bring back the planes that `bits` bits need. What was there is not touched. Returns bytes taken."""
        taken = 0
        for name in [name for name in names(bits) if name in self.evicted]:
            self.arrays[name] = self.evicted.pop(name).to(self.scale.device)
            taken += self.arrays[name].nbytes
        self.moved += taken > 0
        return taken

    def nested(self) -> NestedWeight:
        """The weight with all planes that are here, evicted ones too: the inverse of `tile`."""
        codes = torch.zeros(self.shape, dtype=torch.uint8, device=self.scale.device)
        for name, array in {**self.arrays, **self.evicted}.items():
            codes |= _bits_of(name, array.to(codes.device), self)
        return NestedWeight(codes >> (8 - self.grid.bits), self.scale, self.zero, self.grid, "floor", self.refits, self.planes)


def names(bits: int) -> list[str]:
    """The arrays that `bits` bits need."""
    return [name for name, plane in ARRAYS.items() if plane < bits]


def tile(
    planes: Sequence[UInt8[Tensor, "out bytes"]],
    in_features: int,
    grid: Grid,
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"] | None,
    refits: Mapping[int, Refit],
) -> TiledWeight:
    """Planes of a checkpoint, most significant first, as tiles on their device; the rest is held as it is. Needs Triton."""
    from matquant.kernels.gpu.launch import tile_plane

    out, found = len(planes[0]), blocking(in_features, in_features // scale.shape[1])
    arrays: dict[str, Tensor] = {}
    for name in names(len(planes)):
        first, sets = ARRAYS[name], (2,) if name.startswith("pair") else ()
        arrays[name] = torch.empty(out, found.tiles, *sets, WORDS, dtype=torch.int32, device=planes[0].device)
        lower = planes[first + 1] if sets and first + 1 < len(planes) else None
        with torch.cuda.device_of(planes[0]):
            tile_plane(arrays[name], planes[first], lower, found)
    if planes[0].is_cuda:  # jit_mma reads weights before the kernel ahead of it is done
        torch.cuda.current_stream(planes[0].device).synchronize()
    return TiledWeight((out, in_features), grid, len(planes), arrays, scale, zero, refits)


def tiled(weight: NestedWeight) -> TiledWeight:
    """A weight as tiles. Raises InputError for a slicing other than floor."""
    check_slicing(weight.slicing)
    return tile(list(weight.packed()), weight.codes.shape[1], weight.grid, weight.scale, weight.zero, weight.refits)


def check_slicing(slicing: str) -> None:
    """Raise InputError for a slicing whose reads are no prefix of the planes."""
    if slicing != "floor":
        raise InputError(f"GPU kernels read slicing floor, not {slicing}; use the reference kernel")


def _bits_of(name: str, array: Int32[Tensor, "out tiles *sets words"], weight: TiledWeight) -> UInt8[Tensor, "out in"]:
    """The bits that an array gives to 8-bit codes."""
    (out, in_features), found = weight.shape, blocking(weight.shape[1], weight.group)
    half, nibble = torch.arange(2, device=array.device) * 16, torch.arange(4, device=array.device) * 4
    if name.startswith("pair"):
        shifts = half[:, None, None] + nibble[:, None] + torch.arange(2, device=array.device) * 2  # half i e
        fields = ((array[..., None, None, None] >> shifts) & 3).permute(0, 1, 2, 6, 5, 3, 4)  # out tile h e i word half
        bits = fields << (6 - ARRAYS[name])
    else:
        shifts = half[:, None, None] + nibble[:, None] + torch.arange(4, device=array.device)  # half i q
        fields = ((array[..., None, None, None] >> shifts) & 1).permute(0, 1, 5, 4, 2, 3)  # out tile q i word half
        bits = fields << (7 - ARRAYS[name])
    columns = bits.to(torch.uint8).reshape(out, -1)[:, : found.groups * found.padded]
    return columns.reshape(out, found.groups, found.padded)[..., : found.group].reshape(out, in_features)
