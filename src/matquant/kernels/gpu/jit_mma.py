"""The product with few rows of x on NVIDIA's tensor cores (mma.sync, compute capability 8.0), with every layout spelled out: Gluon, Triton's lower half.

The arithmetic is jit.py's. What is spelled out is who holds what, so that no weight passes through shared memory after it was unpacked:

    warp w of W       tiles w, w + W, ... of its rows: warps split the sum, and add up at the end
    lane 4 g + t      of rows g and g + 8: words 4t to 4t + 3, a load of 128 bits, which are columns 8t to 8t + 7 of every slot
    operand           column 8t + 4j + 2h + e of a slot is column 16j + 8h + 2t + e of what tl.dot would call k: the order of a sum is ours to choose,
                      and in this one the lane that holds a word is the lane whose operand it is; so are 16 bytes of x

Planes, scales and inputs of the next `STAGES` - 1 tiles are under way to shared memory (cp.async) while one is computed. With STAGES 1 nothing is:
registers take it all, which is better where the inputs of many rows would fill shared memory.
The sum of a group's inputs is a product with ones, on tensor cores as well: a column of it lies where the products lie.
PDL (compute capability 9.0): the kernel starts while the one before it runs, asks for its weights, which that one does not write, and only then waits.
"""

from typing import no_type_check

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from matquant.kernels.gpu.jit import SLOT, SLOTS, TILE, WORDS, _load_tile, _read_of
from matquant.kernels.gpu.jit_operands import (
    copy_layout,
    groups_at,
    inputs_layout,
    mma_layout,
    pick,
    planes_layout,
    rows_shared,
    units_layout,
    weights,
)  # fmt: skip

_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared  # its name up to Triton 3.6
RUN = gl.constexpr(4)  # slots of one product, at most


# --- where a tile comes from ----------------------------------------------------------------------------------------------


@gluon.jit
@no_type_check
def _issue(buffers, pointers, stage, step, here, BITS: gl.constexpr):
    """Begin to copy the words of the tile `step` tiles on into buffers at `stage`."""
    pair0, pair1, second_, third_, fourth0, fourth1, sixth0, sixth1 = buffers
    pair, second, third, fourth, sixth = pointers
    pair += step * (2 * WORDS)
    _copy(pair0.index(stage), pair, mask=here)
    _copy(pair1.index(stage), pair + WORDS, mask=here)
    if BITS > 2:
        _copy(second_.index(stage), second + step * WORDS, mask=here)
    if BITS > 3:
        _copy(third_.index(stage), third + step * WORDS, mask=here)
    if BITS > 4:
        fourth += step * (2 * WORDS)
        _copy(fourth0.index(stage), fourth, mask=here)
        _copy(fourth1.index(stage), fourth + WORDS, mask=here)
    if BITS > 6:
        sixth += step * (2 * WORDS)
        _copy(sixth0.index(stage), sixth, mask=here)
        _copy(sixth1.index(stage), sixth + WORDS, mask=here)


@gluon.jit
@no_type_check
def _issue_scales(buffers, scale, fit, zero, at, stage, FITTED: gl.constexpr):
    s, f, z = buffers
    _copy(s.index(stage), scale + at)
    if FITTED:
        _copy(f.index(stage), fit + at)
    if zero is not None:
        _copy(z.index(stage), zero + at)


@gluon.jit
@no_type_check
def _take(buffer, stage, layout: gl.constexpr):
    return buffer.index(stage).load(layout).to(gl.uint32, bitcast=True)


@gluon.jit
@no_type_check
def _take_words(buffers, stage, BITS: gl.constexpr, W: gl.constexpr):
    """The words of a tile from shared memory; what BITS does not need repeats the first."""
    pair0, pair1, second_, third_, fourth0, fourth1, sixth0, sixth1 = buffers
    layout: gl.constexpr = planes_layout(W)
    a, b = _take(pair0, stage, layout), _take(pair1, stage, layout)
    c, d, e, f, g, h = a, a, a, a, a, a
    if BITS > 2:
        c = _take(second_, stage, layout)
    if BITS > 3:
        d = _take(third_, stage, layout)
    if BITS > 4:
        e, f = _take(fourth0, stage, layout), _take(fourth1, stage, layout)
    if BITS > 6:
        g, h = _take(sixth0, stage, layout), _take(sixth1, stage, layout)
    return a, b, c, d, e, f, g, h


