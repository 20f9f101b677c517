"""BitPlan (layer name -> bits) and the arithmetic of sizes: bytes and mean bits follow from shapes, never from a model.

A bit count here is what a reader of that width must hold for the quantized weights: its r code bits (r + 1 under
round-overflow below the parent's width, whose codes reach 2^r) plus, for every group, the parent's scale in its storage
dtype and the bytes that the read takes besides: the two of a refit, else the zero of an asymmetric grid. Never code bits alone.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from matquant.codes import WIDTHS, Grid, Slicing
from matquant.errors import PlanError, choices

SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
ZERO_BITS, REFIT_BITS = 8, 16  # of a group: a zero; k and u of a refit


@dataclass(frozen=True)
class Shape:
    """Of one quantized weight: `out` output channels, `in_features` input channels."""

    out: int
    in_features: int

    @property
    def weights(self) -> int:
        return self.out * self.in_features


@dataclass(frozen=True)
class Layout:
    """What all quantized modules of one checkpoint share: enough to tell every tensor's shape, dtype and size.

    widths: the read widths offered, descending. refit_widths: those with a refit.
    scale_dtype: of the parent's scales.
    """

    grid: Grid
    slicing: Slicing
    widths: tuple[int, ...]
    refit_widths: tuple[int, ...]
    scale_dtype: str

    def read_bits(self, shape: Shape, bits: int) -> int:
        """Bits that a `bits`-wide reader of one weight must hold, metadata included."""
        spill = 1 if self.slicing == "round-overflow" and bits < self.grid.bits else 0
        scale, zero = SCALE_BITS[self.scale_dtype], 0 if self.grid.symmetric else ZERO_BITS
        affine = scale + (REFIT_BITS if bits in self.refit_widths else zero)  # a refit holds the zero already
        return shape.weights * (bits + spill) + shape.out * self.grid.groups(shape.in_features) * affine

    def stored_bits(self, shape: Shape) -> int:
        """Bits that the files hold of one weight: all planes, the parent's scale and zero, every refit."""
        zero = 0 if self.grid.symmetric else ZERO_BITS
        affine = SCALE_BITS[self.scale_dtype] + zero + REFIT_BITS * len(self.refit_widths)
        row = -(-shape.in_features // 8) * 8  # a row of a plane fills whole bytes
        return shape.out * row * self.grid.bits + shape.out * self.grid.groups(shape.in_features) * affine


@dataclass(frozen=True)
class BitPlan:
    """Bits of every quantized layer: `overrides` by module name, else `default`."""

    default: int
    overrides: Mapping[str, int] = field(default_factory=dict[str, int])

    def bits(self, name: str) -> int:
        return self.overrides.get(name, self.default)

    @property
    def label(self) -> str:
        """How tables name it: the width of a uniform plan, else its range."""
        used = {self.default, *self.overrides.values()}
        return str(self.default) if len(used) == 1 else f"{min(used)}-{max(used)} mixed"

    def check(self, layers: Iterable[str], widths: Iterable[int]) -> "BitPlan":
        """Itself, if every layer and width it names exists. Raises PlanError otherwise."""
        names, allowed = list(layers), sorted(widths, reverse=True)
        for name in self.overrides:
            if name not in names:
                near = choices(name, names) if len(names) <= 8 else choices(name, names).partition("(")[2].strip("() ")
                raise PlanError(f"the plan names layer {name!r}, which the checkpoint does not have; {near or 'see matquant inspect for the names'}")
        for name, bits in [("default", self.default), *self.overrides.items()]:
            if bits not in allowed:
                raise PlanError(f"the plan gives {name} {bits} bits; {choices(bits, allowed)}")
        return self

    def read_bits(self, shapes: Mapping[str, Shape], layout: Layout) -> int:
        """Bits that a reader of this plan must hold for all quantized weights, metadata included."""
        return sum(layout.read_bits(shape, self.bits(name)) for name, shape in shapes.items())

    def mean_bits(self, shapes: Mapping[str, Shape], layout: Layout) -> float:
        """Bits per quantized weight, metadata included."""
        return self.read_bits(shapes, layout) / sum(shape.weights for shape in shapes.values())

    def to_json(self) -> str:
        return json.dumps({"default": self.default, "layers": dict(sorted(self.overrides.items()))}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "plan") -> "BitPlan":
        """Parse {"default": bits, "layers": {name: bits}}. Raises PlanError that names the line at fault."""
        try:
            data: Any = json.loads(text, object_pairs_hook=_no_duplicates)
        except json.JSONDecodeError as error:
            raise PlanError(f'{source}, line {error.lineno}: {error.msg}; a plan is JSON such as {{"default": 4, "layers": {{}}}}') from None
        except (RecursionError, ValueError):
            raise PlanError(f"{source} is nested too deeply, or holds a number too long, to be a plan") from None
        if not isinstance(data, dict) or not {"default"} <= data.keys() <= {"default", "layers"}:
            raise PlanError(f'{source} must be an object with "default" and, if wanted, "layers"')
        members = cast(dict[str, Any], data)
        layers = members.get("layers", {})
        if not isinstance(layers, dict):
            raise PlanError(f'{source}: "layers" must map layer names to bits')
        overrides = cast(dict[str, Any], layers)
        for name, bits in [("default", members["default"]), *overrides.items()]:
            if type(bits) is not int or bits not in WIDTHS:
                shown = "that are no number" if isinstance(bits, (list, dict)) else json.dumps(bits)
                raise PlanError(f"{source}, line {_line_of(text, name)}: {name!r} has bits {shown}; allowed: whole numbers from 2 to 8")
        return BitPlan(members["default"], overrides)

    @staticmethod
    def load(path: Path) -> "BitPlan":
        """Read a plan file. Raises PlanError."""
        try:
            return BitPlan.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}; give a JSON file") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise PlanError(f"the plan names {key!r} twice; keep one")
        seen[key] = value
    return seen


def _line_of(text: str, name: str) -> int:
    return text[: max(text.find(json.dumps(name)), 0)].count("\n") + 1
