"""Triton kernels over tiles: products with few and with many rows. layout.py has the layout; jit_weight.py makes tiles, and weights of them.

A weight never becomes an integer that is converted. Its bits are shifted under the exponent of 1, so that a nibble h is the half-precision number
1 + h/16 and two bits are 1 + p/4; a shift and a (and, or) make two weights at once. With X the sum of a group's inputs, A = sum (1 + h/16) x,
B = sum (1 + e/16) x of the low nibbles, and the read w = scale p + offset, where p counts h `HIGH`/16 times and e `LOW`/16 times:

    sum w x = scale (HIGH A + LOW B) + (offset - scale (HIGH + LOW)) X

so that scale, offset and the ones that ride along cost three operations a group and nothing a weight. (The customary 1024 + p, see
https://arxiv.org/abs/2408.11743, makes sums up to hundreds of times larger than what they hold; ones are no larger than it, and fit bfloat16.)

Sums are float32. Groups are padded to whole slots of 32 columns, whose inputs count as 0. `APPLY` slots share a group.
A width that stops inside a pair of planes (5, 7) masks what it does not read. `no_type_check` keeps pytest's shape checks off what Triton compiles.
"""

from typing import no_type_check

import triton
import triton.language as tl

SLOT = tl.constexpr(32)  # columns that one dot takes
SLOTS = tl.constexpr(16)  # in a tile
TILE = tl.constexpr(512)  # columns
WORDS = tl.constexpr(16)  # 32-bit words of a tile of one plane; twice as many of a pair


@triton.jit
@no_type_check
def _shift(w, BY: tl.constexpr):
    """w times 2^BY; negative: to the right."""
    if BY >= 0:
        moved = w << BY
    else:
        moved = w >> (0 - BY)
    return moved


