"""Measure configurations and keep the fastest that is right: what `matquant tune` and benchmarks/gpu do.

A product is timed with its weight out of the cache: `copies` of the weight, together larger than the L2, take turns inside one CUDA graph, and the
time of a replay is divided by its products. Each candidate is first held against the reference's weight; one that fails to compile, or asks for more
shared memory than there is, is passed over.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from matquant.codes import Grid
from matquant.errors import InputError, ResourceError
from matquant.kernels.gpu import ops
from matquant.kernels.gpu.layout import WORDS, TiledWeight, blocking, names
from matquant.kernels.gpu.table import Config, Row, batch_class, gpu_name, mma_runs, untuned

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}  # of the largest output
COLD = 3  # times the L2 that the copies of a weight fill
MOST_COPIES = 512
MOST_MMA = 64  # rows of x for which mma is tried
MMA_BLOCKS = ((16, 4, 3, 0), (16, 4, 2, 0), (16, 2, 3, 0), (16, 2, 2, 0), (16, 2, 1, 0), (16, 4, 1, 0), (16, 4, 1, 128), (16, 8, 1, 0), (16, 8, 1, 64), (32, 2, 1, 0),
       (32, 4, 1, 0), (32, 4, 1, 128), (32, 4, 2, 0), (32, 8, 1, 96), (32, 8, 1, 128), (32, 8, 2, 128), (64, 4, 1, 0))  # rows, warps, stages, registers  # fmt: skip
ROUNDS = 5  # replays, of which the median counts
FEWEST = 20  # products in a graph
CPU_L2 = 1 << 16  # a stand-in where Triton is interpreted: few copies


@dataclass(frozen=True)
class Product:
    """A product to tune. batch: rows of x. group: input channels that share a scale; -1 = all."""

    bits: int
    batch: int
    out: int
    in_features: int
    group: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        size = self.in_features if self.group == -1 else self.group
        if self.in_features % size:
            raise InputError(f"group {self.group} does not divide {self.in_features} input channels; choose one that does, or -1")


def random_weight(out: int, in_features: int, group: int, planes: int, device: torch.device, seed: int = 0) -> TiledWeight:
    """Tiles of random codes, without a weight that they came from; asymmetric, no refits. Padding is random too: it meets zero inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    found = blocking(in_features, in_features if group == -1 else group)
    arrays: dict[str, Tensor] = {}
    for name in names(planes):
        shape = (out, found.tiles, *((2,) if name.startswith("pair") else ()), WORDS)
        arrays[name] = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32, device=device)
    scale = (torch.rand(out, found.groups, generator=generator, device=device) + 0.5).mul_(2**-7 / in_features**0.5).half()
    zero = torch.randint(96, 160, (out, found.groups), generator=generator, dtype=torch.uint8, device=device)
    return TiledWeight((out, in_features), Grid(8, group, False, False), planes, arrays, scale, zero, {})


def candidates(product: Product, mma: bool = False) -> Iterator[Config]:
    """Configurations that may be the fastest for a product. mma: whether that kernel runs."""
    yield untuned(product.bits, product.batch, mma)
    if mma and product.batch <= MOST_MMA:
        block_m = min(32, max(8, batch_class(product.batch)))
        for block_n, warps, stages, registers in MMA_BLOCKS:
            yield Config("mma", block_n=block_n, block_m=block_m, warps=warps, stages=stages, registers=registers)
    tiles = blocking(product.in_features, product.in_features if product.group == -1 else product.group).tiles
    splits = [split for split in (1, 2, 4, 8) if split <= tiles]
    if product.batch <= 8 and not mma:  # which is twice as fast
        for block_n, block_k, warps in ((2, 8, 1), (4, 8, 1), (4, 16, 2), (8, 8, 1), (8, 4, 2)):
            for split in splits[:3]:
                yield Config("gemv", block_n=block_n, block_m=min(product.batch, 4), block_k=block_k, warps=warps, stages=1, split_k=split)
    if 16 * mma < product.batch <= 256:  # up to 16 rows mma is ahead
        block_m = min(128, max(8, batch_class(product.batch)))
        for block_n, warps in ((32, 2), (64, 4), (128, 4), (128, 8)):
            for stages in (2, 3):
                for split in splits:
                    yield Config("dot", block_n=block_n, block_m=block_m, warps=warps, stages=stages, split_k=split)
    if product.batch >= 32:
        for rows in (0, 2048, 8192):
            yield Config("dense", rows=rows)


