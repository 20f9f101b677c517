"""GPU kernels against the reference: every width with every group size, every kernel with every group size and width, batches of 1 to 130, odd shapes.

Interpreted on the CPU (float16, float32); the same tests run compiled, bfloat16 too, wherever CUDA is (triton_mode.py).
"""

from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest
import torch
from test_cpu import some_weight
from torch import Tensor
from triton_mode import CUDA, DEVICE, DTYPES, needs_cuda, tl, triton

from matquant.codes import Grid
from matquant.errors import InputError, MissingPlanesError, RecipeError, ResourceError
from matquant.kernels import reference
from matquant.kernels.gpu import jit, launch, layout, ops
from matquant.kernels.gpu.table import Config
from matquant.weight import NestedWeight, Refit

WIDTHS = [2, 3, 4, 5, 6, 7, 8]
COLUMNS = {32: 544, 64: 192, 128: 640, -1: 333, 20: 100, 48: 528, 96: 288}  # group size -> input channels: one tile and more, full ones and not
GROUPS = list(COLUMNS)
OUT = [37, 1, 70]
TALL = 1 if CUDA else 8  # times as many rows a program: the interpreter is as slow as programs are many, compilers as what a thread does is long
KERNELS = [
    (Config("gemv", block_n=8 * TALL, block_m=1, block_k=2, warps=2, stages=1), 1),
    (Config("gemv", block_n=4 * TALL, block_m=2 if CUDA else 8, block_k=1, warps=2, stages=1, split_k=2), 7),
    (Config("dot", block_n=64, block_m=16, stages=2), 9),
    (Config("dot", block_n=32, block_m=64, run=2, least_m=16, split_k=2, warps=2, stages=2), 33),
    (Config("dense", rows=64), 70),
]
DOT = KERNELS[2][0]
FOR_DOT = torch.float16 if CUDA else torch.float32  # table.choose says why
GRIDS = [Grid(8, 64, False, False), Grid(8, 64, False, True), Grid(8, 64, True, False)]


@lru_cache(maxsize=16)
def tiles(group: int, grid: Grid, out: int = 37, planes: int = 8) -> tuple[NestedWeight, layout.TiledWeight]:
    """A random weight with refits at 2 and 3 bits, on DEVICE, as it is and in tiles."""
    weight = some_weight(out, COLUMNS[group], replace(grid, group_size=group), refits=(2, 3))
    weight = replace(weight, planes=min(planes, grid.bits))
    here = replace(
        weight, codes=weight.codes.to(DEVICE), scale=weight.scale.to(DEVICE), zero=None if weight.zero is None else weight.zero.to(DEVICE),
        refits={r: Refit(fit.scale.to(DEVICE), fit.zero.to(DEVICE)) for r, fit in weight.refits.items()},
    )  # fmt: skip
    return here, layout.tiled(here)


def some_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: Tensor, x: Tensor, weight: NestedWeight, bits: int, bias: Tensor | None = None) -> bool:
    """Whether `got` is x W_r^T + bias but for the rounding of its dtype: the weight of `dense` kernels is rounded, so 2^-8 of a typical term, not of the sum."""
    want = reference.linear(x.double(), weight.read(bits), None if bias is None else bias.double())
    size = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}[got.dtype]
    return bool((got.double() - want).abs().max() <= size * want.abs().max())


def cases() -> list[tuple[int, int, int]]:
    """(bits, kernel, group size): all pairs of two of them occur."""
    both = list(product(range(len(WIDTHS)), range(len(KERNELS))))
    found = {(WIDTHS[i], k, GROUPS[(i + 2 * k) % 7]) for i, k in both}
    missing = set(product(WIDTHS, GROUPS)) - {(bits, group) for bits, _, group in found}
    return sorted(found | {(bits, 2, group) for bits, group in missing})


def test_cases_cover_all_pairs() -> None:
    found = cases()
    assert {(bits, group) for bits, _, group in found} == set(product(WIDTHS, GROUPS))
    assert {(bits, kernel) for bits, kernel, _ in found} == set(product(WIDTHS, range(5)))
    assert {(kernel, group) for _, kernel, group in found} == set(product(range(5), GROUPS))


