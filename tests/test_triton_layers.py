"""NestedLinear on tiles, and a captured step that changes its widths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu import some_weight
from torch import Tensor, nn
from triton_mode import CUDA, DEVICE, needs_cuda

from matquant.codes import Grid
from matquant.embedding import NestedEmbedding, TiedHead
from matquant.errors import InputError, MissingPlanesError, ResourceError
from matquant.kernels import reference
from matquant.kernels.gpu import layout, ops, table
from matquant.kernels.gpu.graphs import PlanGraphs
from matquant.kernels.gpu.table import Config
from matquant.linear import NestedLinear
from matquant.plan import Layout, Shape, Table
from matquant.tables import rounded_table

DTYPE = torch.float16


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where programs are interpreted one by one."""
    if not CUDA:
        monkeypatch.setattr(table, "GEMV_BATCH", 0)
        monkeypatch.setattr(table, "UNTUNED", ((64, Config("dot", block_n=64, block_m=8, stages=1)),))
    table.forget()


def some_layout(slicing: str = "floor", symmetric: bool = False) -> Layout:
    return Layout(Grid(8, 32, symmetric, False), slicing, (8, 6, 4, 3, 2), (3, 2), "float16")


def some_layer(out: int = 24, columns: int = 64, seed: int = 0, bias: bool = True) -> NestedLinear:
    weight = some_weight(out, columns, Grid(8, 32, False, False), refits=(3, 2), seed=seed)
    return NestedLinear.from_weight(weight, some_layout(), torch.linspace(-1, 1, out).to(DTYPE) if bias else None).to(DEVICE)


def inputs(rows: int = 2, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.float(), want.float(), rtol=1e-2, atol=4e-3 * float(want.float().abs().max()))


def test_a_tiled_layer_is_the_same_layer() -> None:
    layer, plain = some_layer(), some_layer()
    layer.tile()
    tiles = layer.tiles
    layer.tile()
    assert layer.tiles is tiles and all(layer.get_buffer(name).numel() == 0 for name in ("weight", "plane_2", "plane_7"))
    x = inputs()
    with torch.no_grad():
        for bits in (8, 6, 4, 3, 2):
            layer.set_bits(bits)
            plain.set_bits(bits)
            assert close(layer(x), plain(x)), bits
            assert torch.equal(layer.weight_at(bits).codes, plain.weight_at(bits).codes)
    assert layer.weight.dtype == torch.uint8 and layer.weight.device.type == DEVICE.type  # what model code asks of a layer
    want, got = plain.state_dict(), layer.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    fresh = NestedLinear(Shape(24, 64), some_layout(), bias=nn.Parameter(torch.zeros(24, dtype=DTYPE), requires_grad=False), device=DEVICE)
    fresh.load_state_dict(got)
    assert torch.equal(fresh.weight, plain.weight)


def test_the_kernel_is_called_unless_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, called = some_layer(bias=False), []
    real = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *given: called.append(given[2]) or real(*given))
    layer.set_bits(3)
    layer(inputs())
    assert not called
    layer.tile()
    layer(inputs())
    x = inputs().float().requires_grad_()
    layer(x).sum().backward()
    assert called == [3] and x.grad is not None


def test_tiles_move_with_the_layer() -> None:
    layer = some_layer()
    layer.tile()
    before, want = layer.tiles, layer(inputs())
    layer.to(torch.float32).to(DEVICE)
    assert layer.tiles is not before and layer.tiles is not None and layer.tiles.scale is layer.scale and layer.scale.dtype == torch.float16
    assert torch.equal(layer(inputs()), want)


@pytest.mark.parametrize("bits", [8, 3])
def test_a_table_on_tiles(bits: int) -> None:
    """The head multiplies with tiles, its embedding goes on looking up planes; one that no head is tied to has no use for tiles."""
    of = Table.of(Shape(40, 64), bits, 32, False, "float16")
    weight = rounded_table(torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), of)
    planes = weight.packed()
    tied, alone = (NestedEmbedding(of, nn.Embedding(40, 64, dtype=DTYPE), device=DEVICE) for _ in range(2))
    for embedding in (tied, alone):
        stored = {"weight": planes[:2], **{f"plane_{k}": planes[k] for k in range(2, bits)}, "scale": weight.scale, "zero": weight.zero}
        embedding.load_state_dict(stored)
    head, ids, x = TiedHead(tied, nn.Parameter(torch.ones(40, dtype=DTYPE, device=DEVICE))), torch.tensor([[3, 39], [0, 3]], device=DEVICE), inputs()
    with torch.no_grad():
        logits, rows = head(x), tied(ids)
        assert torch.equal(rows, weight.read(bits).dense(DTYPE).to(DEVICE)[ids]) and head.weight is tied.weight
        for embedding in (tied, alone):
            embedding.tile()
            assert (embedding.tiles is None) == (embedding is alone) and torch.equal(embedding(ids), rows)
        assert close(head(x), logits)
    assert tied.evict(2) == alone.evict(2) == 0 and torch.equal(tied.state_dict()["weight"].cpu(), planes[:2])


def test_partial_and_symmetric_layers() -> None:
    whole = some_layer()
    partial = NestedLinear(Shape(24, 64), some_layout(), planes=3, device=DEVICE)
    for name, buffer in partial.named_buffers():
        buffer.copy_(whole.get_buffer(name))
    partial.tile()
    whole.bias = None
    for bits in (3, 2):
        partial.set_bits(bits)
        assert close(partial(inputs()), reference.linear(inputs(), whole.weight_at(bits), None))
    assert partial.tiles is not None and set(partial.tiles.arrays) == {"pair0", "single2"}
    with pytest.raises(MissingPlanesError, match="4 bits need planes 0-3, but only 0-2 were loaded"):
        partial.set_bits(4)
    weight = some_weight(24, 64, Grid(8, 32, True, False), refits=(3, 2))
    symmetric = NestedLinear.from_weight(weight, some_layout(symmetric=True)).to(DEVICE)
    want = reference.linear(inputs(), symmetric.weight_at(8), None)
    symmetric.tile()
    assert close(symmetric(inputs()), want)


