"""Budgets: what a plan may take, as a whole-numbered cost of every unit at every width and the most that they may sum to.

mean bits      bits of the quantized weights, metadata counted, over their number; or of the whole model, the rest as it is stored
file bytes     tensors that are not quantized, and of each layer the planes, scales and refit of its width: what a file of this plan alone holds
               (of a folder, whole planes are fetched: all that its widest layer needs)
memory         the same, and what the CPU runtime adds: keys and values of a context, an 8-bit copy of a head that is not quantized
tokens/s       a latency table of `matquant bench`: {"overhead_seconds": s, "latency": [{"out", "in", "bits", "seconds"}, ...]}; a token takes the
               overhead and the time of one product with every layer at its width
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from matquant.errors import InputError, PlanError
from matquant.plan import SCALE_BITS, ZERO_BITS, Layout, Shape

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
KV_BYTES = 4  # of a number in the cache of kernels/step.py
HEAD_BITS = 8 + (SCALE_BITS["float16"] + ZERO_BITS) / 64  # as engine.Engine.open rounds a head that is not quantized


@dataclass(frozen=True)
class Model:
    """What budgets are counted on. units: layers with one width each. other_weights, other_bytes: numbers and bytes that are not quantized.

    cache, head: as units.Structure has them.
    """

    units: Sequence[Sequence[str]]
    shapes: Mapping[str, Shape]
    layout: Layout
    other_weights: int
    other_bytes: int
    cache: Sequence[tuple[int, int | None]] = ()
    head: int = 0

    @property
    def weights(self) -> int:
        return sum(shape.weights for shape in self.shapes.values())

    def bits(self) -> Int[np.ndarray, "units widths"]:
        """Bits of every unit at every width of the layout, metadata counted."""
        rows = [[sum(self.layout.read_bits(self.shapes[name], r) for name in unit) for r in self.layout.widths] for unit in self.units]
        return np.array(rows, dtype=np.int64)

    def kv_bytes(self, context: int) -> int:
        """Of the keys and values of a text of that many tokens."""
        return KV_BYTES * sum(numbers * min(context, window or context) for numbers, window in self.cache)


@dataclass(frozen=True)
class Budget:
    """costs: of every unit at every width. limit: the most that they may sum to. show: a sum in the words of whoever set it, rounded so that it is met."""

    costs: Int[np.ndarray, "units widths"]
    limit: int
    show: Callable[[float], str]

    @property
    def uniform(self) -> list[int]:
        """Columns of the widths that all units may have at once, the dearest last."""
        costs = self.costs.sum(0)
        return [k for k in sorted(range(len(costs)), key=costs.__getitem__) if costs[k] <= self.limit]


def mean_bits(model: Model, bits: float, whole: bool = False) -> Budget:
    """Of the quantized weights, or of the whole model. Raises PlanError for what is no number of bits."""
    if not 0 < bits <= 32:
        raise PlanError(f"the budget is {bits:g} bits a weight; give a number between 2 and 16, such as 3.5")
    numbers, fixed = (model.weights + model.other_weights, 8 * model.other_bytes) if whole else (model.weights, 0)
    words = "of the whole model" if whole else "of the quantized part, metadata counted"
    limit = math.floor(bits * numbers + 1e-6) - fixed
    return Budget(model.bits(), limit, lambda cost: f"{_up((cost + fixed) / numbers, 3)} bits a weight {words}")


def file_bytes(model: Model, size: int) -> Budget:
    return Budget(model.bits(), 8 * (size - model.other_bytes), lambda cost: f"{_size(model.other_bytes + math.ceil(cost / 8))} of file")


def memory(model: Model, size: int, context: int) -> Budget:
    fixed = model.other_bytes + model.kv_bytes(context) + math.ceil(model.head * HEAD_BITS / 8)
    words = f"of memory with a context of {context} tokens" if context else "of memory"
    return Budget(model.bits(), 8 * (size - fixed), lambda cost: f"{_size(fixed + math.ceil(cost / 8))} {words}")


def speed(model: Model, table: "Latency", tokens_per_second: float) -> Budget:
    """Raises PlanError for a speed that is none, or a layer whose time is not in the table."""
    if not tokens_per_second > 0:
        raise PlanError(f"the speed is {tokens_per_second:g} tokens a second; give a positive number")
    costs = [[sum(table.nanoseconds(model.shapes[name], r) for name in unit) for r in model.layout.widths] for unit in model.units]
    limit = math.floor(1e9 * (1 / tokens_per_second - table.overhead))
    show = lambda cost: f"{math.floor(100 / (table.overhead + cost / 1e9)) / 100:g} tokens a second"  # noqa: E731
    return Budget(np.array(costs, dtype=np.int64), limit, show)


# --- words and tables -----------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """'6GiB' -> bytes. Raises PlanError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    factor = UNITS.get(found[2] or "B") if found else None
    if found is None or factor is None:
        raise PlanError(f"the size is {text!r}; give a number and one of {', '.join(UNITS)}, such as 6GiB")
    return math.floor(float(found[1]) * factor)


@dataclass(frozen=True)
class Latency:
    """What `matquant bench` measured. overhead: seconds of a token beside its products. seconds: of one product, by (out, in, bits)."""

    overhead: float
    seconds: Mapping[tuple[int, int, int], float]

    def nanoseconds(self, shape: Shape, bits: int) -> int:
        """Rounded up. Raises PlanError for what was not measured."""
        found = self.seconds.get((shape.out, shape.in_features, bits))
        if found is None:
            raise PlanError(
                f"the latency table has no time of a {shape.out} x {shape.in_features} layer at {bits} bits; measure this checkpoint (matquant bench)"
            )
        return math.ceil(found * 1e9)

    @staticmethod
    def load(path: Path) -> "Latency":
        """Raises InputError for a file that is no such table."""
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            rows = {(int(row["out"]), int(row["in"]), int(row["bits"])): float(row["seconds"]) for row in data["latency"]}
            found = Latency(float(data["overhead_seconds"]), rows)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is no latency table ({error!r}); make one with matquant bench") from None
        if not all(math.isfinite(value) and value >= 0 for value in (found.overhead, *rows.values())):
            raise InputError(f"{path} has a time that is negative or no number; measure again with matquant bench")
        return found


def _up(value: float, digits: int) -> str:
    return f"{math.ceil(value * 10**digits - 1e-6) / 10**digits:g}"


def _size(count: int) -> str:
    """Bytes for people, rounded up: typed back, it is enough."""
    unit = next((unit for unit in ("GB", "MB", "kB") if count >= UNITS[unit]), "B")
    return f"{_up(count / UNITS[unit], 3)}{unit}"
