"""BitPlan (layer name -> bits) and the arithmetic of sizes: bytes and mean bits follow from shapes, never from a model.

A bit count here is what a reader of that width must hold for the quantized weights: its r code bits (r + 1 under
round-overflow below the parent's width, whose codes reach 2^r) plus, for every group, the parent's scale in its storage
dtype and the bytes that the read takes besides: the two of a refit, else the zero of an asymmetric grid. Never code bits alone.
"""

import json
import re
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
class Table:
    """An embedding or output head that is stored quantized: [tokens, hidden], read at the width that it is stored in and part of no plan."""

    shape: Shape
    layout: Layout

    @staticmethod
    def of(shape: Shape, bits: int, group_size: int, symmetric: bool, scale_dtype: str) -> "Table":
        """Raises RecipeError for a width or a group that there cannot be."""
        return Table(shape, Layout(Grid(bits, group_size, symmetric, overlap=False), "floor", (bits,), (), scale_dtype))

    @property
    def bits(self) -> int:
        return self.layout.grid.bits

    @property
    def stored_bytes(self) -> int:
        """Of its tensors."""
        return self.layout.stored_bits(self.shape) // 8


@dataclass(frozen=True)
class BitPlan:
    """Bits of every quantized layer: `overrides` by module name, else `default`.

    about: how it was found and what it is worth, for people; no part of what the plan is. source, lines: the file that it was read from and
    the line of each key, for messages.
    """

    default: int
    overrides: Mapping[str, int] = field(default_factory=dict[str, int])
    about: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    source: str = field(default="", compare=False, repr=False)
    lines: Mapping[str, int] = field(default_factory=dict[str, int], compare=False, repr=False)

    def bits(self, name: str) -> int:
        return self.overrides.get(name, self.default)

    @property
    def label(self) -> str:
        """How tables name it: the width of a uniform plan, else its range."""
        used = {self.default, *self.overrides.values()}
        return str(self.default) if len(used) == 1 else f"{min(used)}-{max(used)} mixed"

    def check(self, layers: Iterable[str], widths: Iterable[int]) -> "BitPlan":
        """Itself, if every layer and width it names exists. Raises PlanError otherwise, which names the line of a plan that was read from a file."""
        names, allowed = list(layers), sorted(widths, reverse=True)
        for name in self.overrides:
            if name not in names:
                near = choices(name, names) if len(names) <= 8 else choices(name, names).partition("(")[2].strip("() ")
                raise PlanError(
                    f"{self._place(name)}the plan names layer {name!r}, which the checkpoint does not have; {near or 'see matquant inspect for the names'}"
                )
        for name, bits in [("default", self.default), *self.overrides.items()]:
            if bits not in allowed:
                raise PlanError(f"{self._place(name)}the plan gives {name} {bits} bits; {choices(bits, allowed)}")
        return self

    def _place(self, name: str) -> str:
        return f"{self.source}, line {self.lines[name]}: " if name in self.lines else ""

    def read_bits(self, shapes: Mapping[str, Shape], layout: Layout) -> int:
        """Bits that a reader of this plan must hold for all quantized weights, metadata included."""
        return sum(layout.read_bits(shape, self.bits(name)) for name, shape in shapes.items())

    def mean_bits(self, shapes: Mapping[str, Shape], layout: Layout) -> float:
        """Bits per quantized weight, metadata included."""
        return self.read_bits(shapes, layout) / sum(shape.weights for shape in shapes.values())

    def to_json(self) -> str:
        about = {"about": dict(self.about)} if self.about else {}
        return json.dumps({"default": self.default, "layers": dict(sorted(self.overrides.items())), **about}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "plan") -> "BitPlan":
        """Parse {"default": bits, "layers": {name: bits}, "about": {...}}. Raises PlanError that names the line at fault."""
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f'{source}, line {error.lineno}: {error.msg}; a plan is JSON such as {{"default": 4, "layers": {{}}}}') from None
        except (RecursionError, ValueError):
            raise PlanError(f"{source} is nested too deeply, or holds a number too long, to be a plan") from None
        lines = _key_lines(text, source)
        if not isinstance(data, dict) or not {"default"} <= data.keys() <= {"default", "layers", "about"}:
            known = ("default", "layers", "about")
            extra = next(((path[0], line) for path, line in lines.items() if len(path) == 1 and path[0] not in known), None)
            where = f"{source}, line {extra[1]}: unknown key {extra[0]!r}; a plan" if extra else source
            raise PlanError(f'{where} must be an object with "default" and, if wanted, "layers" and "about"')
        members = cast(dict[str, Any], data)
        for key, words in (("layers", "map layer names to bits"), ("about", "be an object")):
            if not isinstance(members.get(key, {}), dict):
                raise PlanError(f'{source}, line {lines[key,]}: "{key}" must {words}')
        overrides = cast(dict[str, Any], members.get("layers", {}))
        line_of = {path[-1]: line for path, line in lines.items() if len(path) == 2 and path[0] == "layers"} | {"default": lines["default",]}
        for name, bits in [("default", members["default"]), *overrides.items()]:
            if type(bits) is not int or bits not in WIDTHS:
                shown = "that are no number" if isinstance(bits, (list, dict)) else json.dumps(bits)
                raise PlanError(f"{source}, line {line_of[name]}: {name!r} has bits {shown}; allowed: whole numbers from 2 to 8")
        return BitPlan(members["default"], overrides, members.get("about", {}), source, line_of)

    @staticmethod
    def load(path: Path) -> "BitPlan":
        """Read a plan file. Raises PlanError."""
        try:
            return BitPlan.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}; give a JSON file") from None


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]|\n')


def _key_lines(text: str, source: str) -> dict[tuple[str, ...], int]:
    """Where every key of a JSON text stands: path of keys -> line, from 1. The text is known to be JSON. Raises PlanError for a key that stands twice."""
    found: dict[tuple[str, ...], int] = {}
    above: list[str] = []  # the key of every object and array that is open
    key, line, last = "", 1, ""
    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
            continue
        if token == ":":
            key = cast(str, json.loads(last))
            path = (*above[1:], key)
            if path in found and "" not in above[1:]:
                raise PlanError(f"{source}, line {line}: the plan names {key!r} twice, first in line {found[path]}; keep one")
            found[path] = line
        elif token in "{[":
            above.append(key if token == "{" else "")
        elif token in "}]":
            above.pop()
        last = token
    return found