@gluon.jit
@no_type_check
def _right(inputs, RUNS: gl.constexpr, W: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr):
    """[W, 32 RUNS, ROWS] as the right operand [W, 32 RUNS, M], its columns in the order of `weights`, its rows repeated."""
    if ROWS < M:
        times = gl.zeros([1, 1, M // ROWS, 1], inputs.dtype, layout=inputs_layout(W, ROWS))
        inputs, times = gl.broadcast(gl.expand_dims(inputs, 2), times)
    inputs = gl.permute(inputs.reshape(W, RUNS, 4, 2, 2, 2, M), (0, 1, 3, 4, 2, 5, 6)).reshape(W, RUNS * SLOT, M)
    return gl.convert_layout(inputs, gl.DotOperandLayout(1, mma_layout(W), 2), assert_trivial=True)


# --- the kernel -----------------------------------------------------------------------------------------------------------


@gluon.jit
@no_type_check
def _tile(
    acc, words, scales, offsets, source, column, in_features, ones, SHARED: gl.constexpr, WHOLE: gl.constexpr, BITS: gl.constexpr,
    HIGH: gl.constexpr, LOW: gl.constexpr, APPLY: gl.constexpr, W: gl.constexpr, N: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr,
    BFLOAT: gl.constexpr,
):  # fmt: skip
    """acc [W, N, M] and a tile's products. source: of inputs, [W, 512, ROWS] in shared memory or pointers [W, 32 RUNS, M] to its first columns.
    column: of these."""
    a0, a1, a2, a3, b0, b1, b2, b3 = words
    RUNS: gl.constexpr = min(RUN, APPLY)
    UNITS: gl.constexpr = SLOTS // APPLY
    nothing = gl.zeros([W, N, M], gl.float32, layout=mma_layout(W))
    for unit in gl.static_range(UNITS):
        a, b, total = nothing, nothing, nothing
        for run in gl.static_range(APPLY // RUNS):
            if SHARED:
                inputs = source.slice((unit * APPLY + run * RUNS) * SLOT, RUNS * SLOT, dim=1).load(gl.SliceLayout(2, inputs_layout(W, ROWS)))
            elif WHOLE:
                inputs = gl.load(source + (unit * APPLY + run * RUNS) * SLOT)
            else:
                real = column + (unit * APPLY + run * RUNS) * SLOT < in_features
                inputs = gl.load(source + (unit * APPLY + run * RUNS) * SLOT, mask=real, other=0.0)
            inputs = _right(inputs, RUNS, W, M, ROWS)
            a = mma_v2(weights(a0, a1, a2, a3, False, unit * APPLY + run * RUNS, RUNS, W, N, BITS, BFLOAT), inputs, a)
            if BITS > 4:
                b = mma_v2(weights(b0, b1, b2, b3, True, unit * APPLY + run * RUNS, RUNS, W, N, BITS, BFLOAT), inputs, b)
            total = mma_v2(ones, inputs, total)
        scale = pick(scales, unit, W, N, UNITS)
        acc += (scale * HIGH)[:, :, None] * a
        if BITS > 4:
            acc += (scale * LOW)[:, :, None] * b
        acc += pick(offsets, unit, W, N, UNITS)[:, :, None] * total
    return acc


@gluon.jit
@no_type_check
def _after(number, PDL: gl.constexpr):
    """`number`, once the kernel before this one has written what it writes."""
    if PDL:
        number = gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
    return number


@gluon.jit
@no_type_check
def _buffer(dtype: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, N: gl.constexpr, LAST: gl.constexpr):
    return gl.allocate_shared_memory(dtype, [STAGES, W, N, LAST], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.jit
@no_type_check
def _words_buffers(BITS: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, N: gl.constexpr):
    """In the order of `_issue`; what BITS does not need repeats the first."""
    a, b = _buffer(gl.int32, STAGES, W, N, WORDS), _buffer(gl.int32, STAGES, W, N, WORDS)
    c, d, e, f, g, h = a, a, a, a, a, a
    if BITS > 2:
        c = _buffer(gl.int32, STAGES, W, N, WORDS)
    if BITS > 3:
        d = _buffer(gl.int32, STAGES, W, N, WORDS)
    if BITS > 4:
        e, f = _buffer(gl.int32, STAGES, W, N, WORDS), _buffer(gl.int32, STAGES, W, N, WORDS)
    if BITS > 6:
        g, h = _buffer(gl.int32, STAGES, W, N, WORDS), _buffer(gl.int32, STAGES, W, N, WORDS)
    return a, b, c, d, e, f, g, h


@gluon.jit
@no_type_check
def _scales_buffers(
    scale, fit, zero, FITTED: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, N: gl.constexpr, UNITS: gl.constexpr
):  # fmt: skip
    s = _buffer(scale.dtype.element_ty, STAGES, W, N, UNITS)
    f, z = s, s
    if FITTED:
        f = _buffer(fit.dtype.element_ty, STAGES, W, N, UNITS)
    if zero is not None:
        z = _buffer(zero.dtype.element_ty, STAGES, W, N, UNITS)
    return s, f, z


@gluon.jit
@no_type_check
def _scale_of(buffer, array, at, stage, layout: gl.constexpr, SHARED: gl.constexpr):
    if SHARED:
        found = buffer.index(stage).load(layout)
    else:
        found = gl.load(array + at)
    return found


@gluon.jit
@no_type_check
def _take_scales(buffers, scale, fit, zero, at, stage, layout: gl.constexpr, FITTED: gl.constexpr, SHARED: gl.constexpr):
    """(scale, fit, zero) as stored; what is not there repeats the scale."""
    s_buffer, f_buffer, z_buffer = buffers
    s = _scale_of(s_buffer, scale, at, stage, layout, SHARED)
    f, z = s, s
    if FITTED:
        f = _scale_of(f_buffer, fit, at, stage, layout, SHARED)
    if zero is not None:
        z = _scale_of(z_buffer, zero, at, stage, layout, SHARED)
    return s, f, z


@gluon.jit
@no_type_check
def _indices(out, W: gl.constexpr, N: gl.constexpr, UNITS: gl.constexpr):
    """(warps of planes; rows, warps, units of scales), of a program."""
    units: gl.constexpr = units_layout(W, N, UNITS)
    k_p = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, planes_layout(W))))[:, None, None]
    n_s = gl.minimum(gl.program_id(0) * N + gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, units))), out - 1)[None, :, None]
    k_s = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, units)))[:, None, None]
    return k_p, n_s, k_s, gl.arange(0, UNITS, layout=gl.SliceLayout(0, gl.SliceLayout(1, units)))[None, None, :]


