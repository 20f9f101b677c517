"""All integer arithmetic: fit a grid, choose the nearest code, slice, read. The one place where the formulas stand.

A code q is an unsigned integer, 0 <= q < 2^c, c = `Grid.bits` (the parent width). A group of input channels shares a scale
s and a zero z, and the full-width read is w = s (q - z). Reading r of the c bits, with d = c - r:

    slicing           sliced code p                                  value read                        planes
    floor             q >> d                                         s (p 2^d + (2^d - 1)/2 - z)       r
    round             min((q >> d) + bit_{d-1}(q), 2^r - 1)          s (p 2^d - z)                     r + 1
    round-overflow    (q >> d) + bit_{d-1}(q), up to 2^r             s (p 2^d - z)                     r + 1

`round` is Eq. 6 of MatQuant (https://arxiv.org/abs/2502.06786), `round-overflow` its Extra Precision variant. `floor` is
ours: the r-bit slice is exactly the first r planes, read at the centre of its cell. Rounding is half up and always from
the parent code: 8 -> 4 -> 2 differs from 8 -> 2 on 24 of 256 codes.

With `Grid.overlap` (floor and c = 8 only) b is the high nibble, e the low one, and a residual step is worth 16/B = 2
parent steps instead of 1, so that the residual can reach past the cell that the low widths chose:

    r <= 4    as floor
    r >  4    e' = e >> d;  p = (B >> d) b + e';  w = s (16 b + 7.5 - z + (16/B)(e' 2^d + (2^d - 1)/2 - 7.5)),  B = 8

Every read is affine in an integer: w_r = scale_r p + offset_r with scale_r = s `step`, offset_r = s (`shift` - z).

A width may have a refit of its own, two bytes a group: k (1..255) stretches the read about the middle of the parent's range,
u (0..255) moves it in steps of 2^(c-8) parent steps:

    m = k/128,  mid = (2^c - 1)/2,  w_r = s (m (step p + shift - mid) + mid - u 2^(c-8))
    that is,    scale_r = s (m step),  offset_r = s (m (shift - mid) + mid - u 2^(c-8))

k = 128, u = z 2^(8-c) is exactly the parent's read. Both brackets are exact in float32 (multiples of 2^-8, 18 bits), so that
only the product with s rounds, once: readers agree to the bit.

`tests/golden` holds every code x width x rule; each backend is held against it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matquant.errors import RecipeError, choices

Slicing = Literal["floor", "round", "round-overflow"]
UNIT = 128  # the k of a refit that stretches nothing
SLICINGS: tuple[Slicing, ...] = get_args(Slicing)
WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Grid:
    """The integer grid of one weight.

    bits: parent width c, 2..8. group_size: input channels that share a scale; -1 = the whole row.
    symmetric: z = 2^(c-1), not stored. overlap: residual cells overlap (module docstring). Defaults stand in recipe.py.
    """

    bits: int
    group_size: int
    symmetric: bool
    overlap: bool

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise RecipeError(f"parent_bits is {self.bits}; allowed: 2 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError(f"group_size is {self.group_size}; allowed: a positive number of input channels, or -1 for the whole row")
        if self.overlap and self.bits != 8:
            raise RecipeError(f"overlap needs parent_bits 8, not {self.bits}; switch overlap off")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def center(self) -> int:
        """The zero z of a symmetric grid: an integer, so that the full-width read holds 0 exactly."""
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has. Raises RecipeError where they do not divide it."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise RecipeError(f"group_size {size} does not divide {in_features} input channels")
        return in_features // size


class ReadRule(NamedTuple):
    """w = s (step p + shift - z)."""

    step: float
    shift: float


def check_rule(bits: int, grid: Grid, slicing: str) -> None:
    """Raise RecipeError unless `bits` can be read from `grid` under `slicing`."""
    if slicing not in SLICINGS:
        raise RecipeError(f"slicing is {slicing!r}; {choices(slicing, SLICINGS)}")
    if not 2 <= bits <= grid.bits:
        raise RecipeError(f"cannot read {bits} bits from a {grid.bits}-bit parent; allowed: 2 to {grid.bits}")
    if grid.overlap and slicing != "floor":
        raise RecipeError(f"overlap needs slicing floor, not {slicing}")


def planes_needed(bits: int, parent_bits: int, slicing: Slicing) -> int:
    """How many planes, most significant first, an r-bit read touches."""
    return bits if slicing == "floor" else min(bits + 1, parent_bits)


def read_rule(bits: int, grid: Grid, slicing: Slicing) -> ReadRule:
    """The affine map from sliced codes to multiples of the parent scale."""
    check_rule(bits, grid, slicing)
    d = grid.bits - bits
    if slicing != "floor":
        return ReadRule(step=2.0**d, shift=0.0)
    if grid.overlap and bits > 4:
        return ReadRule(step=2.0 * 2**d, shift=2.0 * ((2**d - 1) / 2 - 7.5) + 7.5)
    return ReadRule(step=2.0**d, shift=(2**d - 1) / 2)


def slice_codes(q: UInt8[Tensor, "*shape"], bits: int, grid: Grid, slicing: Slicing) -> UInt8[Tensor, "*shape"]:
    """Sliced codes p of parent codes q. At most 135 (overlap at 8 bits is the largest sum below the plain 255).

    Only the first `planes_needed` planes of q matter, so a reader that lacks the rest may pass zeros there.
    """
    check_rule(bits, grid, slicing)
    d = grid.bits - bits
    if grid.overlap and bits > 4:
        high, low = q >> 4, q & 15
        return (8 >> d) * high + (low >> d)
    if d == 0 or slicing == "floor":
        return q >> d
    p = (q >> d) + ((q >> (d - 1)) & 1)  # at most 2^7: cannot wrap in uint8, unlike q + 2^(d-1)
    return p.clamp(max=2**bits - 1) if slicing == "round" else p


def read_affine(
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"] | None,
    bits: int,
    grid: Grid,
    slicing: Slicing,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """(scale_r, offset_r) in float32 of an r-bit read: w_r = scale_r p + offset_r.

    Exact for float16 and bfloat16 scales: step is a power of two and shift - z has at most 9 significant bits.
    """
    step, shift = read_rule(bits, grid, slicing)
    s = scale.float()
    z = grid.center if zero is None else zero.float()
    return s * step, s * (shift - z)


def refit_affine(
    scale: Float[Tensor, "out groups"],
    k: UInt8[Tensor, "out groups"],
    u: UInt8[Tensor, "out groups"],
    bits: int,
    grid: Grid,
    slicing: Slicing,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """(scale_r, offset_r) in float32 of an r-bit read with a refit (module docstring). scale: of the parent grid."""
    return stretched_affine(scale, k.float() / UNIT, u.float() * 2.0 ** (grid.bits - 8), bits, grid, slicing)


def stretched_affine(
    scale: Float[Tensor, "out groups"],
    m: Float[Tensor, "out groups"],
    u: Float[Tensor, "out groups"],
    bits: int,
    grid: Grid,
    slicing: Slicing,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """(scale_r, offset_r) of the refit that m and u, in parent steps, stand for; differentiable."""
    step, shift = read_rule(bits, grid, slicing)
    s, mid = scale.float(), grid.max_code / 2
    return s * (m * step), s * (m * (shift - mid) + mid - u)


def snap_refit(
    scale_r: Float[Tensor, "out groups"],
    offset_r: Float[Tensor, "out groups"],
    scale: Float[Tensor, "out groups"],
    bits: int,
    grid: Grid,
    slicing: Slicing,
) -> tuple[UInt8[Tensor, "out groups"], UInt8[Tensor, "out groups"]]:
    """The (k, u) nearest to a finite scale_r, offset_r: the inverse of `refit_affine` by rounding, half up.

    u is rounded from the read at the middle of the range as it was fitted, before k was: the rounding of one does not move the other.
    """
    step, shift = read_rule(bits, grid, slicing)
    s, mid = scale.float(), grid.max_code / 2
    m = scale_r.float() / (s * step)
    u = (m * (shift - mid) + mid - offset_r.float() / s) * 2.0 ** (8 - grid.bits)
    return (m * UNIT + 0.5).floor().clamp(1, 255).to(torch.uint8), (u + 0.5).floor().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def _levels(bits: int, grid: Grid, slicing: Slicing) -> Tensor:
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    step, shift = read_rule(bits, grid, slicing)
    return slice_codes(codes, bits, grid, slicing).float() * step + shift


def levels(bits: int, grid: Grid, slicing: Slicing) -> Float[Tensor, " codes"]:
    """What each parent code reads as at `bits`, in units of the parent scale and before the zero: w = s (levels[q] - z)."""
    return _levels(bits, grid, slicing).clone()


# --- fitting a grid -------------------------------------------------------------------------------------------------


def snap(scale: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Scales as the checkpoint will hold them, in float32: rounded to `dtype` and never below its smallest positive value.

    Codes must be chosen with snapped scales; otherwise storing them moves every weight of the group.
    """
    smallest = torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 2.0**-24
    return scale.to(dtype).clamp(min=smallest, max=torch.finfo(dtype).max).float()


