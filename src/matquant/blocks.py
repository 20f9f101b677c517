"""Quantize a model block by block; every finished block is one safetensors file, so that a killed run loses at most one block.

Calibration activations pass through blocks that are quantized already, read at the widest target: the classic method sees its
own drift, the nested one that of its best width. A resumed run takes finished blocks from their files and only sends the
activations through them again; these are the same to the bit on the same number of threads, so the blocks that follow are too.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from matquant import calibration, methods, models
from matquant.checkpoint import module_tensors, nested_weight, writing_error
from matquant.errors import InputError
from matquant.plan import Shape
from matquant.recipe import Recipe
from matquant.refit import refit
from matquant.report import LayerReport
from matquant.weight import NestedWeight, Refit


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
    """One pass over the blocks of `source`. folder: where the block files go. calibrated: whether anything looks at activations."""

    source: models.Source
    layers: models.Layers
    recipe: Recipe
    folder: Path
    device: torch.device
    dtype: torch.dtype
    follow: Progress

    @property
    def calibrated(self) -> bool:
        """Whether any setting looks at activations. Plain rounding to nearest does not."""
        return self.recipe.method != "minmax" or self.recipe.clip_search or bool(self.recipe.layout.refit_widths)

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

    def quantize(self, train: Tensor) -> None:
        """Make the file of every block that has no sound one. train: Int[Tensor, "samples length"], tokens to calibrate on."""
        prefix, blocks = models.find_blocks(self.source.model)
        files = self.files
        todo = [index for index, file in enumerate(files) if not self._finished(index, file)]
        if not todo:
            return
        models.materialize(self.source, blocks[0], f"{prefix}.0", self.device, self.dtype)
        calls: list[calibration.Call] = []
        hidden: list[Tensor] = []
        if self.calibrated:
            models.materialize_around(self.source, prefix, self.device, self.dtype)
            calls, hidden = calibration.record(self.source.model, blocks, train, self.device)
        for index, block in enumerate(blocks[: todo[-1] + 1]):
            self.follow("quantizing", index, len(blocks))
            name = f"{prefix}.{index}"
            if index:
                models.materialize(self.source, block, name, self.device, self.dtype)
            if index in todo:
                results = self._quantize_block(index, block, name, calls[index] if calls else None, hidden)
                tensors = {key: value.cpu() for layer, (weight, _) in results.items() for key, value in module_tensors(layer, weight).items()}
                save_whole(files[index], tensors, {"layers": json.dumps([_layer_to_json(report) for _, report in results.values()])})
            if self.calibrated and index < todo[-1]:
                self._read_back(files[index], index)
                calibration.propagate(block, calls[index], hidden)
            models.release(block)
        self.follow("quantizing", len(blocks), len(blocks))

    def _finished(self, index: int, file: Path) -> bool:
        """Whether the block's file is there and whole; a damaged one is told, and made again."""
        if file.exists() and not is_whole(file):
            self.follow.line(f"block {index} is made again: {file} is damaged")
            return False
        return file.exists()

    def _read_back(self, file: Path, index: int) -> None:
        """Put the block's quantized weights, read at the widest target, where the original ones were."""
        stored, width = models.SafetensorsFiles([file]), max(self.recipe.targets)
        for name in self.layers.of_block(index):
            module = self.source.model.get_submodule(name)
            models.set_weight(module, self._stored(stored, name).read(width).dense().to(self.device))

    def _quantize_block(
        self, index: int, block: nn.Module, prefix: str, call: calibration.Call | None, hidden: list[Tensor]
    ) -> dict[str, tuple[NestedWeight, LayerReport]]:
        names = self.layers.of_block(index)
        moments: dict[str, calibration.Moments] = {}
        leaders: dict[str, str] = {}
        if call is not None and names:
            moments, leaders = calibration.input_moments(block, call, hidden, names, prefix)
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(leaders.get(name, name), []).append(name)
        results: dict[str, tuple[NestedWeight, LayerReport]] = {}
        for leader, members in groups.items():
            weights = {name: models.get_weight(self.source.model.get_submodule(name)) for name in members}
            h = moments[leader].h if leader in moments else torch.eye(self.layers.quantized[leader].in_features, device=self.device)
            notes = () if leader in moments or not self.calibrated else ("no token reached it: its inputs count as equally strong",)
            for name, (weight, report) in quantize_group(weights, h, self.recipe).items():
                results[name] = weight, replace(report, notes=notes + report.notes)
                self._tell(results[name][1])
        return {name: results[name] for name in names}

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
    errors = {str(bits): error for bits, error in report.errors.items()}
    return {"name": report.name, "shape": [report.shape.out, report.shape.in_features], "errors": errors, "notes": list(report.notes)}


def _layer_from_json(row: Mapping[str, Any]) -> LayerReport:
    errors = {int(bits): error for bits, error in row["errors"].items()}
    return LayerReport(row["name"], Shape(*row["shape"]), errors, tuple(row["notes"]))


# --- one group of layers --------------------------------------------------------------------------------------------


def quantize_group(weights: Mapping[str, Tensor], h: Tensor, recipe: Recipe) -> dict[str, tuple[NestedWeight, LayerReport]]:
    """Quantize layers that share their input, stacked by rows: rows do not interact, and one pass over columns serves all.

    weights: name -> float32 [out, in]. h: float32 [in, in], second moments of the shared input.
    """
    w = torch.cat(list(weights.values()))
    chosen = methods.load(recipe.method)(w, h, recipe)
    finite = bool(h.isfinite().all())
    notes = chosen.notes if finite or chosen.notes else ("the Hessian is not finite: its inputs count as equally strong",)
    usable = h if finite else torch.eye(len(h), device=h.device)
    nested = refit(chosen.weight, w, usable, recipe.layout.refit_widths)
    loss = {bits: _row_losses(w, nested.read(bits).dense(), usable) for bits in recipe.bits}
    power = _row_losses(w, torch.zeros_like(w), usable)
    results: dict[str, tuple[NestedWeight, LayerReport]] = {}
    start = 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        start += len(weight)
        total = power[rows].sum().item()
        errors = {bits: loss[bits][rows].sum().item() / total if total > 0 else None for bits in recipe.bits}
        results[name] = _rows(nested, rows), LayerReport(name, Shape(*weight.shape), errors, notes)
    return results


def _row_losses(w: Tensor, read: Tensor, h: Tensor) -> Tensor:
    """Of each row e of w - read: e H e^T."""
    error = w - read
    return ((error @ h) * error).sum(1).double()


def _rows(weight: NestedWeight, rows: slice) -> NestedWeight:
    refits = {bits: Refit(fit.scale[rows], fit.zero[rows]) for bits, fit in weight.refits.items()}
    zero = None if weight.zero is None else weight.zero[rows]
    return replace(weight, codes=weight.codes[rows], scale=weight.scale[rows], zero=zero, refits=refits)
