"""Linear layers in training, read at `bits` as a checkpoint of them would be.

    TrainedLinear   the weight is trained through both roundings (fake.py), and, where they may, scale, zero and reads
    TunedLinear     codes are frozen; the reads of narrow widths are trained

A read of its own (a refit, codes.py) is trained as two lengths in steps of its width: how far it puts the mean code from the middle,
reach = m 2^r / 4, and how far it moves all, v = u / 2^(8 - r); a scale as its ratio to where it started, a zero in steps of the narrowest
width trained for, to which a step of 8 bits is next to nothing. So a step of the optimizer means the same everywhere. All are used as the bytes or halves that will be stored; gradients pass these roundings.

Parameters are float32. The weight is read in float32 and rounded once to what x has (under autocast, to what products are made in).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant.codes import UNIT, Grid, nearest_code, slice_codes, stretched_affine
from matquant.fake import fake_read, rounded, snapped
from matquant.weight import NestedWeight, Refit


class Reads(nn.Module):
    """reach and v of some widths, by width."""

    def __init__(self, start: NestedWeight, widths: Sequence[int]) -> None:
        super().__init__()
        self.grid: Grid = start.grid
        own = {r: start.refits.get(r) for r in widths}
        ones, zero = torch.ones(start.scale.shape), zero_of(start) * 2.0 ** (8 - start.grid.bits)
        ones = ones.to(zero)
        stretch = {r: ones if fit is None else fit.scale.float() / UNIT for r, fit in own.items()}
        self.reach = nn.ParameterDict({str(r): nn.Parameter(m * 2.0 ** (r - 2)) for r, m in stretch.items()})
        self.v = nn.ParameterDict({str(r): nn.Parameter((zero if fit is None else fit.zero.float()) / 2.0 ** (8 - r)) for r, fit in own.items()})

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(int(r) for r in self.reach)

    def rounded(self, bits: int) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(m, u) of what is stored, u in parent steps."""
        m = rounded(self.reach[str(bits)] * (UNIT / 2.0 ** (bits - 2)), 1, 255) / UNIT
        return m, rounded(self.v[str(bits)] * 2.0 ** (8 - bits), 0, 255) * 2.0 ** (self.grid.bits - 8)

    def refits(self) -> dict[int, Refit]:
        """As they are stored."""
        stored = {r: (m * UNIT, u * 2.0 ** (8 - self.grid.bits)) for r in self.widths for m, u in [self.rounded(r)]}
        return {r: Refit(k.detach().to(torch.uint8), u.detach().to(torch.uint8)) for r, (k, u) in stored.items()}


class TunedLinear(nn.Module):
    """y = x W_r^T + bias. Widths without a trained read are read as in `start`."""

    codes: Tensor
    scale: Tensor

    def __init__(self, start: NestedWeight, widths: Sequence[int], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bits, self.bias, self.reads = start.grid.bits, bias, Reads(start, widths)
        self.rule = start.grid, start.slicing
        self.register_buffer("codes", start.codes, persistent=False)
        self.register_buffer("scale", start.scale.float(), persistent=False)
        self.others = {r: start.affine(r) for r in range(2, start.grid.bits + 1) if r not in widths}

    def weight_at(self, bits: int) -> Float[Tensor, "out in"]:
        """W_r, float32."""
        own = bits in self.reads.widths
        affine = stretched_affine(self.scale, *self.reads.rounded(bits), bits, *self.rule) if own else self.others[bits]
        scale, offset = (part.to(self.codes.device) for part in affine)
        p = slice_codes(self.codes, bits, *self.rule).float().reshape(*scale.shape, -1)
        return torch.addcmul(offset[..., None], p, scale[..., None]).reshape(self.codes.shape)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return nn.functional.linear(x, self.weight_at(self.bits).to(x.dtype), self.bias)


class TrainedLinear(nn.Module):
    """y = x W_r^T + bias, W_r the r-bit read of `weight` quantized to a grid that starts as that of `start`.

    widths: those with reads of their own. narrowest: of those that are trained. learn_scales: whether scale, zero (of an asymmetric grid) and
    reads are trained too.
    """

    base: Tensor

    def __init__(
        self,
        w: Float[Tensor, "out in"],
        start: NestedWeight,
        widths: Sequence[int],
        narrowest: int,
        learn_scales: bool,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.bias = start.grid.bits, bias
        self.rule, self.dtype = (start.grid, start.slicing), start.scale.dtype
        self.weight = nn.Parameter(w)
        self.register_buffer("base", start.scale.float())
        self.ratio = nn.Parameter(torch.ones_like(self.base))
        self.step = 2.0 ** (start.grid.bits - narrowest)
        self.zero = nn.Parameter(zero_of(start) / self.step)
        self.reads = Reads(start, widths)
        self.ratio.requires_grad_(learn_scales)
        self.zero.requires_grad_(learn_scales and not start.grid.symmetric)
        self.reads.requires_grad_(learn_scales)

    @property
    def _grid(self) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(scale, zero) as they are stored."""
        return snapped(self.base * self.ratio, self.dtype), rounded(self.zero * self.step, 0, self.rule[0].max_code)

    def weight_at(self, bits: int) -> Float[Tensor, "out in"]:
        """W_r, float32."""
        own = self.reads.rounded(bits) if bits in self.reads.widths else ()
        return fake_read(self.weight, *self._grid, bits, *self.rule, *own)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return nn.functional.linear(x, self.weight_at(self.bits).to(x.dtype), self.bias)

    def frozen(self) -> NestedWeight:
        """What `weight_at` reads, in integers."""
        grid, slicing = self.rule
        scale, zero = (part.detach() for part in self._grid)
        t = self.weight.detach().reshape(*scale.shape, -1) / scale[..., None] + zero[..., None]
        codes = nearest_code(t, grid).reshape(self.weight.shape)
        return NestedWeight(codes, scale.to(self.dtype), None if grid.symmetric else zero.to(torch.uint8), grid, slicing, self.reads.refits())


def zero_of(weight: NestedWeight) -> Float[Tensor, "out groups"]:
    """The zero of every group, stored or not, in float32."""
    return torch.full_like(weight.scale, weight.grid.center).float() if weight.zero is None else weight.zero.float()


def read_at(layers: Mapping[str, nn.Module], bits: int | Mapping[str, int]) -> None:
    """Let layers in training read at `bits`: one width for all, or one by name."""
    for name, layer in layers.items():
        layer.bits = bits if isinstance(bits, int) else bits[name]  # pyright: ignore[reportAttributeAccessIssue]
