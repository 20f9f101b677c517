"""What stands in a checkpoint of version 1 or 2: config keys, tensor names, shapes, dtypes and allowed values.

One quantized module NAME of a c-bit parent with in input channels and g groups a row, and what each tensor is for:

    NAME.weight             uint8 [2, out, ceil(in / 8)]    planes 0 and 1
    NAME.plane.K            uint8 [out, ceil(in / 8)]       plane K, 2 <= K < c
    NAME.scale              float [out, g]                  of the parent grid, positive
    NAME.zero               uint8 [out, g]                  asymmetric grids only: 0 .. 2^c - 1
    NAME.scale.R, .zero.R   uint8 [out, g]                  the refit of width R: k 1 .. 255 and u of codes.refit_affine

A table (an embedding or output head, version 2) has the same tensors but for refits, with a grid of its own and all of them in the base family.

`need` of a tensor is how many planes a reader holds when the tensor becomes useful; it decides the shard family.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from matquant.codes import Grid, Slicing, check_rule, planes_needed
from matquant.errors import CheckpointError, InputError, RecipeError, choices
from matquant.plan import SCALE_BITS, Layout, Shape, Table

QUANT_METHOD = "matquant"
VERSIONS = (1, 2)  # 2: with tables
BASE, OF_TABLE = 0, 1  # `need` of a tensor of no module, and of a table
RESERVED = ("weight", "plane", "scale", "zero")
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # of scales: torch's name -> safetensors'

# What safetensors call the types of numbers.
STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What config.json says about the tensors. inputs: of modules and tables, name -> input channels. bits: the default read width.

    tables: name -> layout of its own.
    """

    layout: Layout
    inputs: Mapping[str, int]
    bits: int
    not_converted: tuple[str, ...]
    tables: Mapping[str, Layout]

    @property
    def modules(self) -> list[str]:
        return [name for name in self.inputs if name not in self.tables]


def parse_config(config: Mapping[str, Any], source: str) -> Spec:
    """Raises InputError if this is no matquant checkpoint, CheckpointError for every way to be a wrong one."""
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{source} describes no matquant checkpoint; quantize the model first (matquant quantize)")
    version = section.get("format_version")
    if type(version) is not int or version not in VERSIONS:
        raise CheckpointError(f"{source}: format_version is {version!r}; this matquant reads versions 1 and 2; install a newer matquant")
    get = _Keys(section, source)
    slicing, scale_dtype = get.one(str, "slicing"), get.one(str, "scale_dtype")
    if scale_dtype not in SCALE_BITS:
        raise CheckpointError(f"{source}: scale_dtype is {scale_dtype!r}; {choices(scale_dtype, SCALE_BITS)}")
    widths, refits = get.widths("widths"), get.widths("refit_widths")
    inputs, skipped = section.get("modules"), section.get("modules_to_not_convert") or []
    if not isinstance(inputs, dict) or not inputs or not all(type(n) is int and 0 < n < 2**31 for n in inputs.values()):
        raise CheckpointError(f"{source}: modules must map each quantized module to its number of input channels")
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CheckpointError(f"{source}: modules_to_not_convert must be a list of names")
    try:
        grid = Grid(get.one(int, "parent_bits"), get.one(int, "group_size"), get.one(bool, "symmetric"), get.one(bool, "overlap"))
        for bits in widths:
            check_rule(bits, grid, cast(Slicing, slicing))
        for count in set(inputs.values()):
            grid.groups(count)
    except RecipeError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if not widths or not set(refits) <= set(widths) or get.one(int, "bits") not in widths:
        raise CheckpointError(f"{source}: widths {list(widths)} must hold bits ({section['bits']}) and every one of refit_widths {list(refits)}")
    layout = Layout(grid, cast(Slicing, slicing), widths, refits, scale_dtype)
    tables = _tables(section, layout, source)
    if both := sorted(inputs.keys() & tables.keys()):
        raise CheckpointError(f"{source}: {both[0]} is a module and a table; it can be one only")
    of_tables = {name: table.shape.in_features for name, table in tables.items()}
    return Spec(layout, inputs | of_tables, section["bits"], tuple(skipped), {name: table.layout for name, table in tables.items()})


def _tables(section: Mapping[str, Any], layout: Layout, source: str) -> dict[str, Table]:
    """Raises CheckpointError. The shapes lack their rows: those stand in the tensors."""
    found = section.get("tables")
    if section["format_version"] == 1:
        if found is not None:
            raise CheckpointError(f"{source}: format_version is 1, but there are tables, which came with version 2; one of them was edited")
        return {}
    if not isinstance(found, dict) or not found or not all(isinstance(table, dict) for table in found.values()):
        raise CheckpointError(f"{source}: tables must map each quantized embedding or head to its bits, group_size and in")
    tables: dict[str, Table] = {}
    for name, table in found.items():
        get = _Keys(table, f"{source}: table {name}")
        bits, size, count = (get.one(int, key) for key in ("bits", "group_size", "in"))
        if not 0 < count < 2**31:
            raise CheckpointError(f"{source}: table {name}: in is {count}; allowed: 1 to 2^31 - 1")
        try:
            tables[name] = Table.of(Shape(0, count), bits, size, layout.grid.symmetric, layout.scale_dtype)
            tables[name].layout.grid.groups(count)
        except RecipeError as error:
            raise CheckpointError(f"{source}: table {name}: {str(error).replace('parent_bits', 'bits')}") from None
    return tables


