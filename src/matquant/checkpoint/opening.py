"""What opening a folder checks by JSON and headers alone: files, names, planes, shapes. Everything raises CheckpointError."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from matquant.checkpoint.files import INDEX, MAX_BYTES, PICKLES, SINGLE, Manifest, locate, parse_json, present, read_bytes, safe_name
from matquant.checkpoint.format import Spec, expected, missing_of, owner_of
from matquant.errors import CheckpointError
from matquant.plan import Shape

MAX_TENSORS = 200_000


def read_json(folder: Path, name: str, manifest: Manifest | None) -> dict[str, Any]:
    content = read_bytes(folder, name, MAX_BYTES[name])
    if manifest is not None:
        manifest.check_bytes(folder, name, content)
    return parse_json(content, str(folder / name))


def check_recipe(section: Mapping[str, Any], source: str) -> None:
    """The recipe is provenance: nothing is read by it, but it must be the one whose hash stands beside it."""
    if "recipe" not in section and "recipe_hash" not in section:
        return
    try:
        digest = hashlib.sha256(json.dumps(section.get("recipe"), sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise CheckpointError(f"{source}: the recipe is nested too deeply") from None
    if not isinstance(section.get("recipe"), dict) or section.get("recipe_hash") != digest:
        raise CheckpointError(f"{source}: recipe_hash is not the hash of recipe ({digest}); one of them was edited")


def open_files(folder: Path, manifest: Manifest | None) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor -> file of the whole checkpoint, file -> open handle of those here), names in headers compared with the index."""
    stray = {path.name for path in folder.glob("*.safetensors")}
    if present(folder, INDEX):
        if present(folder, SINGLE):
            raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}; loaders disagree on which counts, so delete the one that is not meant")
        index = _weight_map(read_json(folder, INDEX, manifest), str(folder / INDEX))
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


def planes_here(spec: Spec, index: Mapping[str, str], need: Mapping[str, int], missing: tuple[str, ...]) -> int:
    """Leading planes of every module that are here. Raises CheckpointError if planes 0-1, or tensors of one module only, are missing."""
    declared = max(2, *need.values())
    if lost := missing_of(need, spec, declared):
        raise CheckpointError(f"tensor {lost[0]!r} is missing ({len(lost)} missing in all); every module must have the same planes and refits")
    here = {name: n for name, n in need.items() if index[name] not in missing}
    if gone := [name for name, n in need.items() if n <= 2 and name not in here]:
        raise CheckpointError(f"{index[gone[0]]} is missing, which holds {gone[0]!r}; no width can be read without it, fetch it")
    planes = 2
    while planes < declared and not missing_of(here, spec, planes + 1):
        planes += 1
    return planes


def shapes_of(spec: Spec, index: Mapping[str, str], need: Mapping[str, int], handles: Mapping[str, Any]) -> dict[str, Shape]:
    """The shape of every module and table, each header entry held against config.json. Raises CheckpointError."""
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
            wanted = expected(tensor[len(name) + 1 :], shape, spec.tables.get(name, spec.layout))
            actual = (entry.get_dtype(), list(entry.get_shape()))
            if actual != wanted or shape.out < 1:
                raise CheckpointError(
                    f"{index[tensor]}: {tensor} is {actual[0]} {actual[1]}; {shape.in_features} input channels ask for {wanted[0]} {wanted[1]}"
                )
        modules[name] = shape
    return modules
