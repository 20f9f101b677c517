"""verify: every byte and every value of a checkpoint. describe: what is in it, by headers alone."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matquant.checkpoint.files import MANIFEST, MAX_PLAN_BYTES, PICKLES, Manifest, locate, walk
from matquant.checkpoint.format import family, suffixes
from matquant.checkpoint.reading import Checkpoint
from matquant.errors import CheckpointError, InputError, MatquantError, MissingPlanesError
from matquant.plan import BitPlan, Layout, Shape, Table
from matquant.recipe import Recipe

T = TypeVar("T")


def verify(folder: Path | str) -> list[str]:
    """What is wrong with a checkpoint; empty if it is sound. Reads every byte of it.

    Files of whole planes may be missing, from the last plane downwards: a folder of the first k planes is sound.
    Raises InputError if there is no such folder; a damaged checkpoint raises nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a checkpoint")
    problems: list[str] = []
    checkpoint = _attempt(problems, lambda: Checkpoint.open(folder, checksums=False))
    manifest = _attempt(problems, lambda: Manifest.load(folder))
    names = walk(folder)
    if manifest is not None:
        problems += _manifest_problems(folder, manifest, names, set(checkpoint.missing) if checkpoint else set())
    elif MANIFEST not in names:
        problems.append(f"{folder} has no {MANIFEST}, so damaged bytes cannot be found; it was not written by matquant quantize, or is incomplete")
    problems += [f"{folder / name} may be a pickle file; a checkpoint holds none, delete it" for name in names if name.endswith(PICKLES)]
    if checkpoint is not None:
        problems += _plane_problems(checkpoint) + _value_problems(checkpoint) + _plan_problems(checkpoint)
    return list(dict.fromkeys(problems))


def _attempt(problems: list[str], action: Callable[[], T]) -> T | None:
    try:
        return action()
    except (MatquantError, OSError) as error:
        problems.append(str(error))
        return None


def _manifest_problems(folder: Path, manifest: Manifest, names: list[str], may_miss: set[str]) -> list[str]:
    """Missing, extra, resized and changed files."""
    problems: list[str] = []
    for name in sorted({*manifest.files, *names} - may_miss - {MANIFEST}):
        try:
            problem = manifest.problem(folder, name)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems += [problem] if problem else []
    return problems


def _plane_problems(checkpoint: Checkpoint) -> list[str]:
    """Weight files of planes that cannot be used, because files of an earlier or the same plane are missing."""
    need = suffixes(checkpoint.layout)
    beyond = {
        checkpoint.index[f"{name}.{suffix}"]: family(n) for name in checkpoint.modules for suffix, n in need.items()
        if n > checkpoint.planes and f"{name}.{suffix}" in checkpoint.index
    }  # fmt: skip
    gone = ", ".join(checkpoint.missing)
    return [f"{checkpoint.folder / file} ({beyond[file]}) is of no use without {gone}" for file in sorted(beyond) if file not in checkpoint.missing]


def _value_problems(checkpoint: Checkpoint) -> list[str]:
    problems: list[str] = []
    layouts = dict.fromkeys(checkpoint.modules, checkpoint.layout) | {name: table.layout for name, table in checkpoint.tables.items()}
    for name, layout in layouts.items():
        for suffix in suffixes(layout):
            tensor = f"{name}.{suffix}"
            if tensor not in checkpoint.index or checkpoint.index[tensor] in checkpoint.missing:
                continue
            try:
                problem = checkpoint.problem(name, suffix)
            except CheckpointError as error:
                problem = str(error)
            problems += [f"{checkpoint.folder / checkpoint.index[tensor]}: {tensor} {problem}"] if problem else []
    return problems


def _plan_problems(checkpoint: Checkpoint) -> list[str]:
    problems: list[str] = []
    for name in checkpoint.plans:
        try:
            path = locate(checkpoint.folder, name)
            if path.stat().st_size > MAX_PLAN_BYTES:
                raise CheckpointError(f"{path} is longer than {MAX_PLAN_BYTES} bytes, the most that a plan may have")
            BitPlan.load(path).check(checkpoint.modules, checkpoint.layout.widths)
        except (MatquantError, OSError) as error:
            problems.append(f"{name}: {error}")
    return problems


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    planes: leading planes here. widths: readable with them. missing: weight files not here. bits: the default read.
    file_bytes: width -> bytes that a reader of it must fetch; without widths whose files are neither here nor in
    MANIFEST.json. parameters: of the model, unquantized ones included; quantized: those in quantized modules, tables not counted.
    recipe: None if config.json has none that this matquant understands.
    """

    folder: Path
    layout: Layout
    modules: Mapping[str, Shape]
    tables: Mapping[str, Table]
    not_converted: tuple[str, ...]
    bits: int
    planes: int
    widths: tuple[int, ...]
    missing: tuple[str, ...]
    file_bytes: Mapping[int, int]
    parameters: int
    quantized: int
    plans: tuple[str, ...]
    recipe: Recipe | None
    versions: Mapping[str, str]

    def bits_per_weight(self, bits: int) -> float:
        """Of the quantized part at one width, metadata included."""
        return sum(self.layout.read_bits(shape, bits) for shape in self.modules.values()) / self.quantized


def describe(folder: Path | str) -> Description:
    """Headers only. Raises as Checkpoint.open does."""
    checkpoint = Checkpoint.open(folder)
    try:
        recipe = checkpoint.recipe
    except CheckpointError:
        recipe = None
    quantized = sum(shape.weights for shape in checkpoint.modules.values())
    versions = checkpoint.config["quantization_config"].get("versions")
    return Description(
        folder=checkpoint.folder,
        layout=checkpoint.layout,
        modules=checkpoint.modules,
        tables=checkpoint.tables,
        not_converted=checkpoint.not_converted,
        bits=checkpoint.bits,
        planes=checkpoint.planes,
        widths=checkpoint.widths,
        missing=checkpoint.missing,
        file_bytes=_file_bytes(checkpoint),
        parameters=quantized + checkpoint.other_weights,
        quantized=quantized,
        plans=checkpoint.plans,
        recipe=recipe,
        versions={str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else {},
    )


def _file_bytes(checkpoint: Checkpoint) -> dict[int, int]:
    found: dict[int, int] = {}
    for bits in checkpoint.layout.widths:
        with suppress(MissingPlanesError):
            found[bits] = checkpoint.bytes_for(bits)
    return found
