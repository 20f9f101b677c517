"""Write a checkpoint: tensors into shards grouped by plane, then index, config.json, other files, MANIFEST.json last.

All of it into a temporary sibling folder, synced to disk, then one rename: a folder of the final name is always complete.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from matquant.checkpoint.files import CONFIG, INDEX, MANIFEST, MAX_BYTES, PICKLES, Manifest, replace_whole, safe_name, walk
from matquant.checkpoint.format import QUANT_METHOD, family, needs, parse_config, value_problem
from matquant.checkpoint.reading import Checkpoint
from matquant.errors import CheckpointError, InputError, ResourceError
from matquant.plan import Layout, Shape, Table
from matquant.recipe import Recipe
from matquant.weight import NestedWeight

WRITTEN_BY = ("matquant", "torch", "transformers", "safetensors")


def module_tensors(name: str, weight: NestedWeight) -> dict[str, Tensor]:
    """The tensors of one module, named and typed as stored.

    Raises CheckpointError for a value that no checkpoint may hold, such as a scale that became 0 or infinite in its dtype.
    """
    planes = weight.packed()
    parts = {"weight": planes[:2]} | {f"plane.{k}": planes[k] for k in range(2, len(planes))} | {"scale": weight.scale}
    if weight.zero is not None:
        parts["zero"] = weight.zero
    for r, refit in weight.refits.items():
        parts |= {f"scale.{r}": refit.scale, f"zero.{r}": refit.zero}
    layout = Layout(weight.grid, weight.slicing, (), (), str(weight.scale.dtype).removeprefix("torch."))
    for suffix, tensor in parts.items():
        if problem := value_problem(suffix, tensor, weight.codes.shape[1], layout):
            mend = "store scales as float32 (--scale-dtype float32)" if suffix == "scale" else "choose another method"
            raise CheckpointError(f"{name}.{suffix} in {str(tensor.dtype).removeprefix('torch.')} {problem}; {mend}")
    return {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in parts.items()}


def quantization_config(
    recipe: Recipe, modules: Mapping[str, Shape], not_converted: Sequence[str], bits: int | None = None, tables: Mapping[str, Table] | None = None
) -> dict[str, Any]:
    """What config.json says under "quantization_config". bits: the default read, None = the widest. docs/FORMAT.md lists the keys.

    The version is the lowest that says all of it, so that older readers read whatever they can.
    """
    layout = recipe.layout
    grids = {
        name: {"bits": table.bits, "group_size": table.layout.grid.group_size, "in": table.shape.in_features}
        for name, table in (tables or {}).items()
    }
    return {
        "quant_method": QUANT_METHOD,
        "format_version": 2 if grids else 1,
        **({"tables": grids} if grids else {}),
        "parent_bits": layout.grid.bits,
        "slicing": layout.slicing,
        "overlap": layout.grid.overlap,
        "group_size": layout.grid.group_size,
        "symmetric": layout.grid.symmetric,
        "scale_dtype": layout.scale_dtype,
        "widths": list(layout.widths),
        "refit_widths": list(layout.refit_widths),
        "bits": max(layout.widths) if bits is None else bits,
        "modules": {name: shape.in_features for name, shape in modules.items()},
        "modules_to_not_convert": list(not_converted),
        "recipe": recipe.to_dict(),
        "recipe_hash": recipe.hash,
        "versions": {name: metadata.version(name) for name in WRITTEN_BY},
    }


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    max_shard_bytes: int = 2 * 2**30,
) -> None:
    """Write a whole checkpoint folder.

    tensors: all tensors under their final names; may be lazy, since each is fetched once and at most one shard is held.
    config: the whole config.json. files: name -> content of everything else (README.md, tokenizer.json, plans/x.json).
    Equal arguments give equal bytes. Raises InputError (folder exists, bad file name), ResourceError (no space left: what
    was written is removed), CheckpointError (tensors and config do not fit together).
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; choose another output folder, or delete it (--overwrite)")
    _check_files(files)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left over from a run that was killed
        partial.mkdir()
        _fill(partial, tensors, config, files, max_shard_bytes)
        os.rename(partial, folder)
        _sync(folder.parent)
    except BaseException as error:  # noqa: BLE001 - cleans up after Ctrl-C too, and raises again
        shutil.rmtree(partial, ignore_errors=True)
        raise writing_error(error, folder, "choose another output folder") from None