def test_evicted_widths_are_refused_at_once() -> None:
    layer = some_layer()
    with pytest.raises(InputError, match=r"planes can be evicted from tiles only; call tile\(\) first"):
        layer.evict(2)
    assert layer.restore(8) == 0
    layer.tile()
    with pytest.raises(InputError, match=r"the layer reads 8 bits now; set_bits\(3\) before evict\(3\)"):
        layer.evict(3)
    layer.set_bits(3)
    assert layer.evict(3) == 24 * 512 * 5 // 8  # one tile of 512 columns
    with pytest.raises(MissingPlanesError, match=r"8 bits need plane 3, which was evicted to host memory; call restore\(8\)"):
        layer.set_bits(8)
    assert layer.bits == 3 and layer.state_dict()["plane_7"].any()
    layer.restore(8)
    layer.set_bits(8)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="GPU kernels read slicing floor, not round"):
        NestedLinear(Shape(8, 32), some_layout("round"), device=DEVICE).tile()
    monkeypatch.setattr(ops, "available", lambda device: False)
    with pytest.raises(ResourceError, match="GPU kernels need a CUDA or ROCm device and Triton"):
        some_layer().tile()


# --- one captured step a plan ---------------------------------------------------------------------------------------------


def traced(captures: list[int]) -> Callable[[Callable[[], None]], Callable[[], object]]:
    """Records operators as a CUDA graph records kernels: a replay runs them with the widths and the tensors of the capture, and no Python of ours."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def record(run: Callable[[], None]) -> Callable[[], object]:
        captures.append(1)
        return make_fx(run)()

    return record


class Step:
    """Two layers with widths of their own, and buffers for the input of the first."""

    def __init__(self) -> None:
        self.layers = [some_layer(64, 64, 0, bias=False), some_layer(24, 64, 1, bias=False)]
        for layer in self.layers:
            layer.tile()
        self.x = inputs(1)
        self.ran = 0

    def __call__(self) -> Tensor:
        self.ran += 1
        return self.layers[1](torch.tanh(self.layers[0](self.x)))

    def switch(self, plan: tuple[int, int]) -> None:
        for layer, bits in zip(self.layers, plan, strict=True):
            layer.set_bits(bits)

    def want(self, plan: tuple[int, int]) -> Tensor:
        first = torch.tanh(reference.linear(self.x, self.layers[0].weight_at(plan[0]), None))
        return reference.linear(first, self.layers[1].weight_at(plan[1]), None)


@pytest.fixture
def stepping() -> tuple[Step, PlanGraphs[Any], list[int]]:
    step, captures = Step(), []
    return step, PlanGraphs(step, step.switch, step.layers, None if CUDA else traced(captures)), captures


@torch.no_grad()
def test_a_captured_step_switches_widths(stepping: tuple[Step, PlanGraphs[Any], list[int]]) -> None:
    step, graphs, captures = stepping
    plans = [(8, 8), (2, 2), (4, 3)]
    for plan in plans:
        assert close(graphs(plan), step.want(plan)), plan
    ran, output, held = step.ran, graphs.output, [layer.tiles.addresses(8) for layer in step.layers if layer.tiles]
    for seed, plan in enumerate([*plans[::-1], *plans]):
        step.x.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)))
        assert graphs(plan) is output and close(graphs(plan), step.want(plan))
    assert step.ran == ran and len(captures) in (0, 3)  # nothing is captured anew, and no Python of the step runs
    assert held == [layer.tiles.addresses(8) for layer in step.layers if layer.tiles]


@torch.no_grad()
def test_graphs_of_planes_that_stayed_survive_an_eviction(stepping: tuple[Step, PlanGraphs[Any], list[int]]) -> None:
    step, graphs, _ = stepping
    want = {plan: graphs(plan).clone() for plan in ((8, 8), (3, 2), (8, 2))}
    ran, narrow = step.ran, graphs.graphs[3, 2]
    step.layers[1].set_bits(2)
    step.layers[1].evict(2)
    assert torch.equal(graphs((3, 2)), want[3, 2]) and step.ran == ran and graphs.graphs[3, 2] is narrow
    assert torch.equal(graphs((8, 2)), want[8, 2]) and step.ran == ran
    with pytest.raises(MissingPlanesError, match="8 bits need plane 2, which was evicted"):
        graphs((8, 8))
    step.layers[1].restore(8)
    assert torch.equal(graphs((8, 8)), want[8, 8]) and torch.equal(graphs((3, 2)), want[3, 2])
    assert graphs.graphs[3, 2] is narrow


@needs_cuda
@torch.no_grad()
def test_replays_allocate_nothing() -> None:
    step = Step()
    graphs = PlanGraphs(step, step.switch, step.layers)
    plans = [(8, 8), (2, 2), (4, 3)]
    for plan in plans:
        graphs(plan)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for plan in plans * 3:
        graphs(plan)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_blocking_of_rows() -> None:
    assert layout.blocking(4096, 128) == (128, 32, 128, 4, 8)
    assert layout.blocking(333, 333) == (333, 1, 352, 1, 1)
    assert layout.blocking(8192, 8192).apply == 16