@dataclass(frozen=True)
class _Keys:
    """Typed look-ups in one JSON object."""

    section: Mapping[str, Any]
    source: str

    def one(self, kind: type, key: str) -> Any:
        value = self.section.get(key)
        if type(value) is not kind:
            raise CheckpointError(f"{self.source}: {key} is {value!r}; it must be of type {kind.__name__}")
        return value

    def widths(self, key: str) -> tuple[int, ...]:
        value = self.section.get(key)
        if not isinstance(value, list) or not all(type(r) is int for r in value) or value != sorted(set(value), reverse=True):
            raise CheckpointError(f"{self.source}: {key} is {value!r}; it must be a descending list of widths")
        return tuple(value)


# --- names ----------------------------------------------------------------------------------------------------------


def suffixes(layout: Layout) -> dict[str, int]:
    """Every suffix that a module's tensors have -> `need`, the planes a reader holds when it wants that tensor."""
    c = layout.grid.bits
    found = {"weight": 2, "scale": 2} | ({} if layout.grid.symmetric else {"zero": 2})
    found |= {f"plane.{k}": k + 1 for k in range(2, c)}
    for r in layout.refit_widths:
        need = max(2, planes_needed(r, c, layout.slicing))
        found |= {f"scale.{r}": need, f"zero.{r}": need}
    return found


def owner_of(tensor: str, modules: Collection[str]) -> str | None:
    """The module whose reserved names `tensor` belongs to: NAME.weight, NAME.plane.*, ...; None for a base tensor."""
    head, _, last = tensor.rpartition(".")
    if last in RESERVED and head in modules:
        return head
    owner, _, kind = head.rpartition(".")
    return owner if kind in RESERVED and owner in modules else None


def needs(names: Iterable[str], spec: Spec) -> dict[str, int]:
    """`need` of every tensor. Raises CheckpointError for a name that a module or a table must not have."""
    known, result = suffixes(spec.layout), dict[str, int]()
    for name in names:
        owner = owner_of(name, spec.inputs)
        if owner is None:
            result[name] = BASE
            continue
        own = dict.fromkeys(suffixes(spec.tables[owner]), OF_TABLE) if owner in spec.tables else known
        suffix = name[len(owner) + 1 :]
        if suffix not in own:
            kind = "table" if owner in spec.tables else "module"
            raise CheckpointError(f"extra tensor {name!r}: {kind} {owner!r} of this checkpoint has {', '.join(own)} only")
        result[name] = own[suffix]
    return result


def family(need: int) -> str:
    """The shard family of a tensor: base, plane2, ... plane7."""
    return "base" if need <= 2 else f"plane{need - 1}"


def missing_of(needs_here: Mapping[str, int], spec: Spec, planes: int) -> list[str]:
    """The tensors that tables, and the first `planes` planes of every module, call for and that `needs_here` does not name."""
    wanted = [suffix for suffix, need in suffixes(spec.layout).items() if need <= planes]
    called = [f"{name}.{suffix}" for name in spec.modules for suffix in wanted]
    called += [f"{name}.{suffix}" for name, layout in spec.tables.items() for suffix in suffixes(layout)]
    return [tensor for tensor in called if tensor not in needs_here]


# --- shapes and values ----------------------------------------------------------------------------------------------


def expected(suffix: str, shape: Shape, layout: Layout) -> tuple[str, list[int]]:
    """(safetensors dtype, shape) of one tensor of a module."""
    row, groups = -(-shape.in_features // 8), layout.grid.groups(shape.in_features)
    if suffix == "weight":
        return "U8", [2, shape.out, row]
    if suffix.startswith("plane."):
        return "U8", [shape.out, row]
    return DTYPES[layout.scale_dtype] if suffix == "scale" else "U8", [shape.out, groups]


def value_problem(suffix: str, tensor: Tensor, in_features: int, layout: Layout) -> str | None:
    """What is wrong with the values of one tensor of a module; None if nothing is."""
    kind = suffix.partition(".")[0]
    if kind in ("weight", "plane"):
        used = in_features % 8
        return "has padding bits that are not zero" if used and bool((tensor[..., -1] >> used).any()) else None
    if suffix == "scale" and not bool(torch.isfinite(tensor).all()):
        return "is not finite everywhere"
    if kind == "scale" and not bool((tensor > 0).all()):
        return "is not positive everywhere"
    if suffix == "zero" and not bool((tensor <= layout.grid.max_code).all()):
        return f"exceeds {layout.grid.max_code}, the largest code"
    return None