@pytest.mark.parametrize(("bits", "kernel", "group"), cases())
def test_every_width_kernel_and_group(bits: int, kernel: int, group: int) -> None:
    config, rows = KERNELS[kernel]
    weight, tiled = tiles(group, GRIDS[(bits + kernel) % 3], OUT[(bits + group) % 3])
    dtype = DTYPES[(bits + kernel + group) % len(DTYPES)]
    if CUDA and config.kind == "dot" and dtype == torch.float32:
        dtype = torch.bfloat16
    x = some_inputs(rows, COLUMNS[group], dtype)
    bias = some_inputs(1, len(weight.codes), dtype, seed=1)[0] if bits % 2 else None
    got = ops.linear(x, tiled, bits, bias, config)
    assert got.dtype == dtype and got.shape == (rows, len(weight.codes)) and close(got, x, weight, bits, bias)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65])
def test_every_batch_by_the_table(rows: int) -> None:
    weight, tiled = tiles(64, GRIDS[0], 5)
    x = some_inputs(rows, COLUMNS[64], torch.float16)
    assert close(ops.linear(x, tiled, 3), x, weight, 3)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (5, True), (6, False), (7, True)])
def test_parents_of_fewer_bits(bits: int, symmetric: bool) -> None:
    weight, tiled = tiles(64, Grid(bits, 64, symmetric, False))
    assert torch.equal(tiled.nested().codes, weight.codes)
    x = some_inputs(3, COLUMNS[64], FOR_DOT)
    for r in range(2, bits + 1):
        assert close(ops.linear(x, tiled, r, config=DOT), x, weight, r), r


def test_every_code_is_read_as_the_reference_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(1, 2).to(DEVICE)
    for grid in (Grid(8, 32, False, False), Grid(8, 32, False, True)):
        weight = some_weight(16, 32, grid, refits=(3, 2))
        weight = NestedWeight(codes, weight.scale.to(DEVICE), weight.zero.to(DEVICE), grid, "floor")  # type: ignore[union-attr]
        tiled = layout.tiled(weight)
        for r in WIDTHS:
            want = weight.read(r).dense()
            assert torch.allclose(ops.dense(tiled, r, torch.float32), want, rtol=1e-6, atol=1e-7), r
            for config, dtype in ((DOT, FOR_DOT), *([(KERNELS[0][0], torch.float32)] if r in (2, 3, 8) else ())):
                read = ops.linear(torch.eye(32, device=DEVICE, dtype=dtype), tiled, r, config=replace(config, block_m=4 * TALL)).T
                size = 1 if dtype == torch.float32 else 100  # float32 sums of numbers up to 2 x 256 scale
                assert torch.allclose(read.float(), want, rtol=1e-5 * size, atol=2e-6 * size), (r, config)


