"""What jit_mma computes with: who holds what (layouts), words of planes as operands of tensor cores, scales where the sums are. In Gluon.

A layout says which lane of which warp holds an element, and in which of its registers. `assert_trivial` fails to compile where a change of layouts
would move anything.
"""

from typing import no_type_check

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matquant.kernels.gpu.jit import SLOT, SLOTS, TILE, _high, _low, _shift

# --- layouts --------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def mma_layout(W):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])


@triton.constexpr_function
def planes_layout(W):
    return gl.BlockedLayout([1, 1, 4], [1, 8, 4], [W, 1, 1], [2, 1, 0])


@triton.constexpr_function
def inputs_layout(W, ROWS):
    """[W, columns, times, ROWS]: lanes of different `times` hold the same row."""
    lanes = min(ROWS, 8)
    return gl.BlockedLayout([1, 8, 1, 1], [1, 4, 8 // lanes, lanes], [W, 1, 1, 1], [1, 3, 2, 0])


@triton.constexpr_function
def copy_layout(W):
    return gl.BlockedLayout([1, 1, 8], [1, 1, 32], [W, 1, 1], [2, 1, 0])


@triton.constexpr_function
def units_layout(W, N, UNITS):
    """[W, N, UNITS], where a lane holds all units of the rows of which it holds sums."""
    powers = lambda count: [2**i for i in range(count.bit_length() - 1)]  # noqa: E731
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, unit] for unit in powers(UNITS)] + [[0, 8 * row, 0] for row in powers(N // 8)],
        lane_bases=[[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[warp, 0, 0] for warp in powers(W)], block_bases=[], shape=[W, N, UNITS],
    )  # fmt: skip


@triton.constexpr_function
def rows_shared(RUNS, ROWS):
    """Of inputs: rows that are read at once lie in different banks."""
    return gl.SwizzledSharedLayout(32, 1, 2, [2, 1, 0]) if RUNS > 1 and ROWS > 1 else gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])


# --- weights --------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _move(BITS, FIELD, MANTISSA):
    """By how much field FIELD of BITS bits goes to the left, to be the first of a mantissa."""
    return MANTISSA - BITS - BITS * FIELD


@triton.constexpr_function
def _mask(BITS, MANTISSA):
    """One instruction, (a and mask) or exponents of 1 (compilers make two of it), for the two halves of a word."""
    mask, ones = ((1 << BITS) - 1) << (MANTISSA - BITS), (1 << (14 - MANTISSA)) - 1 << MANTISSA
    return f"lop3.b32 $0, $1, 0x{mask:04x}{mask:04x}, 0x{ones:04x}{ones:04x}, 0xea;"


@gluon.jit
@no_type_check
def _numbers(word, FIELD: gl.constexpr, BITS: gl.constexpr, BFLOAT: gl.constexpr):
    """jit._ones (BITS 4) and jit._ones_of_pairs (2), as [..., 2]."""
    MANTISSA: gl.constexpr = 7 if BFLOAT else 10
    moved = _shift(word, _move(BITS, FIELD, MANTISSA))
    both = gl.inline_asm_elementwise(_mask(BITS, MANTISSA), "=r,r", [moved], dtype=gl.uint32, is_pure=True, pack=1)
    dtype: gl.constexpr = gl.bfloat16 if BFLOAT else gl.float16
    return gl.join(both.to(gl.uint16).to(dtype, bitcast=True), (both >> 16).to(gl.uint16).to(dtype, bitcast=True))


@gluon.jit
@no_type_check
def _slot(a, b, c, d, LOW: gl.constexpr, S: gl.constexpr, BITS: gl.constexpr, BFLOAT: gl.constexpr):
    """Slot S [W, N, 16, 2]. a, b, c, d: high nibbles' pair sets, second, third; or low nibbles' fourth and sixth, two sets each."""
    if LOW:
        numbers = _numbers(_low(a if S < 8 else b, c if S < 8 else d, S // 4, BITS), S % 4, 4, BFLOAT)
    elif BITS == 2:
        numbers = _numbers(a if S < 8 else b, 2 * (S % 4) + S // 4 % 2, 2, BFLOAT)
    else:
        numbers = _numbers(_high(a if S < 8 else b, c, d, S // 4, BITS), S % 4, 4, BFLOAT)
    return numbers


@gluon.jit
@no_type_check
def weights(
    a, b, c, d, LOW: gl.constexpr, S: gl.constexpr, RUNS: gl.constexpr, W: gl.constexpr, N: gl.constexpr, BITS: gl.constexpr, BFLOAT: gl.constexpr
):
    """Slots S to S + RUNS - 1 as the left operand [W, N, 32 RUNS]."""
    w0 = _slot(a, b, c, d, LOW, S, BITS, BFLOAT)
    if RUNS == 1:
        w = gl.permute(w0.reshape(W, N, 4, 2, 2, 2), (0, 1, 3, 4, 2, 5))
    elif RUNS == 2:
        w = gl.join(w0, _slot(a, b, c, d, LOW, S + 1, BITS, BFLOAT)).reshape(W, N, 4, 2, 2, 2, 2)
        w = gl.permute(w, (0, 1, 6, 3, 4, 2, 5))
    else:
        first = gl.join(w0, _slot(a, b, c, d, LOW, S + 1, BITS, BFLOAT))
        second = gl.join(_slot(a, b, c, d, LOW, S + 2, BITS, BFLOAT), _slot(a, b, c, d, LOW, S + 3, BITS, BFLOAT))
        w = gl.permute(gl.join(first, second).reshape(W, N, 4, 2, 2, 2, 2, 2), (0, 1, 7, 6, 3, 4, 2, 5))
    return gl.convert_layout(w.reshape(W, N, RUNS * SLOT), gl.DotOperandLayout(0, mma_layout(W), 2), assert_trivial=True)


# --- scales ---------------------------------------------------------------------------------------------------------------


@gluon.jit
@no_type_check
def groups_at(n, tile, unit, groups, tiles, GROUP: gl.constexpr, APPLY: gl.constexpr, WHOLE: gl.constexpr):
    """Where the groups of a tile's units are in [out, groups]; of what is past the end, the last."""
    tile = gl.minimum(tile, tiles - 1)
    if TILE % GROUP == 0:
        group = tile * (SLOTS // APPLY) + unit
    else:
        group = (tile * TILE + unit * (APPLY * SLOT)) // GROUP
    if not WHOLE:
        group = gl.minimum(group, groups - 1)
    return n * groups + group


@gluon.jit
@no_type_check
def _half(t, ODD: gl.constexpr, W: gl.constexpr, N: gl.constexpr, U: gl.constexpr):
    """Every other one of [W, N, U]."""
    even, odd = gl.split(t.reshape(W, N, U // 2, 2))
    if ODD:
        even = odd
    return even


@gluon.jit
@no_type_check
def pick(t, INDEX: gl.constexpr, W: gl.constexpr, N: gl.constexpr, U: gl.constexpr):
    """t[:, :, INDEX] of [W, N, U], where the sums are."""
    if U > 8:
        t = _half(t, INDEX % 2, W, N, U)
    if U > 4:
        t = _half(t, INDEX // (U // 8) % 2, W, N, 8)
    if U > 2:
        t = _half(t, INDEX // (U // 4) % 2, W, N, 4)
    if U > 1:
        t = _half(t, INDEX // (U // 2) % 2, W, N, 2)
    return gl.convert_layout(t.reshape(W, N), gl.SliceLayout(2, mma_layout(W)), assert_trivial=True)