def add_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put more files (a report, a model card) into a finished checkpoint and into its MANIFEST. Raises as `write`."""
    _check_files(files)
    try:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_whole(folder / name, data)
        manifest = Manifest.load(folder)
        known = {} if manifest is None else manifest.files
        fresh = Manifest.of(folder, [name for name in walk(folder) if name != MANIFEST and (name in files or name not in known)])
        replace_whole(folder / MANIFEST, Manifest(dict(sorted({**known, **fresh.files}.items()))).to_bytes())
    except OSError as error:
        raise writing_error(error, folder, "choose another output folder") from None


def writing_error(error: BaseException, place: Path, advice: str) -> BaseException:
    """What to raise for `error` met while writing to `place`: a named error if the system refused, else `error` itself."""
    code = _errno(error)
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"no space left to write {place} ({os.strerror(code)}); free some, or {advice}")
    return error if code is None else InputError(f"cannot write {place}: {error}; {advice}")


def _fill(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], files: Mapping[str, bytes], limit: int) -> None:
    spec = parse_config(config, CONFIG)
    need = needs(tensors, spec)
    weight_map: dict[str, str] = {}
    total = 0
    for label in sorted({family(n) for n in need.values()}):
        names = sorted(name for name, n in need.items() if family(n) == label)
        sizes, shards = _write_family(folder, label, names, tensors, limit)
        weight_map |= shards
        total += sizes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    content = {**files, CONFIG: _dump(config, CONFIG), INDEX: _dump(index, INDEX)}
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    Checkpoint.open(folder, checksums=False)  # what does not open must not get the final name
    names = walk(folder)
    for name in names:
        _sync(folder / name)
    (folder / MANIFEST).write_bytes(Manifest.of(folder, names).to_bytes())
    _sync(folder / MANIFEST)
    for parent in sorted({(folder / name).parent for name in names}):
        _sync(parent)


def _write_family(folder: Path, label: str, names: Sequence[str], tensors: Mapping[str, Tensor], limit: int) -> tuple[int, dict[str, str]]:
    """Write one shard family. Returns (bytes of its tensors, tensor -> file)."""
    shards: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(names, tensors, limit), 1):
        path = folder / f"{label}-{number}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files for their owner alone
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    found: dict[str, str] = {}
    for number, shard_names in enumerate(shards, 1):
        file = f"model-{label}-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{label}-{number}.safetensors").rename(folder / file)
        found |= dict.fromkeys(shard_names, file)
    return total, found


def _shards(names: Sequence[str], tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held, taken = 0, set[int]()
    for name in names:
        tensor = tensors[name].detach().cpu()
        if shard and held + tensor.nbytes > limit:
            yield shard
            shard, held, taken = {}, 0, set()
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # safetensors refuses tensors that share storage
        shard[name] = tensor
        taken.add(tensor.data_ptr())
        held += tensor.nbytes
    if shard:
        yield shard


def _check_files(files: Mapping[str, bytes]) -> None:
    for name in files:
        if not safe_name(name) or name in (CONFIG, INDEX, MANIFEST) or name.endswith((".safetensors", *PICKLES)):
            raise InputError(
                f"cannot put the file {name!r} into a checkpoint; allowed: relative names of letters, digits and _ . + - that are not its own"
            )


def _dump(data: Mapping[str, Any], name: str) -> bytes:
    try:
        content = (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}") from None
    if len(content) > MAX_BYTES[name]:
        raise InputError(f"{name} would have {len(content)} bytes; readers accept {MAX_BYTES[name]}")
    return content


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error: BaseException) -> int | None:
    """The system's error number; safetensors gives it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None
