"""Triton kernels that make tiles from planes, and the dense weight from tiles. jit.py has the arithmetic, layout.py the layout."""

from typing import no_type_check

import triton
import triton.language as tl

from matquant.kernels.gpu.jit import SLOT, SLOTS, TILE, WORDS, _affine, _high_of, _load_tile, _low_of


@triton.jit
@no_type_check
def dense(
    w, pair, second, third, fourth, sixth, scale, fit, zero, first, rows, in_features, groups, tiles,
    BITS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr, UNIT: tl.constexpr,
    FITTED: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w[rows, in]: `rows` rows of the weight from row `first` on, computed in float32 and rounded once. A program makes a tile of BLOCK_N rows."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, here = (first + row).to(tl.int64), row < rows
    tile = tl.program_id(1)
    words, columns = tl.arange(0, WORDS), tl.arange(0, SLOT)
    at = (n[:, None] * tiles + tile) * WORDS + words[None, :]
    at_pair = at + (n[:, None] * tiles + tile) * WORDS
    high0, high1, bits2, bits3, low0, low1, last0, last1 = _load_tile(pair, second, third, fourth, sixth, at, at_pair, here[:, None], BITS)
    for slot in tl.static_range(SLOTS):
        column = tile * TILE + slot * SLOT
        group = column // PADDED
        where = column - group * PADDED + columns
        known = group < groups
        sc, of = _affine(scale, fit, zero, n * groups + group, row < tl.where(known, rows, 0), STEP, SHIFT, MIDDLE, UNIT, FITTED)
        even, odd = _high_of(high0, high1, bits2, bits3, slot, BITS, False)
        code = (tl.join(even, odd).reshape(BLOCK_N, SLOT).to(tl.float32) - 1.0) * HIGH
        if BITS > 4:
            even, odd = _low_of(low0, low1, last0, last1, slot, BITS, False)
            code += (tl.join(even, odd).reshape(BLOCK_N, SLOT).to(tl.float32) - 1.0) * LOW
        read = code * sc[:, None] + of[:, None]
        mask = here[:, None] & (where < tl.where(known, GROUP, 0))[None, :]
        tl.store(w + row.to(tl.int64)[:, None] * in_features + (group * GROUP + where)[None, :], read.to(w.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def tile_plane(
    words_out, upper, lower, rows, row_bytes, groups, tiles,
    PAIR: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One array of tiles from one plane of a checkpoint, or from two (PAIR; lower may be None: zeros). A program makes a tile of BLOCK_N rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tile = tl.program_id(1)
    words = tl.arange(0, WORDS)[None, :]
    word = tl.full((BLOCK_N, WORDS), 0, tl.int32)
    for slot in tl.static_range(SLOTS):
        for odd in tl.static_range(2):
            column = tile * TILE + slot * SLOT + 2 * words + odd
            group = column // PADDED
            where = column - group * PADDED
            real = group * GROUP + where
            mask = (n < rows) & (where < GROUP) & (group < groups)
            byte = tl.load(upper + n.to(tl.int64) * row_bytes + real // 8, mask=mask, other=0).to(tl.int32)
            bit = (byte >> (real % 8)) & 1
            if PAIR:
                bit = bit << 1
                if lower is not None:
                    byte = tl.load(lower + n.to(tl.int64) * row_bytes + real // 8, mask=mask, other=0).to(tl.int32)
                    bit |= (byte >> (real % 8)) & 1
                word |= bit << (16 * odd + 4 * (slot % 4) + 2 * (slot // 4 % 2))
                if slot == 7 and odd == 1:
                    tl.store(words_out + (n.to(tl.int64) * tiles + tile) * (2 * WORDS) + words, word, mask=n < rows)
                    word = tl.full((BLOCK_N, WORDS), 0, tl.int32)
            else:
                word |= bit << (16 * odd + 4 * (slot % 4) + slot // 4)
    if PAIR:
        tl.store(words_out + (n.to(tl.int64) * tiles + tile) * (2 * WORDS) + WORDS + words, word, mask=n < rows)
    else:
        tl.store(words_out + (n.to(tl.int64) * tiles + tile) * WORDS + words, word, mask=n < rows)
