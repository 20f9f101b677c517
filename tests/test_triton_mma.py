"""The kernel of explicit layouts (jit_mma) against the reference: it is not Triton's interpreter's to run, so it runs where CUDA is.

What can be seen without a GPU, its machine code, is in test_triton_compiled.py.
"""

import sys
from itertools import product

import pytest
import torch
from test_cpu import some_weight
from test_triton import close, some_inputs
from triton_mode import DEVICE, needs_cuda

from matquant.codes import Grid
from matquant.errors import ResourceError
from matquant.kernels.gpu import layout, ops, table
from matquant.kernels.gpu.table import Config
from matquant.weight import NestedWeight, Refit

pytest.importorskip("triton")
WIDTHS = [2, 3, 4, 5, 6, 7, 8]
SHAPES = [
    (32, 544),
    (64, 192),
    (128, 640),
    (96, 288),
    (64, 4096),
    (128, 8192),
    (-1, 1024),
]  # group size, input channels; the fifth and sixth are whole
CONFIGS = [
    Config("mma", block_n=16, block_m=8, warps=2, stages=2),
    Config("mma", block_n=32, block_m=16, warps=4, stages=1),
    Config("mma", block_n=16, block_m=32, warps=1, stages=3),
    Config("mma", block_n=16, block_m=8, warps=2, stages=3, split_k=2),
]
BATCHES = [1, 2, 5, 8, 9, 16, 33]
GRIDS = [(False, False), (False, True), (True, False)]  # symmetric, overlap


def here(group: int, columns: int, out: int, symmetric: bool, overlap: bool) -> tuple[NestedWeight, layout.TiledWeight]:
    weight = some_weight(out, columns, Grid(8, group, symmetric, overlap), refits=(2, 3))
    moved = NestedWeight(
        weight.codes.to(DEVICE), weight.scale.to(DEVICE), None if weight.zero is None else weight.zero.to(DEVICE), weight.grid, weight.slicing,
        {r: Refit(fit.scale.to(DEVICE), fit.zero.to(DEVICE)) for r, fit in weight.refits.items()},
    )  # fmt: skip
    return moved, layout.tiled(moved)


@needs_cuda
@pytest.mark.parametrize(("bits", "shape"), list(product(WIDTHS, range(len(SHAPES)))))
def test_every_width_and_group(bits: int, shape: int) -> None:
    group, columns = SHAPES[shape]
    weight, tiled = here(group, columns, (37, 1, 70)[(bits + shape) % 3], *GRIDS[(bits + shape) % 3])
    for index, config in enumerate(CONFIGS):
        rows = BATCHES[(bits + shape + index) % len(BATCHES)]
        dtype = (torch.float16, torch.bfloat16)[(bits + index) % 2]
        x = some_inputs(rows, columns, dtype)
        bias = some_inputs(1, len(weight.codes), dtype, seed=1)[0] if (bits + index) % 3 else None
        got = ops.linear(x, tiled, bits, bias, config)
        assert got.dtype == dtype and close(got, x, weight, bits, bias), (config, rows, dtype)


@needs_cuda
@pytest.mark.parametrize("rows", range(1, 18))
def test_every_batch(rows: int) -> None:
    weight, tiled = here(64, 1024, 48, False, False)
    x = some_inputs(rows, 1024, torch.bfloat16)
    for config in CONFIGS:
        assert close(ops.linear(x, tiled, 3, None, config), x, weight, 3), config


@needs_cuda
def test_inputs_that_begin_anywhere() -> None:
    """Copies are of 16 bytes from multiples of 16."""
    weight, tiled = here(64, 192, 40, False, False)
    x = some_inputs(1, 193, torch.float16)[:, 1:]
    assert close(ops.linear(x, tiled, 4, None, CONFIGS[0]), x, weight, 4)


@needs_cuda
def test_a_chain_of_products_that_start_early() -> None:
    """Every product takes what the one before it wrote, in one graph: a kernel that read its inputs before they were there would differ."""
    weight, tiled = here(64, 512, 512, False, False)
    dense = weight.read(4).dense().double()
    scale = float(512**0.5 * dense.std())
    x = some_inputs(4, 512, torch.float16)
    want = x.double()
    for _ in range(6):
        want = want @ dense.T / scale

    def chain() -> torch.Tensor:
        y = x
        for _ in range(6):
            y = ops.linear(y, tiled, 4, None, CONFIGS[0]) / scale
        return ops.linear(ops.linear(y, tiled, 4, None, CONFIGS[0]), tiled, 4, None, CONFIGS[3])

    first = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain()
    for _ in range(20):
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, first)
    far = want @ dense.T @ dense.T
    assert float((output.double() - far).abs().max()) <= 2e-2 * float(far.abs().max())


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not table.mma_runs(cpu, torch.bfloat16, 4096, 64)
    monkeypatch.setattr(table, "_mma_device", lambda kind, index: True)
    assert table.mma_runs(cpu, torch.bfloat16, 4096, 64) and table.mma_runs(cpu, torch.float16, 8, 32)
    assert not any(table.mma_runs(cpu, *case) for case in ((torch.float32, 4096, 64), (torch.float16, 4096, 48), (torch.float16, 4100, 4100)))


@pytest.mark.parametrize(
    ("capability", "triton", "runs"), [((9, 0), "3.6.0", True), ((8, 0), "3.9.1", True), ((7, 5), "3.6.0", False), ((9, 0), "3.5.1", False)]
)
def test_which_gpus_and_tritons(capability: tuple[int, int], triton: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert table._mma_device.__wrapped__("cuda", 0) == runs
    monkeypatch.setitem(sys.modules, "matquant.kernels.gpu.jit_mma", None)  # as if its imports failed
    assert not table._mma_device.__wrapped__("cuda", 0)


def test_where_it_does_not_run_it_says_so() -> None:
    if DEVICE.type == "cuda":
        pytest.skip("it runs here")
    weight, tiled = here(64, 192, 40, False, False)
    with pytest.raises(ResourceError, match="kernel mma needs .*; got .*; use kind dot"):
        ops.linear(some_inputs(1, 192, torch.float16), tiled, 4, None, CONFIGS[0])