@gluon.jit
@no_type_check
def _copied(
    x, pointers, scale, fit, zero, tokens, out, in_features, groups, tiles, start, last, BITS: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr,
    STEP: gl.constexpr, SHIFT: gl.constexpr, MIDDLE: gl.constexpr, UNIT: gl.constexpr, FITTED: gl.constexpr, GROUP: gl.constexpr,
    APPLY: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, BFLOAT: gl.constexpr, ROWS: gl.constexpr,
    WHOLE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Sums [W, N, M] over tiles `start` to `last`, with copies under way."""
    UNITS: gl.constexpr = SLOTS // APPLY
    SCALES: gl.constexpr = UNITS >= 4 and TILE % GROUP == 0 and WHOLE  # copies are of 4 bytes or more
    units: gl.constexpr = units_layout(W, N, UNITS)
    copying: gl.constexpr = copy_layout(W)
    k_p, n_s, k_s, u_s = _indices(out, W, N, UNITS)
    k_x = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, copying)))[:, None, None]
    c_x = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(1, copying)))[None, None, :]
    m_x = gl.minimum(gl.program_id(2) * M + gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, copying))), tokens - 1)[None, :, None]

    buffers = _words_buffers(BITS, STAGES, W, N)
    s_buffers = buffers[0], buffers[0], buffers[0]
    if SCALES:
        s_buffers = _scales_buffers(scale, fit, zero, FITTED, STAGES, W, N, UNITS)
    x_buffer = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, W, ROWS, TILE], rows_shared(min(RUN, APPLY), ROWS))

    for stage in gl.static_range(STAGES - 1):
        _issue(buffers, pointers, stage, stage * W, start + stage * W + k_p < last, BITS)
        if SCALES:
            at = groups_at(n_s, start + stage * W + k_s, u_s, groups, tiles, GROUP, APPLY, WHOLE)
            _issue_scales(s_buffers, scale, fit, zero, at, stage, FITTED)
    x += m_x * in_features + (_after(start, PDL) + k_x) * TILE + c_x
    for stage in gl.static_range(STAGES - 1):
        _copy(x_buffer.index(stage), x + stage * W * TILE, mask=(start + stage * W + k_x) * TILE + c_x < in_features)
        async_copy.commit_group()

    acc = gl.zeros([W, N, M], gl.float32, layout=mma_layout(W))
    ones = gl.full([W, N, min(RUN, APPLY) * SLOT], 1.0, x.dtype.element_ty, layout=gl.DotOperandLayout(0, mma_layout(W), 2))
    stage = 0
    for first in range(start, last, W):
        async_copy.wait_group(STAGES - 2)
        words = _take_words(buffers, stage, BITS, W)
        at = groups_at(n_s, first + k_s, u_s, groups, tiles, GROUP, APPLY, WHOLE)
        s, f, z = _take_scales(s_buffers, scale, fit, zero, at, stage, units, FITTED, SCALES)
        step = first + (STAGES - 1) * W
        free = (stage + STAGES - 1) % STAGES
        _issue(buffers, pointers, free, step - start, step + k_p < last, BITS)
        if SCALES:
            at = groups_at(n_s, step + k_s, u_s, groups, tiles, GROUP, APPLY, WHOLE)
            _issue_scales(s_buffers, scale, fit, zero, at, free, FITTED)
        _copy(x_buffer.index(free), x + (step - start) * TILE, mask=(step + k_x) * TILE + c_x < in_features)
        async_copy.commit_group()
        scales, offsets = _read_of(s, f, z, FITTED, zero is not None, STEP, SHIFT, MIDDLE, UNIT, HIGH + LOW)
        inputs = x_buffer.index(stage).permute([0, 2, 1])
        acc = _tile(acc, words, scales, offsets, inputs, 0, in_features, ones, True, WHOLE, BITS, HIGH, LOW, APPLY, W, N, M, ROWS, BFLOAT)
        stage = (stage + 1) % STAGES
    async_copy.wait_group(0)
    return acc


@gluon.jit
@no_type_check
def _straight(
    x, pointers, scale, fit, zero, tokens, out, in_features, groups, tiles, start, last, BITS: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr,
    STEP: gl.constexpr, SHIFT: gl.constexpr, MIDDLE: gl.constexpr, UNIT: gl.constexpr, FITTED: gl.constexpr, GROUP: gl.constexpr,
    APPLY: gl.constexpr, M: gl.constexpr, N: gl.constexpr, W: gl.constexpr, BFLOAT: gl.constexpr, WHOLE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The same from global memory into registers."""
    UNITS: gl.constexpr = SLOTS // APPLY
    units: gl.constexpr = units_layout(W, N, UNITS)
    rows: gl.constexpr = gl.SliceLayout(2, inputs_layout(W, M))
    k_p, n_s, k_s, u_s = _indices(out, W, N, UNITS)
    k_x = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, rows)))[:, None, None]
    c_x = gl.arange(0, min(RUN, APPLY) * SLOT, layout=gl.SliceLayout(0, gl.SliceLayout(2, rows)))[None, :, None]
    m_x = gl.minimum(gl.program_id(2) * M + gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(1, rows))), tokens - 1)[None, None, :]
    acc = gl.zeros([W, N, M], gl.float32, layout=mma_layout(W))
    ones = gl.full([W, N, min(RUN, APPLY) * SLOT], 1.0, x.dtype.element_ty, layout=gl.DotOperandLayout(0, mma_layout(W), 2))
    pair, second, third, fourth, sixth = pointers
    words = _load_tile(pair, second, third, fourth, sixth, 0, 0, start + k_p < last, BITS)
    x += m_x * in_features + (_after(start, PDL) + k_x) * TILE + c_x
    for first in range(start, last, W):
        at = groups_at(n_s, first + k_s, u_s, groups, tiles, GROUP, APPLY, WHOLE)
        s, f, z = _take_scales((scale, scale, scale), scale, fit, zero, at, 0, units, FITTED, False)
        scales, offsets = _read_of(s, f, z, FITTED, zero is not None, STEP, SHIFT, MIDDLE, UNIT, HIGH + LOW)
        acc = _tile(
            acc, words, scales, offsets, x, (first + k_x) * TILE + c_x, in_features, ones, False, WHOLE, BITS, HIGH, LOW, APPLY, W, N, M, M, BFLOAT
        )
        at, here = (first + W - start) * WORDS, first + W + k_p < last
        words = _load_tile(pair, second, third, fourth, sixth, at, 2 * at, here, BITS)
        x += W * TILE
    return acc


