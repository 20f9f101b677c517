"""Tables: the output head and the embeddings, rounded to nearest and stored at one width (`Recipe.head_bits`).

They are a large part of a small model, and no layers: an embedding is looked up and not multiplied, and 8 bits are next to nothing off for either. So
they take part in no plan and are read at the width that they are stored in, whatever the layers are read at. Codes, scales and zeros are those of a
layer whose parent is that width; all of it stands in the base family of the files. A tied table is stored once, under the embedding's name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matquant.checkpoint import Checkpoint, module_tensors
from matquant.codes import Grid, fit_grid, nearest_code
from matquant.errors import CheckpointError
from matquant.packing import unpack_planes
from matquant.plan import Shape, Table
from matquant.recipe import Recipe
from matquant.weight import NestedWeight

GROUPS = (64, 32)  # input channels that share a scale: the first that divides a row, else the whole row
AT_ONCE = 2**17  # weights that are rounded at a time: their floats stay in a second-level cache


def fitting_group(hidden: int, sizes: Iterable[int] = GROUPS) -> int:
    """The first of `sizes` that divides a row, else -1."""
    return next((size for size in sizes if size == -1 or hidden % size == 0), -1)


# --- which ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """tables: by the name of the module that has the tensor. left: (module, why it stays as it is). held: names of all modules that read a table."""

    tables: Mapping[str, Table]
    left: tuple[tuple[str, str], ...] = ()
    held: frozenset[str] = frozenset()


def find_tables(model: Any, recipe: Recipe) -> Found:
    """What of a model is stored as a table by this recipe."""
    if not recipe.head_bits:
        return Found({})
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables: dict[str, Table] = {}
    left: list[tuple[str, str]] = []
    held: set[str] = set()
    for owner in (module for module in (embedding, head) if module is not None):
        readers = [module for module in model.modules() if getattr(module, "weight", None) is owner.weight]
        name = names[id(owner)]
        if name in held or any(name == known for known, _ in left):
            continue
        reasons = [(names[id(reader)], _unfit(reader, names[id(reader)], (embedding, head), recipe)) for reader in readers]
        if why := next((reason for _, reason in reasons if reason), ""):
            left += [(reader, why) for reader, _ in reasons]
            continue
        held |= {reader for reader, _ in reasons}
        size = fitting_group(owner.weight.shape[1], (recipe.group_size, *GROUPS))
        tables[name] = Table.of(Shape(*owner.weight.shape), recipe.head_bits, size, recipe.symmetric, recipe.scale_dtype)
    return Found(tables, tuple(left), frozenset(held))


def _unfit(module: nn.Module, name: str, known: tuple[Any, Any], recipe: Recipe) -> str:
    """Why a module must read its weight as it is; empty if it need not."""
    pattern = next((p for p in recipe.skip if fnmatchcase(name, p) or name.endswith("." + p)), None)
    if pattern:
        return f"asked for by --skip {pattern}"
    if not any(module is one for one in known):
        return f"shared with {name}, which is neither head nor embedding"
    if not isinstance(module, nn.Embedding) and type(module).forward is not nn.Linear.forward:
        return f"read by {name}, a {type(module).__name__}, which is neither a linear layer nor an embedding"
    return ""


# --- rounding -------------------------------------------------------------------------------------------------------


def rounded_table(weight: Tensor, table: Table) -> NestedWeight:
    """A weight [tokens, hidden] as `table` says."""
    dtype = getattr(torch, table.layout.scale_dtype)
    return rounded_rows(lambda first, end: weight[first:end], *weight.shape, table.layout.grid, dtype=dtype)


def table_tensors(tensors: Mapping[str, Tensor], tables: Mapping[str, Table]) -> dict[str, Tensor]:
    """All of them as they are stored. tensors: of the model. Raises CheckpointError for a scale that its type cannot hold."""
    found: dict[str, Tensor] = {}
    for name, table in tables.items():
        found |= module_tensors(name, rounded_table(tensors[f"{name}.weight"], table))
    return found


def rounded(weight: Tensor, grid: Grid) -> NestedWeight:
    """A weight [out, in] rounded to nearest."""
    return rounded_rows(lambda first, end: weight[first:end], *weight.shape, grid)


def rounded_rows(
    rows: Callable[[int, int], Tensor], out: int, in_features: int, grid: Grid, pool: Executor | None = None, dtype: torch.dtype = torch.float16
) -> NestedWeight:
    """The same of a weight whose rows from one to before another `rows` gives: no more than some are held as floats. dtype: of scales."""
    groups = grid.groups(in_features)
    codes = torch.empty(out, in_features, dtype=torch.uint8)
    scales = torch.empty(out, groups, dtype=dtype)
    zeros = None if grid.symmetric else torch.empty(out, groups, dtype=torch.uint8)
    step = max(1, AT_ONCE // in_features)

    def some(first: int) -> None:
        own = slice(first, min(first + step, out))
        grouped = rows(own.start, own.stop).float().reshape(own.stop - first, groups, -1)
        scale, zero = fit_grid(grouped, grid, dtype)
        t = grouped / scale[..., None] + (grid.center if zero is None else zero[..., None])
        codes[own] = nearest_code(t, grid).reshape(-1, in_features)
        scales[own] = scale.to(dtype)
        if zeros is not None and zero is not None:
            zeros[own] = zero.to(torch.uint8)

    for _ in (pool.map if pool else map)(some, range(0, out, step)):
        pass
    return NestedWeight(codes, scales, zeros, grid, "floor", planes=grid.bits)


# --- looking up -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of a table by token. planes: [tokens, bytes] each, the most significant first; of those that lie in a mapped file only the rows are read."""

    table: Table
    planes: Sequence[Tensor]
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(checkpoint: Checkpoint, name: str) -> "Rows":
        """Planes stay in their file. Raises CheckpointError."""
        table = checkpoint.tables[name]
        suffixes = ["weight", *(f"plane.{k}" for k in range(2, table.bits))]
        if problem := next(filter(None, (checkpoint.problem(name, suffix) for suffix in suffixes)), None):
            raise CheckpointError(f"{checkpoint.folder}: a plane of {name} {problem}; the checkpoint is damaged, fetch it again")
        first, *others = (checkpoint.tensor(f"{name}.{suffix}") for suffix in suffixes)
        zero = None if table.layout.grid.symmetric else checkpoint.value(name, "zero")
        return Rows(table, [*first, *others], checkpoint.value(name, "scale"), zero)

    def __getitem__(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
        """Rounded once, to float32."""
        table = self.table
        codes = unpack_planes(torch.stack([plane[ids] for plane in self.planes]), table.shape.in_features, table.bits)
        zero = None if self.zero is None else self.zero[ids]
        return NestedWeight(codes, self.scale[ids], zero, table.layout.grid, "floor", planes=table.bits).read(table.bits).dense()