@pytest.mark.parametrize("group", GROUPS)
def test_tiles_hold_what_the_docstring_says(group: int) -> None:
    """Bit by bit, in a plain loop over some of the weights; padding is zero; tiles can be turned back."""
    weight, tiled = tiles(group, GRIDS[0])
    assert torch.equal(tiled.nested().codes, weight.codes)
    found = layout.blocking(COLUMNS[group], COLUMNS[group] if group == -1 else group)
    arrays = {name: array.cpu() for name, array in tiled.arrays.items()}
    ones = {name: 0 for name in arrays}
    for column in range(COLUMNS[group]):
        at = column // found.group * found.padded + column % found.group
        tile, slot, word, half = at // 512, at % 512 // 32, at % 32 // 2, at % 2
        code = int(weight.codes[5, column])
        for name, first in layout.ARRAYS.items():
            if name.startswith("pair"):
                of, field = arrays[name][5, tile, slot // 8, word], 16 * half + 4 * (slot % 4) + 2 * (slot // 4 % 2)
                assert (int(of) >> field) & 3 == code >> (6 - first) & 3
            else:
                of, field = arrays[name][5, tile, word], 16 * half + 4 * (slot % 4) + slot // 4
                assert (int(of) >> field) & 1 == code >> (7 - first) & 1
            ones[name] += (code >> (6 - first) & 3).bit_count() if name.startswith("pair") else code >> (7 - first) & 1
    for name, array in arrays.items():
        assert sum((int(word) & 0xFFFFFFFF).bit_count() for word in array[5].flatten()) == ones[name]


def test_a_width_is_handed_its_own_planes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tiled = tiles(64, GRIDS[0], 5)
    poisoned = replace(tiled, arrays=dict(tiled.arrays))
    x = some_inputs(2, COLUMNS[64])
    handed: list[list[int]] = []
    real = launch.product
    monkeypatch.setattr(launch, "product", lambda x, planes, *rest: handed.append([p.data_ptr() for p in planes]) or real(x, planes, *rest))
    for r, name in ((6, "pair6"), (4, "pair4"), (3, "single3"), (2, "single2")):
        poisoned.arrays[name] = torch.full_like(tiled.arrays[name], 0x55555555)
        assert torch.equal(ops.linear(x, poisoned, r), ops.linear(x, tiled, r)), r
        assert handed[-1] == [tiled.arrays[n].data_ptr() for n in layout.ARRAYS if layout.ARRAYS[n] < r]


def test_bytes_of_a_read_are_its_bits() -> None:
    weight = some_weight(64, 1024, Grid(8, 128, True, False), refits=(2,))
    tiled = layout.TiledWeight(
        (64, 1024), weight.grid, 8, {n: torch.zeros(64, 2, *((2,) if "pair" in n else ()), 16, dtype=torch.int32) for n in layout.ARRAYS},
        weight.scale, None, weight.refits,
    )  # fmt: skip
    metadata = 64 * 8 * 2
    assert [tiled.read_bytes(r) - metadata for r in (3, 4, 6, 8)] == [64 * 1024 * r // 8 for r in (3, 4, 6, 8)]
    assert tiled.read_bytes(2) == 64 * 1024 * 2 // 8 + metadata + 2 * 64 * 8
    assert tiled.nbytes == 64 * 1024 + metadata + 2 * 64 * 8


def test_evict_and_restore() -> None:
    weight, whole = tiles(64, GRIDS[0], 5)
    tiled = replace(whole, arrays=dict(whole.arrays), evicted={}, moved=0)
    x = some_inputs(2, COLUMNS[64])
    want = {r: ops.linear(x, whole, r) for r in (8, 6, 3, 2)}
    kept = tiled.addresses(3)
    freed = tiled.evict(3)
    assert freed == sum(whole.arrays[name].nbytes for name in ("single3", "pair4", "pair6")) and set(tiled.arrays) == {"pair0", "single2"}
    assert tiled.evict(3) == 0 and tiled.moved == 1
    assert tiled.addresses(3) == kept and torch.equal(ops.linear(x, tiled, 3), want[3]) and torch.equal(ops.linear(x, tiled, 2), want[2])
    with pytest.raises(MissingPlanesError, match=r"6 bits need plane 3, which was evicted to host memory; call restore\(6\)"):
        ops.linear(x, tiled, 6)
    assert torch.equal(tiled.nested().codes, weight.codes)
    assert tiled.restore(6) == sum(whole.arrays[name].nbytes for name in ("single3", "pair4")) and tiled.moved == 2
    assert tiled.addresses(3) == kept and torch.equal(ops.linear(x, tiled, 6), want[6])
    assert tiled.restore(8) and not tiled.evicted and torch.equal(ops.linear(x, tiled, 8), want[8])


def test_equal_runs_give_equal_bits_and_rows_may_be_views() -> None:
    _, tiled = tiles(64, GRIDS[0], 5)
    x = some_inputs(8, COLUMNS[64], torch.float16)
    for config, _ in KERNELS[1::2]:
        assert torch.equal(ops.linear(x, tiled, 4, config=config), ops.linear(x, tiled, 4, config=config))
    by_table = ops.linear(x, tiled, 4)
    assert torch.equal(ops.linear(x.reshape(2, 4, -1), tiled, 4), by_table.reshape(2, 4, -1))
    assert torch.equal(ops.linear(x.repeat_interleave(2, 0)[::2], tiled, 4), by_table)
    assert ops.linear(x[:0], tiled, 4).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *([torch.bfloat16] if CUDA else [])])
def test_types_of_scales(dtype: torch.dtype) -> None:
    weight = some_weight(20, 64, Grid(8, 32, False, False), dtype=dtype)
    weight = replace(weight, codes=weight.codes.to(DEVICE), scale=weight.scale.to(DEVICE), zero=weight.zero.to(DEVICE))  # type: ignore[union-attr]
    weight.scale.view(-1)[[0, 3]] = 2.0**-24  # a subnormal half
    tiled, x = layout.tiled(weight), some_inputs(3, 64)
    assert all(close(ops.linear(x, tiled, r, config=KERNELS[0][0]), x, weight, r) for r in (8, 4))


