"""Checkpoint: open a folder by its headers, then read tensors on demand.

`open` checks everything that names, shapes and dtypes can tell and reads no tensor. A weight file is compared with its
sha256 in MANIFEST.json before the first tensor of it is handed out, because a flipped bit in a plane is invisible
otherwise; that costs one pass over bytes that are about to be read anyway (1.7 GB/s on one core with SHA instructions).
Files of planes that a width does not need are never read, hashed or not.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from matquant.checkpoint.files import CONFIG, MANIFEST, Manifest, locate, present, walk
from matquant.checkpoint.format import BASE, STORED, needs, parse_config, value_problem
from matquant.checkpoint.opening import check_recipe, open_files, planes_here, read_json, shapes_of
from matquant.codes import planes_needed
from matquant.errors import CheckpointError, InputError, MatquantError, MissingPlanesError, PlanError, choices
from matquant.packing import unpack_planes
from matquant.plan import Layout, Shape, Table
from matquant.recipe import Recipe
from matquant.weight import NestedWeight, Refit


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. planes: how many leading planes of every module are here. missing: weight files that are not.

    tables: embeddings and heads that are stored quantized; no part of any plan.
    index: tensor -> file, of the whole checkpoint. manifest: None if there is none, or under checksums=False.
    """

    folder: Path
    config: Mapping[str, Any]
    layout: Layout
    modules: Mapping[str, Shape]
    tables: Mapping[str, Table]
    planes: int
    bits: int
    not_converted: tuple[str, ...]
    index: Mapping[str, str]
    missing: tuple[str, ...]
    manifest: Manifest | None
    _needs: Mapping[str, int] = field(repr=False)
    _handles: Mapping[str, Any] = field(repr=False, compare=False)
    _sound: set[str] = field(repr=False, compare=False)  # weight files whose sha256 has been compared
    _headers: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict[str, tuple[int, dict[str, Any]]], repr=False, compare=False)

    @staticmethod
    def open(folder: Path | str, *, checksums: bool = True) -> "Checkpoint":
        """Check the structure and read no tensor.

        checksums=False trusts the files' bytes (and ignores MANIFEST.json): for folders edited on purpose.
        Raises InputError if the folder is no matquant checkpoint, CheckpointError if it is a damaged one.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give the folder of a checkpoint")
        if not present(folder, CONFIG):
            raise InputError(f"{folder} has no {CONFIG}, so it is no checkpoint; give the folder that matquant quantize wrote")
        manifest = Manifest.load(folder) if checksums else None
        config = read_json(folder, CONFIG, manifest)
        spec = parse_config(config, str(folder / CONFIG))
        check_recipe(config["quantization_config"], str(folder / CONFIG))
        index, handles = open_files(folder, manifest)
        need = needs(index, spec)
        missing = tuple(sorted(set(index.values()) - set(handles)))
        planes = planes_here(spec, index, need, missing)
        shapes = shapes_of(spec, index, need, handles)
        modules = {name: shapes[name] for name in spec.modules}
        tables = {name: Table(shapes[name], layout) for name, layout in spec.tables.items()}
        return Checkpoint(
            folder, config, spec.layout, modules, tables, planes, spec.bits, spec.not_converted, index, missing, manifest, need, handles, set()
        )

    # --- what is offered ------------------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        """The offered widths that the planes here allow, descending."""
        return tuple(bits for bits in self.layout.widths if self._planes_for(bits) <= self.planes)

    @property
    def recipe(self) -> Recipe:
        """How it was made. Raises CheckpointError if config.json has no recipe, or one of another matquant."""
        try:
            return Recipe.of_record(self.config["quantization_config"]["recipe"])
        except (KeyError, MatquantError, ArithmeticError) as error:
            raise CheckpointError(f"{self.folder / CONFIG} has no recipe that this matquant understands: {error}") from None

    @property
    def plans(self) -> tuple[str, ...]:
        """Names of the plan files in the folder, such as plans/3.5.json."""
        return tuple(name for name in walk(self.folder) if name.startswith("plans/") and name.endswith(".json"))

    def check_widths(self, *bits: int) -> None:
        """Raise PlanError for a width that is not offered, MissingPlanesError for one whose plane files are not here."""
        for width in bits:
            if width not in self.layout.widths:
                raise PlanError(f"{self.folder} does not offer {width} bits; {choices(width, self.layout.widths)}")
            if (need := self._planes_for(width)) > self.planes:
                files = [file for file in self.weight_files(width) if file in self.missing]
                fetch = f"fetch {', '.join(files)}" if files else "the checkpoint was saved without them; fetch the full one"
                raise MissingPlanesError(f"{width} bits need planes 0-{need - 1}, but {self.folder} has only 0-{self.planes - 1}; {fetch}")

    def _planes_for(self, bits: int) -> int:
        return planes_needed(bits, self.layout.grid.bits, self.layout.slicing)

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, name: str, bits: int | Sequence[int] | None = None) -> NestedWeight:
        """One module: the planes and refits that reads at these widths need; None = all planes and refits here.

        A weight read for some bits is meant for these alone: it lacks the refits of the others.
        Raises InputError, MissingPlanesError, CheckpointError.
        """
        if name not in self.modules:
            near = choices(name, self.modules).partition("(")[2].strip("()")
            raise InputError(f"{self.folder} has no quantized module {name!r}; {near or 'see matquant inspect for the names'}")
        if bits is None:
            planes, refits = self.planes, [r for r in self.layout.refit_widths if self._planes_for(r) <= self.planes]
        else:
            wanted = (bits,) if isinstance(bits, int) else bits
            self.check_widths(*wanted)
            planes, refits = self._planes_for(max(wanted)), [r for r in self.layout.refit_widths if r in wanted]
        return nested_weight(lambda suffix: self.value(name, suffix), self.layout, self.modules[name].in_features, planes, refits)

    def table(self, name: str) -> NestedWeight:
        """A table, read at its own width only. Raises CheckpointError."""
        found = self.tables[name]
        return nested_weight(lambda suffix: self.value(name, suffix), found.layout, found.shape.in_features, found.bits, ())

    @property
    def base(self) -> "BaseTensors":
        """Lazy: the tensors of no module and no table."""
        return BaseTensors(self)

    @property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes, from the headers."""
        return {name: tuple(self._handles[self.index[name]].get_slice(name).get_shape()) for name in self.base}

    @property
    def other_weights(self) -> int:
        """Numbers of the model outside of its modules."""
        return sum(map(prod, self.base_shapes.values())) + sum(table.shape.weights for table in self.tables.values())

    @property
    def other_bytes(self) -> int:
        """What they take, tables as they are stored."""
        return self.base_bytes + sum(table.stored_bytes for table in self.tables.values())

    @property
    def base_bytes(self) -> int:
        """Their bytes, from the headers."""
        slices = {name: self._handles[self.index[name]].get_slice(name) for name in self.base}
        return sum(prod(found.get_shape()) * STORED[found.get_dtype()].itemsize for found in slices.values())

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, its file's sha256 compared first. Raises CheckpointError, MissingPlanesError."""
        file = self.index[name]
        if file in self.missing:
            raise MissingPlanesError(f"{name} is in {file}, which is not in {self.folder}; fetch it")
        self._check_file(file)
        try:
            return self._handles[file].get_tensor(name)
        except (SafetensorError, RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {name}: {error}") from None

    def rows(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Rows of one stored tensor as a copy, where `tensor` maps the file and keeps what has been looked at in memory. Raises as `tensor`."""
        file = self.index[name]
        if file in self.missing:
            raise MissingPlanesError(f"{name} is in {file}, which is not in {self.folder}; fetch it")
        self._check_file(file)
        try:
            dtype, shape, begin = self._place(file, name)
            row = prod(shape[1:]) * dtype.itemsize
            end = shape[0] if end is None else min(end, shape[0])
            found = torch.empty((end - first, *shape[1:]), dtype=dtype)
            with open(locate(self.folder, file), "rb") as handle:
                handle.seek(begin + first * row)
                got = handle.readinto(found.view(-1).view(torch.uint8).numpy()) if found.numel() else 0  # type: ignore[arg-type]
            if got != found.nbytes:
                raise ValueError(f"the file ends after {got} of {found.nbytes} bytes")
            return found
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {name}: {error}") from None

    def _place(self, file: str, name: str) -> tuple[torch.dtype, list[int], int]:
        """(dtype, shape, first byte in the file) of a tensor, by the header that the safetensors library has found valid."""
        if file not in self._headers:
            with open(locate(self.folder, file), "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                self._headers[file] = length, json.loads(handle.read(length))
        length, header = self._headers[file]
        return STORED[header[name]["dtype"]], header[name]["shape"], 8 + length + header[name]["data_offsets"][0]

    def problem(self, name: str, suffix: str) -> str | None:
        """What is wrong with the values of NAME.suffix; None if nothing is."""
        return self._problem(name, suffix, self.tensor(f"{name}.{suffix}"))

    def _problem(self, name: str, suffix: str, tensor: Tensor) -> str | None:
        of = self.tables.get(name) or Table(self.modules[name], self.layout)
        return value_problem(suffix, tensor, of.shape.in_features, of.layout)

    def value(self, name: str, suffix: str) -> Tensor:
        """One tensor of a module or table as a copy, its values checked. Raises as `tensor`."""
        tensor = self.rows(f"{name}.{suffix}")
        if problem := self._problem(name, suffix, tensor):
            raise CheckpointError(f"{self.folder}: {name}.{suffix} {problem}; the checkpoint is damaged, fetch it again")
        return tensor

    def _check_file(self, file: str) -> None:
        if self.manifest is None or file in self._sound:
            return
        if problem := self.manifest.problem(self.folder, file):
            raise CheckpointError(problem)
        self._sound.add(file)

    # --- files ----------------------------------------------------------------------------------------------------

    def weight_files(self, bits: int) -> list[str]:
        """Weight files that hold something a `bits`-wide reader needs, here or not."""
        planes = self._planes_for(bits)
        return sorted({self.index[name] for name, need in self._needs.items() if need <= planes})

    def files_for(self, bits: int) -> list[str]:
        """What a reader of that width must fetch: everything but the weight files of planes that it does not need."""
        listed = [*self.manifest.files, MANIFEST] if self.manifest else walk(self.folder)
        return sorted({name for name in listed if name not in set(self.index.values())} | set(self.weight_files(bits)))

    def bytes_for(self, bits: int) -> int:
        """Bytes of `files_for`. Raises MissingPlanesError if that width was not saved, or no MANIFEST tells the size of a missing file."""
        if self._planes_for(bits) > max(2, *self._needs.values()):
            self.check_widths(bits)
        total = 0
        for name in self.files_for(bits):
            path = locate(self.folder, name)
            if self.manifest and name in self.manifest.files:
                total += self.manifest.files[name].size
            elif path.exists():
                total += path.stat().st_size
            else:
                raise MissingPlanesError(f"{path} is not here and no {MANIFEST} tells its size; fetch it")
        return total

    def check_files(self, *bits: int) -> None:
        """Compare the weight files of these widths with their sha256 now, in parallel. Raises CheckpointError, MissingPlanesError."""
        self.check_widths(*bits)
        with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
            list(pool.map(self._check_file, sorted({file for width in bits for file in self.weight_files(width)})))


def nested_weight(value: Callable[[str], Tensor], layout: Layout, in_features: int, planes: int, refits: Iterable[int]) -> NestedWeight:
    """The weight whose stored tensors `value` gives by suffix: the inverse of `module_tensors`."""
    grid = layout.grid
    parts = [value("weight"), *(value(f"plane.{k}")[None] for k in range(2, planes))]
    return NestedWeight(
        codes=unpack_planes(torch.cat(parts), in_features, grid.bits),
        scale=value("scale"),
        zero=None if grid.symmetric else value("zero"),
        grid=grid,
        slicing=layout.slicing,
        refits={r: Refit(value(f"scale.{r}"), value(f"zero.{r}")) for r in refits},
        planes=planes,
    )


class BaseTensors(Mapping[str, Tensor]):
    """The unquantized tensors, fetched when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = dict.fromkeys(sorted(name for name, need in checkpoint._needs.items() if need == BASE))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