def fit_grid(
    w: Float[Tensor, "*shape group"], grid: Grid, dtype: torch.dtype, shrink: float = 1.0
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"] | None]:
    """Scale and zero that span the weights of each group, times `shrink`.

    Symmetric: s = 2 max|w| / (2^c - 1), z = 2^(c-1). Asymmetric: s = (max - min) / (2^c - 1) over a range that includes 0,
    z = round(-min / s). Both as in GPTQ (https://arxiv.org/abs/2210.17323, quant.py of its repository).
    """
    if grid.symmetric:
        return snap(w.abs().amax(-1) * (2 * shrink / grid.max_code), dtype), None
    low = w.amin(-1).clamp(max=0) * shrink
    high = w.amax(-1).clamp(min=0) * shrink
    scale = snap((high - low) / grid.max_code, dtype)
    return scale, (-low / scale + 0.5).floor().clamp(0, grid.max_code)


# --- choosing codes -------------------------------------------------------------------------------------------------


def nearest_code(t: Float[Tensor, "*shape"], grid: Grid) -> UInt8[Tensor, "*shape"]:
    """The code whose full-width read is nearest to t = w/s + z, half up. With overlap: the high nibble whose cell holds t."""
    q = (t + 0.5).floor().clamp(0, grid.max_code)
    if not grid.overlap:
        return q.to(torch.uint8)
    high = (q / 16).floor()
    low = ((t - 16 * high - 7.5) / 2 + 7.5 + 0.5).floor().clamp(0, 15)
    return (16 * high + low).to(torch.uint8)


@dataclass(frozen=True)
class CodeChooser:
    """argmin_q sum_r weight_r (t_r - p_r(q))^2, exactly: p_r(q) is the sliced code, t_r where width r would like it to be.

    Every width below the parent's depends on a prefix of the code only. So: enumerate the 2^k prefixes that the widths below
    c tell apart, take the best residual of each in closed form (the parent's sliced code counts up by one within a prefix),
    and keep the cheapest. k = 4 for targets 8,4,3,2 under `floor`: 16 candidates instead of 256.

    Each width has its own t and weight, so its read may be any affine map of p: with w_r = scale_r p + offset_r and the squared
    error of a weight x counted lam_r times, t_r = (x - offset_r) / scale_r and weight_r = lam_r scale_r^2.

    widths: below the parent's. parent_counts: whether the parent width is a target; if not, its t only breaks the tie among
    codes that the targets cannot tell apart. fixed: how many planes, most significant first, stay as they are in `now`.
    """

    grid: Grid
    slicing: Slicing
    widths: tuple[int, ...]
    parent_counts: bool
    prefix_bits: int
    fixed: int = 0

    @staticmethod
    def of(targets: Iterable[int], grid: Grid, slicing: Slicing, fixed: int = 0) -> "CodeChooser":
        """`targets`: the widths that count (a mapping's keys will do)."""
        counted = set(targets)
        widths = tuple(sorted((r for r in counted if r < grid.bits), reverse=True))
        k = max((planes_needed(r, grid.bits, slicing) for r in widths), default=0)
        k = max(k, fixed)
        if grid.overlap:
            k = max(k, 4)  # the parent's sliced code counts up by one only within a high nibble
        return CodeChooser(grid, slicing, widths, grid.bits in counted, k, fixed)

    @property
    def streams(self) -> tuple[int, ...]:
        """The widths whose t `choose` wants, in order: the targets below the parent's, then the parent's."""
        return (*self.widths, self.grid.bits)

    @property
    def candidates(self) -> int:
        """How many prefixes `choose` tries for a code."""
        return 2 ** (self.prefix_bits - self.fixed)

    def tables(self, device: torch.device) -> "ChooserTables":
        """What `choose` looks up, on `device`."""
        residuals = 2 ** (self.grid.bits - self.prefix_bits)
        first = (torch.arange(2**self.prefix_bits) * residuals).to(torch.uint8)
        sliced = torch.stack([slice_codes(first, r, self.grid, self.slicing) for r in self.streams])
        return ChooserTables(sliced[:-1].float().to(device), sliced[-1].float().to(device), residuals)

    def choose(
        self, t: Float[Tensor, "streams n"], weight: Float[Tensor, "streams n"], tables: "ChooserTables", now: UInt8[Tensor, " n"] | None = None
    ) -> UInt8[Tensor, " n"]:
        """The best code of each column of t, each >= 0 `weight` in the order of `streams`; `tables` from `tables(t.device)`.

        now: the codes whose `fixed` planes must stay; wanted where any are.
        """
        below, base, residuals = tables
        first = torch.zeros((), dtype=torch.long, device=t.device)
        if self.fixed and now is not None:  # of the prefixes, only those that share the planes of `now`
            cell, choices = (now >> (self.grid.bits - self.fixed)).long(), self.candidates
            below, base = below.reshape(len(below), 2**self.fixed, choices)[:, cell], base.reshape(-1, choices)[cell]
            first = cell[:, None] * choices
        reach = t[-1, :, None] - base
        e = (reach + 0.5).floor_().clamp_(0, residuals - 1)
        if base.shape[-1] == 1:
            return (first * residuals + e.long()).squeeze(1).to(torch.uint8)
        cost = torch.zeros_like(e)
        for t_r, weight_r, p in zip(t, weight, below, strict=False):  # the last t is the parent's
            miss = t_r[:, None] - p
            cost.addcmul_(miss.square_(), weight_r[:, None])
        miss = reach.sub_(e)
        if self.parent_counts:
            cost.addcmul_(miss.square_(), weight[-1, :, None])
        else:
            cost = miss.abs_().masked_fill_(cost > cost.amin(1, keepdim=True), torch.inf)
        best = cost.argmin(1, keepdim=True)
        return ((first + best) * residuals + e.gather(1, best).long()).squeeze(1).to(torch.uint8)


class ChooserTables(NamedTuple):
    """below: sliced code of each prefix, [widths, 2^k]. base: the parent's sliced code of a prefix's first code, to which
    residual e of `residuals` adds e."""

    below: Float[Tensor, "widths prefixes"]
    base: Float[Tensor, " prefixes"]
    residuals: int