def test_magic_numbers_of_bfloat16() -> None:
    """All nibbles and pairs in every place of a word, as bits: the interpreter copies bfloat16 soundly, it only computes with it wrongly."""
    words = (torch.arange(16, dtype=torch.int32) * 0x11111111).to(DEVICE)
    for place in range(8):
        out = torch.zeros(2, 16, dtype=torch.bfloat16, device=DEVICE)
        _numbers[(1,)](words, out, PLACE=place, PAIRS=True, num_warps=1)
        assert torch.equal(out[0].float(), out[1].float())
        want = 1 + (words.cpu() >> 2 * (place % 2) & 3) / 4
        assert torch.equal(out[0].float().cpu(), want), place
    for place in range(4):
        out = torch.zeros(2, 16, dtype=torch.bfloat16, device=DEVICE)
        _numbers[(1,)](words, out, PLACE=place, PAIRS=False, num_warps=1)
        assert torch.equal(out.float().cpu(), (1 + torch.arange(16) / 16).expand(2, 16)), place


_ones, _ones_of_pairs = jit._ones, jit._ones_of_pairs


@triton.jit
def _numbers(words, out, PLACE: tl.constexpr, PAIRS: tl.constexpr):
    at = tl.arange(0, 16)
    word = tl.load(words + at).to(tl.uint32, bitcast=True)
    if PAIRS:
        even, odd = _ones_of_pairs(word, PLACE, True)
    else:
        even, odd = _ones(word, PLACE, True)
    tl.store(out + at, even)
    tl.store(out + 16 + at, odd)


def test_operators_are_sound_under_torch() -> None:
    """Schema, fake tensors and what torch.compile makes of the operators."""
    _, tiled = tiles(64, GRIDS[0], 5)
    x = some_inputs(3, COLUMNS[64])
    fit, zero = tiled.fit(3)
    arguments = (x, tiled.read(3), tiled.scale, fit, zero, None, 3, 8, False)
    torch.library.opcheck(ops.tiled_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        ops.tiled_dense, (tiled.read(4), tiled.scale, None, tiled.zero, COLUMNS[64], 4, 8, False, torch.float16),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    compiled = torch.compile(lambda x: ops.tiled_linear(x, *arguments[1:]) * 2, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), ops.linear(x, tiled, 3) * 2)


def test_refusals() -> None:
    weight, tiled = tiles(64, GRIDS[0], 5)
    partial = replace(tiled, planes=3, arrays={name: tiled.arrays[name] for name in ("pair0", "single2")})
    x = some_inputs(2, COLUMNS[64])
    assert torch.equal(ops.linear(x, partial, 3), ops.linear(x, tiled, 3))
    with pytest.raises(MissingPlanesError, match="4 bits need planes 0-3, but only 0-2 are here; load the model with keep=4 or more"):
        ops.linear(x, partial, 4)
    with pytest.raises(InputError, match="GPU kernels read slicing floor, not round; use the reference kernel"):
        layout.tiled(replace(weight, slicing="round"))
    with pytest.raises(InputError, match=r"GPU kernels take float16, bfloat16 or float32, not torch.float64"):
        ops.linear(x.double(), tiled, 4)
    with pytest.raises(RecipeError, match="cannot read 1 bits from a 8-bit parent; allowed: 2 to 8"):
        layout.reading(1, weight.grid, False)


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.available(DEVICE)
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    assert not ops.available("cpu") and ops.available("cuda:0")
    with pytest.raises(ResourceError, match=r"GPU kernels need a CUDA or ROCm device and Triton \(pip install 'matquant\[gpu\]'\), and this is cpu"):
        ops.check("cpu")
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert not ops.available("cuda")


@needs_cuda
def test_evicted_planes_are_pinned() -> None:
    _, whole = tiles(64, GRIDS[0])
    tiled = replace(whole, arrays=dict(whole.arrays), evicted={}, moved=0)
    tiled.evict(2)
    assert all(array.is_pinned() for array in tiled.evicted.values())
