"""A decode step, captured once for each plan of widths that is asked for, so that a change of widths is a change of graphs.

A captured kernel is the kernel of its width, with the arrays of its width, and cannot be another. So each plan has a graph of its own; all read
the same inputs, write the same output and take their memory from one pool, and weights are one copy. The first step at a plan captures it;
after that, a step at any plan is one replay: nothing is captured or allocated.

    step = PlanGraphs(lambda: model(token, cache), lambda plan: set_bits(model, plan), layers)
    logits = step(4); logits = step(2); logits = step(BitPlan(...))

The alternative, one graph whose kernels read their width from memory, holds every width's code in every kernel, and so gives two bits the
registers of eight.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from matquant.errors import MissingPlanesError
from matquant.kernels.gpu.layout import TiledWeight

Plan = TypeVar("Plan", bound=Hashable)
Replay = Callable[[], object]
Recorder = Callable[[Callable[[], None]], Replay]
WARMUPS = 2  # runs before a capture: kernels are compiled and libraries initialised there, which a capture does not allow


@runtime_checkable  # by pytest's shape checker
class Layer(Protocol):
    """What is asked of a layer; a NestedLinear after `tile` has it."""

    tiles: TiledWeight | None

    @property
    def bits(self) -> int: ...


@dataclass(frozen=True)
class _Graph:
    """A captured step. widths, addresses: of every layer, when it was captured."""

    replay: Replay
    widths: tuple[int, ...]
    addresses: tuple[tuple[int, ...], ...]


@dataclass
class PlanGraphs(Generic[Plan]):
    """Captured steps.

    step: reads and writes tensors that stay where they are, does the same when repeated, and returns the output. switch: sets a plan's widths.
    layers: those whose planes may be evicted and restored; the graphs that read what moved are captured anew when they are next wanted.
    record: runs a function and returns what repeats it (None: a CUDA graph).
    """

    step: Callable[[], Tensor]
    switch: Callable[[Plan], object]
    layers: Sequence[Layer]
    record: Recorder | None = None
    output: Tensor | None = None
    graphs: dict[Plan, _Graph] = field(default_factory=dict[Any, _Graph])
    current: Plan | None = None
    moved: int = 0

    def __call__(self, plan: Plan) -> Tensor:
        """One step at a plan. The output is overwritten by the next step. Raises as `switch`."""
        moved = sum(tiles.moved for tiles in self._tiles())
        if moved != self.moved:
            self.graphs = {plan: graph for plan, graph in self.graphs.items() if self._addresses(graph.widths) == graph.addresses}
            self.moved, self.current = moved, None
        if plan != self.current:
            self.switch(plan)
            self.current = plan
        if plan not in self.graphs:
            self._capture(plan)
        self.graphs[plan].replay()
        assert self.output is not None
        return self.output

    def _capture(self, plan: Plan) -> None:
        if self.output is None:
            self.output = torch.empty_like(self.step())
        if self.record is None:
            self.record = cuda_recorder()
        output, widths = self.output, tuple(layer.bits for layer in self.layers)
        addresses = self._addresses(widths)
        assert addresses is not None, "switch let a width pass whose planes are not here"

        def run() -> None:
            output.copy_(self.step())

        self.graphs[plan] = _Graph(self.record(run), widths, addresses)

    def _tiles(self) -> list[TiledWeight]:
        return [layer.tiles for layer in self.layers if layer.tiles is not None]

    def _addresses(self, widths: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
        """Where what the layers read at these widths lies; None if some of it is not on the device."""
        try:
            return tuple(tiles.addresses(bits) for tiles, bits in zip(self._tiles(), widths, strict=True))
        except MissingPlanesError:
            return None


def cuda_recorder() -> Recorder:
    """Captures CUDA graphs whose memory comes from one pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return record
