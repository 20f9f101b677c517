"""Checkpoint: open a folder by its headers, then read tensors on demand.

`open` checks everything that names, shapes and dtypes can tell and reads no tensor. A weight file is compared with its
sha256 in MANIFEST.json before the first tensor of it is handed out, because a flipped bit in a plane is invisible
otherwise; that costs one pass over bytes that are about to be read anyway (1.7 GB/s on one core with SHA instructions).
Files of planes that a width does not need are never read, hashed or not.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matquant.checkpoint.files import (
    CONFIG,
    INDEX,
    MANIFEST,
    MAX_BYTES,
    PICKLES,
    SINGLE,
    Manifest,
    locate,
    parse_json,
    present,
    read_bytes,
    safe_name,
    walk,
)
from matquant.checkpoint.format import STORED, Spec, expected, missing_of, needs, owner_of, parse_config, value_problem
from matquant.codes import planes_needed
from matquant.errors import CheckpointError, InputError, MatquantError, MissingPlanesError, PlanError, choices
from matquant.packing import unpack_planes
from matquant.plan import Layout, Shape
from matquant.recipe import Recipe
from matquant.weight import NestedWeight, Refit

MAX_TENSORS = 200_000


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. planes: how many leading planes of every module are here. missing: weight files that are not.

    index: tensor -> file, of the whole checkpoint. manifest: None if there is none, or under checksums=False.
    """

    folder: Path
    config: Mapping[str, Any]
    layout: Layout
    modules: Mapping[str, Shape]
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
        config = _json(folder, CONFIG, manifest)
        spec = parse_config(config, str(folder / CONFIG))
        _check_recipe(config["quantization_config"], str(folder / CONFIG))
        index, handles = _open_files(folder, manifest)
        need = needs(index, spec.layout, spec.inputs)
        missing = tuple(sorted(set(index.values()) - set(handles)))
        planes = _planes_here(spec, index, need, missing)
        modules = _shapes(spec, index, need, handles)
        return Checkpoint(folder, config, spec.layout, modules, planes, spec.bits, spec.not_converted, index, missing, manifest, need, handles, set())

    # --- what is offered ------------------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        """The offered widths that the planes here allow, descending."""
        return tuple(bits for bits in self.layout.widths if self._planes_for(bits) <= self.planes)

    @property
    def recipe(self) -> Recipe:
        """How it was made. Raises CheckpointError if config.json has no recipe, or one of another matquant."""
        try:
            return Recipe.from_dict(self.config["quantization_config"]["recipe"])
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
        return nested_weight(lambda suffix: self._value(name, suffix), self.layout, self.modules[name].in_features, planes, refits)

    @property
    def base(self) -> "BaseTensors":
        """Lazy: the tensors that are not quantized."""
        return BaseTensors(self)

    @property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are not quantized, from the headers."""
        return {name: tuple(self._handles[self.index[name]].get_slice(name).get_shape()) for name in self.base}

    @property
    def base_bytes(self) -> int:
        """Of the tensors that are not quantized, from the headers."""
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
        return value_problem(suffix, self.tensor(f"{name}.{suffix}"), self.modules[name].in_features, self.layout)

    def _value(self, name: str, suffix: str) -> Tensor:
        tensor = self.rows(f"{name}.{suffix}")
        if problem := value_problem(suffix, tensor, self.modules[name].in_features, self.layout):
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
        self._names = dict.fromkeys(sorted(name for name, need in checkpoint._needs.items() if need == 0))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --- opening --------------------------------------------------------------------------------------------------------


def _json(folder: Path, name: str, manifest: Manifest | None) -> dict[str, Any]:
    content = read_bytes(folder, name, MAX_BYTES[name])
    if manifest is not None:
        manifest.check_bytes(folder, name, content)
    return parse_json(content, str(folder / name))


def _check_recipe(section: Mapping[str, Any], source: str) -> None:
    """The recipe is provenance: nothing is read by it, but it must be the one whose hash stands beside it."""
    if "recipe" not in section and "recipe_hash" not in section:
        return
    try:
        digest = hashlib.sha256(json.dumps(section.get("recipe"), sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise CheckpointError(f"{source}: the recipe is nested too deeply") from None
    if not isinstance(section.get("recipe"), dict) or section.get("recipe_hash") != digest:
        raise CheckpointError(f"{source}: recipe_hash is not the hash of recipe ({digest}); one of them was edited")


def _open_files(folder: Path, manifest: Manifest | None) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor -> file of the whole checkpoint, file -> open handle of those here), names in headers compared with the index."""
    stray = {path.name for path in folder.glob("*.safetensors")}
    if present(folder, INDEX):
        if present(folder, SINGLE):
            raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}; loaders disagree on which counts, so delete the one that is not meant")
        index = _weight_map(_json(folder, INDEX, manifest), str(folder / INDEX))
    elif present(folder, SINGLE):
        index = dict.fromkeys(_open_file(folder, SINGLE, manifest).keys(), SINGLE)
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        why = f"{', '.join(pickles)} may be pickle files, which are never opened" if pickles else "nothing to read"
        raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE} ({why}); weights must be safetensors files")
    files = sorted(set(index.values()))
    if extra := sorted(stray - set(files)):
        raise CheckpointError(f"{folder} holds {', '.join(extra)}, which {INDEX} does not list; delete what does not belong")
    handles = {file: _open_file(folder, file, manifest) for file in files if present(folder, file)}
    for file, handle in handles.items():
        _check_names(folder / file, handle.keys(), index)
    found = {name for handle in handles.values() for name in handle.keys()}  # noqa: SIM118  (a handle is no mapping)
    if lost := sorted(name for name, file in index.items() if file in handles and name not in found):
        raise CheckpointError(f"{folder}: tensor {lost[0]!r} is missing from {index[lost[0]]} ({len(lost)} missing in all); fetch the folder again")
    return index, handles


