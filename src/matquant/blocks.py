"""Quantize a model block by block; every finished block is one safetensors file, so that a killed run loses at most one block.

Within a block, layers are quantized in the order in which they are called (q, k, v; o; gate, up; down), each on inputs that have
passed the quantized layers before it, one stream of activations for each width that has its own. A resumed run takes finished
blocks from their files and only sends the streams through them again; these are the same to the bit on the same number of
threads, so the blocks that follow are too.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from matquant import activations, models
from matquant.checkpoint import module_tensors, nested_weight, writing_error
from matquant.errors import InputError
from matquant.groups import BlockState, Results
from matquant.plan import Shape
from matquant.recipe import ORIGINAL, Recipe
from matquant.report import LayerReport
from matquant.weight import NestedWeight
from matquant.world import ALONE, World


@runtime_checkable  # shape checkers ask isinstance
class Progress(Protocol):
    """What a caller may pass to follow a run."""

    def __call__(self, stage: str, done: int, of: int) -> None: ...

    def line(self, text: str) -> None: ...


class Silent:
    """Progress that nobody follows."""

    def __call__(self, stage: str, done: int, of: int) -> None: ...

    def line(self, text: str) -> None: ...


@dataclass(frozen=True)
class BlockRun:
    """One pass over the blocks of `source`. folder: where the block files go. streams_on_disk: keep activations there too, mapped.

    Of several processes, each sends its share of the sequences through the blocks, and the first writes.
    """

    source: models.Source
    layers: models.Layers
    recipe: Recipe
    folder: Path
    device: torch.device
    dtype: torch.dtype
    follow: Progress
    streams_on_disk: bool = False
    world: World = ALONE

    @property
    def calibrated(self) -> bool:
        """Whether any setting looks at activations. Plain rounding to nearest does not."""
        return self.recipe.method not in ("minmax", "qat") or self.recipe.clip_search or bool(self.recipe.layout.refit_widths)

    @property
    def files(self) -> list[Path]:
        """Of every block, finished or not."""
        return [self.folder / f"{index:05d}.safetensors" for index in range(self.layers.count)]

    def weight(self, name: str) -> NestedWeight:
        """A finished layer, from its block's file."""
        index = int(name.removeprefix(self.layers.blocks + ".").partition(".")[0])
        return self._stored(models.SafetensorsFiles([self.files[index]]), name)

    def _stored(self, stored: Mapping[str, Tensor], name: str) -> NestedWeight:
        layout = self.recipe.layout
        value = lambda suffix: stored[f"{name}.{suffix}"]  # noqa: E731
        return nested_weight(value, layout, self.layers.quantized[name].in_features, layout.grid.bits, layout.refit_widths)

    def reports(self) -> tuple[LayerReport, ...]:
        """Of every layer, from the block files."""
        stored = models.SafetensorsFiles(self.files)
        return tuple(_layer_from_json(row) for file in self.files for row in json.loads(stored.metadata(file)["layers"]))

    def outputs(self) -> tuple[Mapping[int, float], ...]:
        """Relative output error of every block, by the width of its stream, from the block files."""
        stored = models.SafetensorsFiles(self.files)
        return tuple({int(bits): error for bits, error in json.loads(stored.metadata(file)["output"]).items()} for file in self.files)

    def quantize(self, train: Tensor) -> None:
        """Make the file of every block that has no sound one. train: Int[Tensor, "samples length"], tokens to calibrate on."""
        prefix, blocks = models.find_blocks(self.source.model)
        files = self.files
        todo = self.world.same([index for index, file in enumerate(files) if not self._finished(index, file)])
        if not todo:
            return
        models.materialize(self.source, blocks[0], f"{prefix}.0", self.device, self.dtype)
        calls: list[activations.Call] = []
        streams: dict[int, Tensor] = {}
        if self.calibrated:
            models.materialize_around(self.source, prefix, self.device, self.dtype)
            calls, hidden = activations.record(self.source.model, blocks, train[self.world.rank :: self.world.size], self.device)
            first = self.world.count(max(self.recipe.passed(len(train)), self.world.size))
            passed = dict.fromkeys(self.recipe.stream_widths, hidden[:first])
            streams = {width: activations.like(own, self._stream_file(width)) for width, own in {ORIGINAL: hidden, **passed}.items()}
        for index, block in enumerate(blocks[: todo[-1] + 1]):
            self.follow("quantizing", index, len(blocks))
            name = f"{prefix}.{index}"
            if index:
                models.materialize(self.source, block, name, self.device, self.dtype)
            call = calls[index] if calls else None
            copy = self._stream_file("original-inputs")
            run = BlockState(block, name, self.layers.of_block(index), call, streams, self.recipe, copy, self.world)
            if index in todo:
                results = run.quantize(self._tell)
                run.others = {key: value.to(self.source.tensors[f"{name}.{key}"].dtype).to(value.dtype) for key, value in run.others.items()}
                output = run.advance()
                self.save(index, results, output, {f"{name}.{key}": value for key, value in run.others.items()})
            elif self.calibrated:
                stored = models.SafetensorsFiles([files[index]])
                for layer in run.names:
                    run.put(layer, self._stored(stored, layer))
                of_layers = tuple(f"{layer}." for layer in run.names)
                run.others = {key.removeprefix(name + "."): stored[key] for key in stored if not key.startswith(of_layers) or key.endswith(".bias")}
                run.advance()
            models.release(block)
        self.world.wait()  # until the last file is there
        self.follow("quantizing", len(blocks), len(blocks))

    def save(self, index: int, results: Results, output: Mapping[int, float], others: Mapping[str, Tensor] | None = None) -> None:
        """Write a block's file. others: parameters, by their names in the model, that take the place of the source's. Raises as `save_whole`."""
        if not self.world.first:
            return
        tensors = {key: value.to(self.source.tensors[key].dtype).cpu() for key, value in (others or {}).items()}
        tensors |= {key: value.cpu() for layer, (weight, _) in results.items() for key, value in module_tensors(layer, weight).items()}
        rows = [_layer_to_json(report) for _, report in results.values()]
        save_whole(self.files[index], tensors, {"layers": json.dumps(rows), "output": json.dumps({str(r): e for r, e in output.items()})})

    def _stream_file(self, width: int | str) -> Path | None:
        """Where a stream lies if it is kept on disk; whatever was there before belongs to a killed run."""
        if not self.streams_on_disk:
            return None
        file = self.folder / f"stream-{width}{f'-{self.world.rank}' if self.world.rank else ''}.bin"
        file.unlink(missing_ok=True)
        return file

    def _finished(self, index: int, file: Path) -> bool:
        """Whether the block's file is there and whole; a damaged one is told, and made again."""
        if file.exists() and not is_whole(file):
            self.follow.line(f"block {index} is made again: {file} is damaged")
            return False
        return file.exists()

    def _tell(self, report: LayerReport) -> None:
        errors = "  ".join(f"{bits}: {error:.1e}" if error is not None else f"{bits}: -" for bits, error in report.errors.items())
        self.follow.line(f"{report.name}  {errors}")
        for note in report.notes:
            self.follow.line(f"note: {report.name}: {note}")


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A whole safetensors file or none, with a checksum for `is_whole`. Raises ResourceError or InputError."""
    partial = path.with_name(path.name + ".tmp")
    try:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, partial, metadata={**metadata, "sha256": _digest(tensors, metadata)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise writing_error(error, path, "continue with --resume afterwards") from None


def is_whole(path: Path) -> bool:
    """Whether `path` is, to the bit, what `save_whole` wrote."""
    try:
        stored = models.SafetensorsFiles([path])
        metadata = stored.metadata(path)
        return metadata.pop("sha256", "") == _digest(stored, metadata)
    except (InputError, SafetensorError, OSError):
        return False


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _layer_to_json(report: LayerReport) -> dict[str, Any]:
    keyed = lambda errors: {str(bits): error for bits, error in errors.items()}  # noqa: E731
    stages = {name: keyed(errors) for name, errors in report.stages.items()}
    return {
        "name": report.name,
        "shape": [report.shape.out, report.shape.in_features],
        "errors": keyed(report.errors),
        "notes": list(report.notes),
        "stages": stages,
    }


def _layer_from_json(row: Mapping[str, Any]) -> LayerReport:
    keyed = lambda errors: {int(bits): error for bits, error in errors.items()}  # noqa: E731
    stages = {name: keyed(errors) for name, errors in row["stages"].items()}
    return LayerReport(row["name"], Shape(*row["shape"]), keyed(row["errors"]), tuple(row["notes"]), stages)