@gluon.jit
@no_type_check
def mma(
    x, y, pair, second, third, fourth, sixth, scale, fit, zero, bias, tokens, out, in_features, groups, tiles, per_split,
    BITS: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr, STEP: gl.constexpr, SHIFT: gl.constexpr, MIDDLE: gl.constexpr, UNIT: gl.constexpr,
    FITTED: gl.constexpr, GROUP: gl.constexpr, APPLY: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PARTIAL: gl.constexpr,
    STAGES: gl.constexpr, W: gl.constexpr, BFLOAT: gl.constexpr, ROWS: gl.constexpr, WHOLE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As jit.dot, for groups without padding and x whose rows begin at multiples of 16 bytes.

    W: warps. ROWS: of x that are real, the next power of two, at most BLOCK_M. WHOLE: rows are a multiple of W whole tiles, and a multiple of 16 groups.
    """
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    split = gl.program_id(1)
    start, last = split * per_split, gl.minimum((split + 1) * per_split, tiles)
    layout: gl.constexpr = planes_layout(W)
    n = gl.minimum(gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout))), out - 1)[None, :, None]
    k = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    words = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    at, at_pair = (n * tiles + start + k) * WORDS + words, (n * tiles + start + k) * (2 * WORDS) + words
    pair += at_pair
    if BITS > 2:
        second += at
    if BITS > 3:
        third += at
    if BITS > 4:
        fourth += at_pair
    if BITS > 6:
        sixth += at_pair
    pointers = pair, second, third, fourth, sixth
    if STAGES > 1:
        acc = _copied(x, pointers, scale, fit, zero, tokens, out, in_features, groups, tiles, start, last, BITS, HIGH, LOW, STEP, SHIFT, MIDDLE, UNIT,
                      FITTED, GROUP, APPLY, BLOCK_M, BLOCK_N, STAGES, W, BFLOAT, ROWS, WHOLE, PDL)  # fmt: skip
    else:
        acc = _straight(x, pointers, scale, fit, zero, tokens, out, in_features, groups, tiles, start, last, BITS, HIGH, LOW, STEP, SHIFT, MIDDLE,
                        UNIT, FITTED, GROUP, APPLY, BLOCK_M, BLOCK_N, W, BFLOAT, WHOLE, PDL)  # fmt: skip
    product = gl.sum(acc, 0)
    flat: gl.constexpr = gl.SliceLayout(0, mma_layout(W))
    row = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, flat))[:, None]
    m = gl.program_id(2) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, flat))[None, :]
    here = (row < out) & (m < tokens)
    if PARTIAL:
        gl.store(y + (split * tokens + m) * out + row, product, mask=here)
    else:
        if bias is not None:
            product += gl.load(bias + row, mask=row < out, other=0.0).to(gl.float32)
        gl.store(y + m * out + row, product.to(y.dtype.element_ty), mask=here)
