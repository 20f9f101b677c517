"""What is trained of one layer: a latent code behind its planes, and each low width's scale and zero.

    y         float, in units of the parent code:  q = floor(y),  p_r = q >> (c - r)          (slicing floor)
    m, u      floats behind the two bytes of a refit (codes.py):  k = round(128 m),  u rounded

    w_r = s ( m_r (step p_r + shift - mid) + mid - u_r 2^(c-8) )

Gradients pass the floor and the rounding as if they were not there (straight-through, https://arxiv.org/abs/1308.3432). A latent
starts in the middle of its code, y = q + 1/2, and may move `reach` from there: a bounded shift, as in AutoRound
(https://arxiv.org/abs/2309.05516). So the weights that cross a border between the cells of a low width are those near it, and no
wider read has farther to go than `reach` to come back. Frozen planes bound y by their cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import UNIT, read_rule, stretched_affine
from matquant.weight import NestedWeight, Refit

BELOW = 1e-2  # how far below its upper border a latent stays, in parent codes


@dataclass
class Latent:
    """start: where training began. y: between low and high. m, u: of every width trained."""

    start: NestedWeight
    y: Float[Tensor, "out in"]
    low: Float[Tensor, "out in"]
    high: Float[Tensor, "out in"]
    m: dict[int, Float[Tensor, "out groups"]]
    u: dict[int, Float[Tensor, "out groups"]]

    @staticmethod
    def of(weight: NestedWeight, widths: Sequence[int], fixed: int, reach: float) -> "Latent":
        """fixed: how many planes, most significant first, are frozen. reach: in parent codes."""
        grid = weight.grid
        y = weight.codes.float() + 0.5
        size = 2.0 ** (grid.bits - fixed)
        cell = (y / size).floor() * size
        zero = (torch.full_like(weight.scale, grid.center) if weight.zero is None else weight.zero).float()
        m = {r: weight.refits[r].scale.float() / UNIT if r in weight.refits else torch.ones_like(zero) for r in widths}
        u = {r: weight.refits[r].zero.float() if r in weight.refits else zero * 2.0 ** (8 - grid.bits) for r in widths}
        return Latent(weight, y, torch.maximum(y - reach, cell), torch.minimum(y + reach, cell + size - BELOW), m, u)

    def sliced(self, bits: int) -> Float[Tensor, "out groups size"]:
        """p_r."""
        return (self.y / 2.0 ** (self.start.grid.bits - bits)).floor().reshape(*self.start.scale.shape, -1)

    def rounded(self, bits: int) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(m, u) as the two bytes hold them."""
        return (self.m[bits] * UNIT).round().clamp(1, 255) / UNIT, self.u[bits].round().clamp(0, 255)

    def read(self, bits: int) -> Float[Tensor, "out in"]:
        """w_r, in float32, as codes.refit_affine reads it."""
        grid = self.start.grid
        m, u = self.rounded(bits)
        scale, offset = stretched_affine(self.start.scale, m, u * 2.0 ** (grid.bits - 8), bits, grid, self.start.slicing)
        return torch.addcmul(offset[..., None], self.sliced(bits), scale[..., None]).reshape(self.y.shape)

    def gradients(
        self, dw: Float[Tensor, "out in"], bits: int
    ) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(dL/dy, dL/dm, dL/du) from dL/dw_r, floor and rounding passed straight through."""
        grid = self.start.grid
        step, shift = read_rule(bits, grid, self.start.slicing)
        p, s = self.sliced(bits), self.start.scale.float()
        grouped = dw.reshape(p.shape)
        total = grouped.sum(-1)
        dy = (grouped * (s * self.m[bits])[..., None]).reshape(dw.shape)
        dm = s * (step * (grouped * p).sum(-1) + (shift - grid.max_code / 2) * total)
        return dy, dm, -s * 2.0 ** (grid.bits - 8) * total

    def bound(self) -> None:
        """Keep y between its borders."""
        torch.clamp(self.y, self.low, self.high, out=self.y)

    def frozen(self, planes: int) -> NestedWeight:
        """The integers: the first `planes` planes as trained, below them the code nearest to the one at the start."""
        grid = self.start.grid
        size = 2 ** (grid.bits - planes)
        cell = (self.y / size).floor().int() * size
        codes = torch.minimum(torch.maximum(self.start.codes.int(), cell), cell + size - 1).to(torch.uint8)
        return replace(self.with_reads(), codes=codes)

    def with_reads(self) -> NestedWeight:
        """The codes of the start, with the reads as trained."""
        refits = dict(self.start.refits)
        for r in set(self.m) & set(refits):
            m, u = self.rounded(r)
            refits[r] = Refit((m * UNIT).to(torch.uint8), u.to(torch.uint8))
        return replace(self.start, refits=refits)