def right(x: Tensor, weight: TiledWeight, bits: int, y: Tensor) -> bool:
    """Whether y is x W_r^T but for rounding."""
    want = x.float() @ weight.nested().read(bits).dense().T
    return bool((y.float() - want).abs().max() <= TOLERANCE[x.dtype] * want.abs().max())


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one call, when all of them take turns; the median of ROUNDS."""
    if device.type != "cuda":
        return median(_seconds(calls) for _ in range(ROUNDS)) * 1e6 / len(calls)
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return median(_replay(graph) for _ in range(ROUNDS)) * 1e3 / len(calls)


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def l2_bytes(device: torch.device) -> int:
    """Of the GPU's last cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_L2


def cold_copies(weight: TiledWeight, bits: int, device: torch.device) -> list[TiledWeight]:
    """The weight often enough that, read in turns, no copy is still in the cache."""
    count = max(2, min(MOST_COPIES, COLD * l2_bytes(device) // weight.read_bytes(bits) + 1))
    copies = [weight]
    for _ in range(count - 1):
        arrays = {name: weight.arrays[name].clone() for name in names(bits)}
        copies.append(replace(weight, arrays=arrays, scale=weight.scale.clone(), zero=None if weight.zero is None else weight.zero.clone()))
    return copies


def tune(product: Product, device: torch.device, tried: Callable[[Config, float | None], None] = lambda config, us: None) -> Row:
    """The fastest right configuration. tried: told of each, with microseconds or None where it does not run or is wrong.

    Raises ResourceError where no configuration is right, or the kernels cannot run.
    """
    ops.check(device)
    weight = random_weight(product.out, product.in_features, product.group, product.bits, device)
    x = torch.randn(product.batch, product.in_features, generator=torch.Generator(device).manual_seed(1), device=device).to(product.dtype)
    copies = cold_copies(weight, product.bits, device)
    best: tuple[float, Config] | None = None
    mma = mma_runs(device, product.dtype, product.in_features, weight.group)
    for config in dict.fromkeys(candidates(product, mma)):
        us = _measure(x, weight, copies, product.bits, config, device)
        tried(config, us)
        if us is not None and (best is None or us < best[0]):
            best = us, config
    if best is None:
        raise ResourceError(f"no configuration computes {product} rightly on {gpu_name(device)}; report it, and use device cpu meanwhile")
    group = product.in_features if product.group == -1 else product.group
    dtype = str(product.dtype).removeprefix("torch.")
    return Row(gpu_name(device), dtype, product.bits, batch_class(product.batch), product.out, product.in_features, group, best[1], round(best[0], 2))


def _measure(x: Tensor, weight: TiledWeight, copies: Sequence[TiledWeight], bits: int, config: Config, device: torch.device) -> float | None:
    """Microseconds, or None."""
    try:
        if not right(x, weight, bits, ops.linear(x, weight, bits, None, config)):
            return None
    except Exception as error:
        if not _does_not_fit(error):
            raise
        return None
    turns = copies if device.type != "cuda" else [*copies] * -(-FEWEST // len(copies))
    return microseconds([lambda copy=copy: ops.linear(x, copy, bits, None, config) for copy in turns], device)


def _does_not_fit(error: Exception) -> bool:
    """Whether Triton says that a configuration needs more than the GPU has, or that it cannot compile it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, OutOfResources | PTXASError | CompilationError)
