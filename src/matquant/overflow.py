"""Extra Precision codes stored sparsely: r bits a weight, and a list of the few codes that are 2^r.

`round-overflow` (MatQuant's Extra Precision, https://arxiv.org/abs/2502.06786, section 4.3) reads codes 0 to 2^r. With c = min(p, 2^r - 1) and
O the set of weights whose code is 2^r,

    w = scale p + offset = scale c + offset + scale [in O]        y_o = (r-bit product)_o + sum over i in O_o of scale[o, g(i)] x_i

so an ordinary r-bit kernel serves c, and a sparse sum adds the rest. What O costs:

    as published     share                         one bit for every weight in O, and nothing for where they are: "2.05 bits"
    entropy          h(share)                      no code of independent places is shorter
    SparseOverflow   5 share + 1/16 + 32/in        a place in its tile of 16 input channels is 4 bits; a tile's count is unary, one bit an entry and
                                                   one a tile (as in Elias-Fano lists, https://doi.org/10.1145/321812.321820); a row's first entry, 32 bits
    planes           1                             what the checkpoint's planes take: plane r, whole

The storage is made from the planes, for engines that hold one width only; the checkpoint itself stores none of it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matquant.errors import RecipeError
from matquant.packing import pack_planes, unpack_planes
from matquant.weight import AffineWeight, NestedWeight

TILE = 16  # input channels
PLACE_BITS, START_BITS = 4, 32


@dataclass(frozen=True)
class SparseOverflow:
    """Codes of 0 to 2^bits. planes: of min(p, 2^bits - 1). starts: of every row, how many entries come before it, and how many there are.

    places: two entries a byte, the first in the low nibble. counts: a one for every entry and a zero after every tile, row after row, the first
    in the lowest bit of a byte; row o begins at bit o tiles + starts[o].
    """

    planes: UInt8[Tensor, "bits out bytes"]
    starts: Int[Tensor, " rows_and_one"]
    places: UInt8[Tensor, " pairs"]
    counts: UInt8[Tensor, " octets"]
    in_features: int

    @staticmethod
    def of(codes: UInt8[Tensor, "out in"], bits: int) -> "SparseOverflow":
        """Raises RecipeError for a code above 2^bits."""
        if codes.numel() and int(codes.max()) > 2**bits:
            raise RecipeError(f"a code is {int(codes.max())}; {bits} bits with overflow hold at most {2**bits}; slice with round-overflow")
        over = codes == 2**bits
        rows, columns = codes.shape
        tiles = -(-columns // TILE)
        row, column = over.nonzero(as_tuple=True)
        tile = row * tiles + column // TILE
        ones = tile + torch.arange(len(tile), device=codes.device)  # of the stream's bits: all tiles and entries before it
        stream = torch.zeros(rows * tiles + len(tile), dtype=torch.uint8, device=codes.device)
        stream[ones] = 1
        starts = torch.nn.functional.pad(over.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        kept = codes.clamp(max=2**bits - 1)
        return SparseOverflow(pack_planes(kept, bits), starts, _pairs((column % TILE).to(torch.uint8)), _octets(stream), columns)

    @property
    def bits(self) -> int:
        return len(self.planes)

    def entries(self) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
        """(row, input channel) of every code that is 2^bits, in order."""
        tiles = -(-self.in_features // TILE)
        total = int(self.starts[-1])
        shifts = torch.arange(8, device=self.counts.device)
        stream = ((self.counts[:, None] >> shifts) & 1).flatten()
        ones = stream.nonzero().squeeze(1)
        tile = ones - torch.arange(total, device=ones.device)
        places = torch.stack([self.places & 15, self.places >> 4], 1).flatten()[:total]
        return tile // tiles, tile % tiles * TILE + places.long()

    def codes(self) -> UInt8[Tensor, "out in"]:
        """The codes that `of` was given."""
        codes = unpack_planes(self.planes, self.in_features, self.bits)
        row, column = self.entries()
        codes[row, column] += 1
        return codes

    def product(
        self, x: Float[Tensor, "tokens in"], scale: Float[Tensor, "out groups"], offset: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "tokens out"]:
        """x W^T as a kernel would make it: the r-bit product, and a sparse one."""
        dense = AffineWeight(unpack_planes(self.planes, self.in_features, self.bits), scale, offset, self.bits).dense()
        row, column = self.entries()
        values = scale[row, column // (self.in_features // scale.shape[1])].float()
        return (dense @ x.T).index_add_(0, row, values[:, None] * x.T[column]).T

    @property
    def stored_bits(self) -> int:
        """Of codes and places, without scales and offsets."""
        whole_bytes = self.planes.numel() + self.places.numel() + self.counts.numel()
        return 8 * whole_bytes + START_BITS * len(self.starts)


class Cost(NamedTuple):
    """Of one width. share: of the weights, that overflow. bits: of codes and places a weight, in SparseOverflow."""

    share: float
    bits: float


def costs(weights: Iterable[NestedWeight], widths: Sequence[int]) -> dict[int, Cost]:
    """Of reading all of `weights` at each of `widths`; none for weights that cannot overflow, and for the parent's width."""
    total, over, stored = 0, dict.fromkeys(widths, 0), dict.fromkeys(widths, 0)
    for weight in weights:
        total += weight.codes.numel()
        for bits in widths:
            if weight.slicing == "round-overflow" and bits < weight.grid.bits:
                made = SparseOverflow.of(weight.read(bits).codes, bits)
                over[bits] += int(made.starts[-1])
                stored[bits] += made.stored_bits
    return {bits: Cost(over[bits] / total, stored[bits] / total) for bits in widths if stored[bits]}


def published_bits(bits: int, share: float) -> float:
    """Bits a code as the paper counts them. share: of weights whose code is 2^bits."""
    return bits + share


def entropy_bits(bits: int, share: float) -> float:
    """Bits a code if places were coded as tightly as can be."""
    return bits - sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def _pairs(nibbles: UInt8[Tensor, " n"]) -> UInt8[Tensor, " pairs"]:
    low, high = torch.nn.functional.pad(nibbles, (0, len(nibbles) % 2)).reshape(-1, 2).unbind(1)
    return low | high << 4


def _octets(stream: UInt8[Tensor, " n"]) -> UInt8[Tensor, " octets"]:
    padded = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=stream.device)).sum(1, dtype=torch.uint8)