@triton.jit
@no_type_check
def _load_words(planes, at, mask):
    return tl.load(planes + at, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def _load_tile(pair, second, third, fourth, sixth, at, at_pair, here, BITS: tl.constexpr):
    """The words of a tile: both sets of pair, second, third, both of fourth, of sixth; what BITS does not need is never read."""
    high0, high1 = _load_words(pair, at_pair, here), _load_words(pair, at_pair + WORDS, here)
    bits2, bits3, low0, low1, last0, last1 = high0, high0, high0, high0, high0, high0
    if BITS > 2:
        bits2 = _load_words(second, at, here)
    if BITS > 3:
        bits3 = _load_words(third, at, here)
    if BITS > 4:
        low0, low1 = _load_words(fourth, at_pair, here), _load_words(fourth, at_pair + WORDS, here)
    if BITS > 6:
        last0, last1 = _load_words(sixth, at_pair, here), _load_words(sixth, at_pair + WORDS, here)
    return high0, high1, bits2, bits3, low0, low1, last0, last1


@triton.jit
@no_type_check
def _high(pair, second, third, Q: tl.constexpr, BITS: tl.constexpr):
    """Quarter Q of a tile as high nibbles, eight a word, from the words of planes 0|1, 2 and 3."""
    word = _shift(pair, 2 - 2 * (Q % 2)) & 0xCCCCCCCC
    if BITS > 2:
        word |= _shift(second, 1 - Q) & 0x22222222
    if BITS > 3:
        word |= _shift(third, -Q) & 0x11111111
    return word


@triton.jit
@no_type_check
def _low(fourth, sixth, Q: tl.constexpr, BITS: tl.constexpr):
    """The same as low nibbles, from the words of planes 4|5 and 6|7."""
    word = _shift(fourth, 2 - 2 * (Q % 2)) & (0x88888888 if BITS == 5 else 0xCCCCCCCC)
    if BITS > 6:
        word |= _shift(sixth, -2 * (Q % 2)) & (0x22222222 if BITS == 7 else 0x33333333)
    return word


@triton.jit
@no_type_check
def _halves(both, BFLOAT: tl.constexpr):
    """The two numbers in a word: (low half, high half)."""
    even, odd = both.to(tl.uint16), (both >> 16).to(tl.uint16)
    if BFLOAT:
        numbers = even.to(tl.bfloat16, bitcast=True), odd.to(tl.bfloat16, bitcast=True)
    else:
        numbers = even.to(tl.float16, bitcast=True), odd.to(tl.float16, bitcast=True)
    return numbers


@triton.jit
@no_type_check
def _ones(word, NIBBLE: tl.constexpr, BFLOAT: tl.constexpr):
    """Nibble NIBBLE of both halves of `word` as two numbers 1 + nibble/16: (even column, odd column)."""
    if BFLOAT:
        both = (_shift(word, 3 - 4 * NIBBLE) & 0x00780078) | 0x3F803F80
    else:
        both = (_shift(word, 6 - 4 * NIBBLE) & 0x03C003C0) | 0x3C003C00
    return _halves(both, BFLOAT)


@triton.jit
@no_type_check
def _ones_of_pairs(pair, FIELD: tl.constexpr, BFLOAT: tl.constexpr):
    """Field FIELD of two bits of both halves as two numbers 1 + p/4."""
    if BFLOAT:
        both = (_shift(pair, 5 - 2 * FIELD) & 0x00600060) | 0x3F803F80
    else:
        both = (_shift(pair, 8 - 2 * FIELD) & 0x03000300) | 0x3C003C00
    return _halves(both, BFLOAT)


@triton.jit
@no_type_check
def _high_of(pair0, pair1, second, third, S: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """Slot S of a tile as numbers 1 + h/16, or 1 + p/4 at 2 bits: (even columns, odd columns)."""
    Q: tl.constexpr = S // 4
    pair = pair0 if Q < 2 else pair1
    if BITS == 2:
        numbers = _ones_of_pairs(pair, 2 * (S % 4) + Q % 2, BFLOAT)
    else:
        numbers = _ones(_high(pair, second, third, Q, BITS), S % 4, BFLOAT)
    return numbers


@triton.jit
@no_type_check
def _low_of(fourth0, fourth1, sixth0, sixth1, S: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """The same of low nibbles, 1 + e/16."""
    Q: tl.constexpr = S // 4
    return _ones(_low(fourth0 if Q < 2 else fourth1, sixth0 if Q < 2 else sixth1, Q, BITS), S % 4, BFLOAT)


@triton.jit
@no_type_check
def _floats(word, S: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Slot S as float32 numbers, of even (HALF 0) or odd columns: 1 + nibble/16 from the nibbles of S's quarter, or 1 + p/4 from PAIRS."""
    if PAIRS:
        number = (_shift(word, 21 - 16 * HALF - 4 * (S % 4) - 2 * (S // 4 % 2)) & 0x00600000) | 0x3F800000
    else:
        number = (_shift(word, 19 - 16 * HALF - 4 * (S % 4)) & 0x00780000) | 0x3F800000
    return number.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _high_floats(pair0, pair1, second, third, S: tl.constexpr, BITS: tl.constexpr):
    """As _high_of, in float32, and without halves on the way."""
    word = pair0 if S < 8 else pair1
    if BITS > 2:
        word = _high(word, second, third, S // 4, BITS)
    return _floats(word, S, 0, BITS == 2), _floats(word, S, 1, BITS == 2)


@triton.jit
@no_type_check
def _low_floats(fourth0, fourth1, sixth0, sixth1, S: tl.constexpr, BITS: tl.constexpr):
    """The same of low nibbles."""
    word = _low(fourth0 if S < 8 else fourth1, sixth0 if S < 8 else sixth1, S // 4, BITS)
    return _floats(word, S, 0, False), _floats(word, S, 1, False)


@triton.jit
@no_type_check
def _read_of(s, m, z, FITTED: tl.constexpr, ZERO: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr, UNIT: tl.constexpr,
             ONES: tl.constexpr):  # fmt: skip
    """(scale, offset less ONES steps) from what is stored, as codes.read_affine and codes.refit_affine. m, z: k and u of a refit if FITTED, else
    z is the zero, or nothing without ZERO. UNIT: of u, in parent steps. MIDDLE: of the range if FITTED, else of the grid."""
    s = s.to(tl.float32)
    if FITTED:
        m = m.to(tl.float32) * 0.0078125
        read = s * (m * STEP), s * (m * (SHIFT - MIDDLE - STEP * ONES) + (MIDDLE - z.to(tl.float32) * UNIT))
    elif ZERO:
        read = s * STEP, s * (SHIFT - STEP * ONES - z.to(tl.float32))
    else:
        read = s * STEP, s * (SHIFT - STEP * ONES - MIDDLE)
    return read


@triton.jit
@no_type_check
def _affine(scale, fit, zero, at, mask, STEP: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr, UNIT: tl.constexpr, FITTED: tl.constexpr):
    """(scale, offset) of groups."""
    s = tl.load(scale + at, mask=mask, other=0.0)
    m, z = s, s
    if FITTED:
        m = tl.load(fit + at, mask=mask, other=0)
    if zero is not None:
        z = tl.load(zero + at, mask=mask, other=0)
    return _read_of(s, m, z, FITTED, zero is not None, STEP, SHIFT, MIDDLE, UNIT, 0)


@triton.jit
@no_type_check
def gemv(
    x, y, pair, second, third, fourth, sixth, scale, fit, zero, bias, tokens, out, in_features, groups, tiles, per_split,
    BITS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr, UNIT: tl.constexpr,
    FITTED: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, APPLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x times BLOCK_N of the weight, over `per_split` tiles, BLOCK_K at a time; on ordinary float32 units.

    y: float32 [splits, tokens, out] if PARTIAL, else the product [tokens, out] in the dtype of y.
    A thread holds four words (128 bits) of a row and the inputs that meet them, for as many rows as BLOCK_N says.
    """
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None, None]
    k = tl.arange(0, BLOCK_K)[None, None, :, None]
    words, columns = tl.arange(0, WORDS)[None, None, None, :], tl.arange(0, SLOT)[None, None, None, :]
    split = tl.program_id(1)
    acc = tl.full((BLOCK_M, BLOCK_N, BLOCK_K, WORDS), 0, tl.float32)
    shifted = tl.full((BLOCK_M, BLOCK_N, BLOCK_K, 1), 0, tl.float32)
    last = tl.minimum((split + 1) * per_split, tiles)
    for first in tl.range(split * per_split, last, BLOCK_K, num_stages=STAGES):
        tile = first + k
        here = (n < out) & (tile < last)
        at = (n * tiles + tile) * WORDS + words
        at_pair = at + (n * tiles + tile) * WORDS
        high0, high1, bits2, bits3, low0, low1, last0, last1 = _load_tile(pair, second, third, fourth, sixth, at, at_pair, here, BITS)
        for unit in tl.static_range(SLOTS // APPLY):
            column = tile * TILE + unit * APPLY * SLOT
            group = column // PADDED
            inside = column - group * PADDED
            known = (tile < last) & (group < groups)
            sc, of = _affine(scale, fit, zero, n * groups + group, (n < out) & known, STEP, SHIFT, MIDDLE, UNIT, FITTED)
            a = tl.full((BLOCK_M, BLOCK_N, BLOCK_K, WORDS), 0, tl.float32)
            b = tl.full((BLOCK_M, BLOCK_N, BLOCK_K, WORDS), 0, tl.float32)
            total = tl.full((BLOCK_M, 1, BLOCK_K, WORDS), 0, tl.float32)
            for slot in tl.static_range(APPLY):
                where = inside + slot * SLOT + columns
                loaded = tl.load(x + m * in_features + group * GROUP + where, mask=(m < tokens) & known & (where < GROUP), other=0.0)
                even, odd = tl.split(loaded.to(tl.float32).reshape(BLOCK_M, 1, BLOCK_K, WORDS, 2))
                total += even + odd
                w_even, w_odd = _high_floats(high0, high1, bits2, bits3, unit * APPLY + slot, BITS)
                a += w_even * even
                a += w_odd * odd
                if BITS > 4:
                    w_even, w_odd = _low_floats(low0, low1, last0, last1, unit * APPLY + slot, BITS)
                    b += w_even * even
                    b += w_odd * odd
            acc += (sc * HIGH) * a
            if BITS > 4:
                acc += (sc * LOW) * b
            shifted += (of - sc * (HIGH + LOW)) * tl.sum(total, axis=3, keep_dims=True)
    product = tl.sum(tl.sum(acc, axis=3) + tl.reshape(shifted, (BLOCK_M, BLOCK_N, BLOCK_K)), axis=2)
    row, column = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    store = (row < tokens)[:, None] & (column < out)[None, :]
    if PARTIAL:
        tl.store(y + (split * tokens + row)[:, None] * out + column[None, :], product, mask=store)
    else:
        if bias is not None:
            product += tl.load(bias + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
        tl.store(y + row[:, None] * out + column[None, :], product.to(y.dtype.element_ty), mask=store)


@triton.jit
@no_type_check
def dot(
    x, y, pair, second, third, fourth, sixth, scale, fit, zero, bias, tokens, out, in_features, groups, tiles, per_split,
    BITS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr, UNIT: tl.constexpr,
    FITTED: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, APPLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The same on tensor cores, a tile at a time: rows of the weight are the left operand, so that few rows of x need no padding to 16.

    KIND: of the operands: 0 float16, 1 bfloat16, 2 float32 (not rounded to tf32).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    words, columns = tl.arange(0, WORDS), tl.arange(0, RUN * SLOT)
    here = (n < out)[:, None]
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    last = tl.minimum((split + 1) * per_split, tiles)
    for tile in tl.range(split * per_split, last, num_stages=STAGES):
        at = (n[:, None] * tiles + tile) * WORDS + words[None, :]
        at_pair = at + (n[:, None] * tiles + tile) * WORDS
        high0, high1, bits2, bits3, low0, low1, last0, last1 = _load_tile(pair, second, third, fourth, sixth, at, at_pair, here, BITS)
        for unit in tl.static_range(SLOTS // APPLY):
            column = tile * TILE + unit * APPLY * SLOT
            group = column // PADDED
            inside = column - group * PADDED
            known = group < groups  # of a padded tile, not all are
            sc, of = _affine(scale, fit, zero, n * groups + group, n < tl.where(known, out, 0), STEP, SHIFT, MIDDLE, UNIT, FITTED)
            a = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
            b = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
            total = tl.full((RUN * SLOT, BLOCK_M), 0, tl.float32)
            for run in tl.static_range(APPLY // RUN):
                where = inside + run * RUN * SLOT + columns
                real = (where < tl.where(known, GROUP, 0))[:, None] & (m < tokens)[None, :]
                inputs = tl.load(x + m[None, :] * in_features + (group * GROUP + where)[:, None], mask=real, other=0.0)
                total += inputs.to(tl.float32)
                w = _run_of(high0, high1, bits2, bits3, False, unit * APPLY + run * RUN, RUN, BLOCK_N, BITS, KIND)
                a = tl.dot(w, inputs, a, input_precision="ieee")
                if BITS > 4:
                    w = _run_of(low0, low1, last0, last1, True, unit * APPLY + run * RUN, RUN, BLOCK_N, BITS, KIND)
                    b = tl.dot(w, inputs, b, input_precision="ieee")
            acc += (sc * HIGH)[:, None] * a
            if BITS > 4:
                acc += (sc * LOW)[:, None] * b
            acc += (of - sc * (HIGH + LOW))[:, None] * tl.sum(total, axis=0)[None, :]
    store = (n < out)[:, None] & (m < tokens)[None, :]
    if PARTIAL:
        tl.store(y + (split * tokens + m)[None, :] * out + n[:, None], acc, mask=store)
    else:
        if bias is not None:
            acc += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
        tl.store(y + m[None, :] * out + n[:, None], acc.to(y.dtype.element_ty), mask=store)


@triton.jit
@no_type_check
def _run_of(a, b, c, d, LOW: tl.constexpr, S: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """RUN slots of high or low nibbles from S on as the columns of an operand. a, b, c, d: as `_high_of` or `_low_of` takes them."""
    w0 = _slot_of(a, b, c, d, LOW, S, BITS, KIND)
    if RUN == 1:
        w = tl.join(w0[0], w0[1]).reshape(BLOCK_N, SLOT)
    elif RUN == 2:
        w1 = _slot_of(a, b, c, d, LOW, S + 1, BITS, KIND)
        w = _two(w0, w1, BLOCK_N)
    else:
        w1 = _slot_of(a, b, c, d, LOW, S + 1, BITS, KIND)
        w2 = _slot_of(a, b, c, d, LOW, S + 2, BITS, KIND)
        w3 = _slot_of(a, b, c, d, LOW, S + 3, BITS, KIND)
        w = _four(w0, w1, w2, w3, BLOCK_N)
    if KIND == 2:
        w = w.to(tl.float32)
    return w


@triton.jit
@no_type_check
def _slot_of(a, b, c, d, LOW: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    if LOW:
        w = _low_of(a, b, c, d, S, BITS, KIND == 1)
    else:
        w = _high_of(a, b, c, d, S, BITS, KIND == 1)
    return w


@triton.jit
@no_type_check
def _two(w0, w1, BLOCK_N: tl.constexpr):
    both = tl.join(tl.join(w0[0], w0[1]), tl.join(w1[0], w1[1]))
    return tl.permute(both, (0, 3, 1, 2)).reshape(BLOCK_N, 2 * SLOT)


@triton.jit
@no_type_check
def _four(w0, w1, w2, w3, BLOCK_N: tl.constexpr):
    first = tl.join(tl.join(w0[0], w0[1]), tl.join(w1[0], w1[1]))
    second = tl.join(tl.join(w2[0], w2[1]), tl.join(w3[0], w3[1]))
    return tl.permute(tl.join(first, second), (0, 4, 3, 1, 2)).reshape(BLOCK_N, 4 * SLOT)


@triton.jit
@no_type_check
def add_splits(partial, y, bias, splits, tokens, out, BLOCK: tl.constexpr):
    """y[m, n] = sum over splits of partial[s, m, n], always in the order of s, + bias."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    mask = n < out
    total = tl.full((BLOCK,), 0, tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * tokens + m) * out + n, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m * out + n, total.to(y.dtype.element_ty), mask=mask)
