"""Triton kernels of fake quantization: what matquant.fake makes in some dozens of passes over a weight, in one each way, with the same numbers.

A program takes some groups of weights, [groups, size]; GROUPS of them, each padded to PADDED. `no_type_check` keeps pytest's shape checks off
what Triton compiles.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _level(
    w, s, z, MAX_CODE: tl.constexpr, CUT: tl.constexpr, HALF_UP: tl.constexpr, TOP: tl.constexpr, UNDER: tl.constexpr, STEP: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """(step p + shift - mid, in, under). CUT: planes that are cut off. HALF_UP: whether the first of these rounds what is left, up to TOP, which
    codes from UNDER would pass."""
    q = tl.floor(tl.div_rn(w, s[:, None]) + z[:, None] + 0.5)
    inside = (q >= 0) & (q <= MAX_CODE)
    code = tl.minimum(tl.maximum(q, 0.0), MAX_CODE * 1.0).to(tl.int32)
    p = code >> CUT
    if HALF_UP and CUT > 0:
        p = tl.minimum(p + ((code >> (CUT - 1)) & 1), TOP)
    return p.to(tl.float32) * STEP + ADDED, inside, inside & (q < UNDER)


@triton.jit
@no_type_check
def _grid(scale, zero, m, u, rows, here, OWN: tl.constexpr):
    """(s, z, m, u) of some groups."""
    s, z = tl.load(scale + rows, mask=here, other=1.0), tl.load(zero + rows, mask=here, other=0.0)
    if OWN:
        stretch, moved = tl.load(m + rows, mask=here, other=1.0), tl.load(u + rows, mask=here, other=0.0)
    else:
        stretch, moved = s * 0.0 + 1.0, z
    return s, z, stretch, moved


@triton.jit
@no_type_check
def read(
    w, scale, zero, m, u, out, groups, size, MID: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, MAX_CODE: tl.constexpr,
    CUT: tl.constexpr, HALF_UP: tl.constexpr, TOP: tl.constexpr, UNDER: tl.constexpr, STEP: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """out = s (m level + mid - u). m, u: None unless OWN."""
    rows, columns = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, PADDED)
    here = rows < groups
    at, inner = rows.to(tl.int64)[:, None] * size + columns[None, :], here[:, None] & (columns < size)[None, :]
    s, z, stretch, moved = _grid(scale, zero, m, u, rows, here, OWN)
    level, _, _ = _level(tl.load(w + at, mask=inner, other=0.0), s, z, MAX_CODE, CUT, HALF_UP, TOP, UNDER, STEP, ADDED)
    tl.store(out + at, (level * stretch[:, None] + (MID - moved)[:, None]) * s[:, None], mask=inner)


@triton.jit
@no_type_check
def gradients(
    w, scale, zero, m, u, g, dw, ds, dz, dm, du, groups, size, MID: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr,
    MAX_CODE: tl.constexpr, CUT: tl.constexpr, HALF_UP: tl.constexpr, TOP: tl.constexpr, UNDER: tl.constexpr, STEP: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Those of matquant.fake from g, that of the read. dm, du: None unless OWN; dw: None if it is not wanted; without them u is z, and dz is of both."""
    rows, columns = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, PADDED)
    here = rows < groups
    at, inner = rows.to(tl.int64)[:, None] * size + columns[None, :], here[:, None] & (columns < size)[None, :]
    s, z, stretch, moved = _grid(scale, zero, m, u, rows, here, OWN)
    weight, pull = tl.load(w + at, mask=inner, other=0.0), tl.load(g + at, mask=inner, other=0.0)
    level, inside, under = _level(weight, s, z, MAX_CODE, CUT, HALF_UP, TOP, UNDER, STEP, ADDED)
    if dw is not None:
        tl.store(dw + at, tl.where(inside, pull, 0.0) * stretch[:, None], mask=inner)
    stops = tl.where(under, pull, 0.0)
    total, along, through = tl.sum(pull, 1), tl.sum(pull * level, 1), tl.sum(stops, 1)
    tl.store(ds + rows, stretch * along + (MID - moved) * total - stretch / s * tl.sum(stops * weight, 1), mask=here)
    if OWN:
        tl.store(dz + rows, s * stretch * through, mask=here)
        tl.store(dm + rows, s * along, mask=here)
        tl.store(du + rows, -s * total, mask=here)
    else:
        tl.store(dz + rows, s * through - s * total, mask=here)
