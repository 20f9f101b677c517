"""Fake quantization: a weight as one width would read it, with gradients for all that it is made of.

    t = w/s + z        q = clamp(floor(t + 1/2), 0, 2^c - 1)        p = slice_r(q)
    w_r = s a          a = m (step p + shift - mid) + mid - u                              (codes.py; without a refit m = 1, u = z)

Both roundings, of the code and of its slice, pass gradients straight through (https://arxiv.org/abs/1308.3432), so that a step of
step p is a step of t. Clamps stop them: `in` is 1 where 0 <= floor(t + 1/2) < 2^c, else 0, and `under` is `in` but 0 too for the codes that
slicing by `round` pushes back into a width's top cell.

    dw_r/dw = m in      dw_r/ds = a - m under w/s      dw_r/dz = s m under      dw_r/dm = s (step p + shift - mid)      dw_r/du = -s

At r = c and without a refit these are the gradients of LSQ (https://arxiv.org/abs/1902.08153) and LSQ+: dw/dz = s in - s.
The weight itself passes the clamp of the slice (MatQuant, Eq. 6, takes the identity): it acts on one in 2^(r + 1) evenly spread ones, which
without gradients could never leave the cell. Scale and zero do not: what they are there is no matter of rounding, and learned clipping that
took it for one would never see what a width cuts off at its top.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import Grid, Slicing, read_rule, slice_codes, snap
from matquant.kernels import cpu
from matquant.kernels import fake as native
from matquant.kernels.gpu import ops


def fake_read(
    w: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    bits: int,
    grid: Grid,
    slicing: Slicing,
    m: Float[Tensor, "out groups"] | None = None,
    u: Float[Tensor, "out groups"] | None = None,
) -> Float[Tensor, "out in"]:
    """w_r in float32. zero: whole numbers; of a symmetric grid its centre. m, u: of a refit, u in parent steps."""
    return _Read.apply(w, scale, zero, m, u, bits, grid, slicing)


def rounded(x: Float[Tensor, "*shape"], low: int, high: int) -> Float[Tensor, "*shape"]:
    """x as a whole number from low to high, half up; gradients pass straight through."""
    return _straight_through(x, (x + 0.5).floor().clamp(low, high))


def snapped(scale: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Scales as a checkpoint holds them; gradients pass straight through."""
    return _straight_through(scale, snap(scale, dtype))


def _straight_through(x: Float[Tensor, "*shape"], value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`value` to the bit, with the gradient of x. The usual x + (value - x) rounds: -3.7 + 4.7 is below 1, and is stored as 0."""
    return _Straight.apply(x, value.detach())


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Read(torch.autograd.Function):
    """The formulas above. Only what the caller holds anyway is kept for the way back; the rest is made again.

    One kernel each way where there is one: torch would make some fifty passes over every layer, width and step, which is half of what a step
    of a small model takes on a CPU, and most of it on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, bits: int, grid: Grid, slicing: Slicing) -> Tensor:
        ctx.save_for_backward(w, s, z, m, u)
        ctx.rule = bits, grid, slicing
        kernels = _kernels(w, s, grid)
        return (kernels.read if kernels else read_reference)(w, s, z, m, u, bits, grid, slicing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w, s, z, m, u = ctx.saved_tensors
        kernels = _kernels(w, s, ctx.rule[1])
        of_weight = ctx.needs_input_grad[0]
        parts = (kernels.gradients if kernels else gradients_reference)(w, s, z, m, u, grads[0], *ctx.rule, of_weight=of_weight)
        return *parts, None, None, None


def read_reference(w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, bits: int, grid: Grid, slicing: Slicing) -> Tensor:
    """w_r by torch."""
    m, u = (torch.ones_like(s), z) if m is None or u is None else (m, u)
    level, _, _ = _level(w, s, z, bits, grid, slicing)
    return (level.mul_(m[..., None]).add_((grid.max_code / 2 - u)[..., None]).mul_(s[..., None])).reshape(w.shape)


def gradients_reference(
    w: Tensor, s: Tensor, z: Tensor, m: Tensor | None, u: Tensor | None, g: Tensor, bits: int, grid: Grid, slicing: Slicing, of_weight: bool = True
) -> tuple[Tensor | None, ...]:
    """(dw, ds, dz, dm, du) by torch from g, that of the read; the last two None without m and u, dz then of both; dw None if it is not wanted."""
    own, mid = m is not None, grid.max_code / 2
    m, u = (torch.ones_like(s), z) if m is None or u is None else (m, u)
    level, inside, under = _level(w, s, z, bits, grid, slicing)
    g = g.reshape(level.shape)
    total, along, through = g.sum(-1), (g * level).sum(-1), g * under
    dw = (g * inside * m[..., None]).reshape(w.shape) if of_weight else None
    ds = m * along + (mid - u) * total - m / s * (through * w.reshape(level.shape)).sum(-1)
    dz, dm, du = s * m * through.sum(-1), s * along, -s * total
    return dw, ds, *((dz, dm, du) if own else (dz + du, None, None))


def _kernels(w: Tensor, s: Tensor, grid: Grid) -> Any:
    """The module with kernels of fake quantization, where they can run."""
    if w.dtype != torch.float32 or grid.overlap:
        return None
    if w.device.type == "cpu":
        return native if cpu.available() else None
    if w.device.type != "cuda" or not ops.available(w.device):
        return None
    from matquant.kernels.gpu import fake

    return fake if w.numel() <= fake.LONGEST * s.numel() else None


def _level(w: Tensor, s: Tensor, z: Tensor, bits: int, grid: Grid, slicing: Slicing) -> tuple[Tensor, Tensor, Tensor]:
    """(step p + shift - mid, in, under) as [out, groups, size]."""
    t = w.reshape(*s.shape, -1) / s[..., None] + z[..., None]
    q = t.add_(0.5).floor_()
    inside = (q >= 0) & (q <= grid.max_code)
    step, shift = read_rule(bits, grid, slicing)
    under = inside & (q < grid.max_code + 1 - step / 2) if slicing == "round" and bits < grid.bits else inside
    p = slice_codes(q.clamp_(0, grid.max_code).to(torch.uint8), bits, grid, slicing)
    return p.float().mul_(step).add_(shift - grid.max_code / 2), inside, under