def _weight_map(data: Mapping[str, Any], source: str) -> dict[str, str]:
    found = data.get("weight_map")
    if not isinstance(found, dict) or not found or len(found) > MAX_TENSORS:
        raise CheckpointError(f"{source} must have a weight_map of 1 to {MAX_TENSORS} tensors")
    for name, file in found.items():
        if not safe_name(file, depth=1) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{source} puts {name!r} into {file!r}; allowed: names of .safetensors files in the same folder")
    return found


def _open_file(folder: Path, file: str, manifest: Manifest | None) -> Any:
    path = locate(folder, file)
    entry = manifest.files.get(file) if manifest else None
    if manifest and (entry is None or entry.size != path.stat().st_size):
        raise CheckpointError(manifest.problem(folder, file) or f"{path} changed while it was opened")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        with path.open("rb") as content:
            start = content.read(4)
        kind = "a pickle file, which is never opened" if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05") else "damaged or half-fetched"
        raise CheckpointError(f"{path} is not a safetensors file ({error}): it is {kind}; fetch it again") from None


def _check_names(path: Path, names: Iterable[str], index: Mapping[str, str]) -> None:
    for name in names:
        if name not in index:
            raise CheckpointError(f"{path} holds tensor {name!r}, which {INDEX} does not list")
        if index[name] != path.name:
            raise CheckpointError(f"tensor {name!r} stands in {path}, but {INDEX} puts it into {index[name]}: a duplicate or a misplaced tensor")


def _planes_here(spec: Spec, index: Mapping[str, str], need: Mapping[str, int], missing: tuple[str, ...]) -> int:
    """Leading planes of every module that are here. Raises CheckpointError if planes 0-1, or tensors of one module only, are missing."""
    declared = max(2, *need.values())
    if lost := missing_of(need, spec.layout, spec.inputs, declared):
        raise CheckpointError(f"tensor {lost[0]!r} is missing ({len(lost)} missing in all); every module must have the same planes and refits")
    here = {name: n for name, n in need.items() if index[name] not in missing}
    if gone := [name for name, n in need.items() if n <= 2 and name not in here]:
        raise CheckpointError(f"{index[gone[0]]} is missing, which holds {gone[0]!r}; no width can be read without it, fetch it")
    planes = 2
    while planes < declared and not missing_of(here, spec.layout, spec.inputs, planes + 1):
        planes += 1
    return planes


def _shapes(spec: Spec, index: Mapping[str, str], need: Mapping[str, int], handles: Mapping[str, Any]) -> dict[str, Shape]:
    """The shape of every module, each header entry held against config.json. Raises CheckpointError."""
    by_module: dict[str, list[str]] = {name: [] for name in spec.inputs}
    for tensor, n in need.items():
        if n and index[tensor] in handles:
            by_module[str(owner_of(tensor, by_module))].append(tensor)
    modules: dict[str, Shape] = {}
    for name, tensors in by_module.items():
        tensors.sort(key=lambda tensor: not tensor.endswith(".weight"))  # it tells out, so its own fault is named first
        header = {tensor: handles[index[tensor]].get_slice(tensor) for tensor in tensors}
        found = header[f"{name}.weight"].get_shape()
        shape = Shape(found[1] if len(found) == 3 else 0, spec.inputs[name])
        for tensor, entry in header.items():
            wanted = expected(tensor[len(name) + 1 :], shape, spec.layout)
            actual = (entry.get_dtype(), list(entry.get_shape()))
            if actual != wanted or shape.out < 1:
                raise CheckpointError(
                    f"{index[tensor]}: {tensor} is {actual[0]} {actual[1]}; {shape.in_features} input channels ask for {wanted[0]} {wanted[1]}"
                )
        modules[name] = shape
    return modules
