"""NestedWeight (all widths of one linear layer) and AffineWeight (one width of it).

Nestedness ends at `NestedWeight.read(bits)`: kernels and exporters see an ordinary affine weight and know nothing of
Matryoshka.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matquant.codes import Grid, Slicing, planes_needed, read_affine, refit_affine, slice_codes
from matquant.errors import MissingPlanesError
from matquant.packing import pack_planes


@dataclass(frozen=True)
class AffineWeight:
    """One width of a weight: w[o, i] = scale[o, g(i)] codes[o, i] + offset[o, g(i)].

    codes are at most 2^bits - 1, or 2^bits under round-overflow, or 135 with overlap. scale and offset are float32.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    offset: Float[Tensor, "out groups"]
    bits: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight itself, computed in float32 and rounded once to `dtype`."""
        out, groups = self.scale.shape
        p = self.codes.reshape(out, groups, -1).float()
        return torch.addcmul(self.offset[..., None], p, self.scale[..., None]).reshape(out, -1).to(dtype)


@dataclass(frozen=True)
class Refit:
    """The read of one width, fitted after the codes were chosen: scale is k, 1 to 255, and zero is u of codes.refit_affine."""

    scale: UInt8[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]


@dataclass(frozen=True)
class NestedWeight:
    """All widths of one weight.

    codes: parent codes. scale: of the parent grid, in its storage dtype. zero: None for a symmetric grid, else at most
    2^c - 1. refits: width -> its own read. planes: how many planes the codes really hold, most significant first (fewer
    than grid.bits for a partial download; the other bits are zero).
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"] | None
    grid: Grid
    slicing: Slicing
    refits: Mapping[int, Refit] = field(default_factory=dict[int, Refit])
    planes: int = 8

    def __post_init__(self) -> None:
        out, columns = self.codes.shape
        expected = (out, self.grid.groups(columns))
        assert tuple(self.scale.shape) == expected, f"scale {tuple(self.scale.shape)}, expected {expected}"
        assert (self.zero is None) == self.grid.symmetric, "zero is stored exactly when the grid is asymmetric"

    def read(self, bits: int) -> AffineWeight:
        """The `bits`-wide read. Raises RecipeError for a width the grid lacks, MissingPlanesError for planes not held."""
        codes = slice_codes(self.codes, bits, self.grid, self.slicing)
        need = planes_needed(bits, self.grid.bits, self.slicing)
        if need > self.planes:
            raise MissingPlanesError(f"{bits} bits need planes 0-{need - 1}, but only 0-{self.planes - 1} are here; get the missing plane files")
        return AffineWeight(codes, *self.affine(bits), bits)

    def affine(self, bits: int) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(scale, offset) of the `bits`-wide read, float32."""
        refit = self.refits.get(bits)
        if refit is None:
            return read_affine(self.scale, self.zero, bits, self.grid, self.slicing)
        return refit_affine(self.scale, refit.scale, refit.zero, bits, self.grid, self.slicing)

    def packed(self) -> UInt8[Tensor, "planes out bytes"]:
        """The planes as the checkpoint stores them."""
        return pack_planes(self.codes, self.grid.bits)[: self.planes]
