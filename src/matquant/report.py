"""Report: what one quantization run found, layer by layer and width by width. Written as report.json beside the weights.

Equal runs give equal bytes: a report holds no date, duration, memory, host or absolute path. The tables here are plain strings,
so that the terminal, the model card and a web page show the same digits.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from matquant.errors import CheckpointError, MatquantError
from matquant.evaluate import Protocol, Row
from matquant.plan import Shape
from matquant.recipe import Recipe

VERSION = 3


@dataclass(frozen=True)
class LayerReport:
    """errors: width -> ||X (W_r - W)^T||^2 / ||X W^T||^2 on the calibration text, None where that has no value (0 / 0).

    stages: the same after each stage of the method (gptq, refit, sweeps), for the targets; empty if it has no stages.
    """

    name: str
    shape: Shape
    errors: Mapping[int, float | None]
    notes: tuple[str, ...] = ()
    stages: Mapping[str, Mapping[int, float | None]] = field(default_factory=dict[str, Mapping[int, float | None]])


@dataclass(frozen=True)
class Report:
    """model: as it was asked for. base_model: its id on the hub, None for a local folder. rows: empty if quality was not measured.

    protocol: how it was, else None. skipped: (layer, why it was left as it is). outputs: of every block, the relative error
    ||y_r - y||^2 / ||y||^2 of its output on the calibration text, by the width of the stream; empty if nothing was calibrated.
    tuned: KL to the original before and after its read was tuned end to end, of every width, on sequences held out.
    overflow: of every width of Extra Precision, the share of codes that are 2^r, and bits a code where these are stored sparsely (overflow.py).
    """

    model: str
    base_model: str | None
    recipe: Recipe
    rows: tuple[Row, ...]
    protocol: Protocol | None
    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    outputs: tuple[Mapping[int, float], ...] = ()
    tuned: Mapping[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    overflow: Mapping[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Absolute paths are cut to the file's name."""
        recipe = self.recipe.to_dict() | {"calibration": public(self.recipe.calibration)}
        protocol = None if self.protocol is None else asdict(self.protocol) | {"text": public(self.protocol.text)}
        return {
            "version": VERSION,
            "model": public(self.model),
            "base_model": self.base_model,
            "recipe": recipe,
            "rows": [_finite(asdict(row)) for row in self.rows],
            "protocol": protocol,
            "layers": [_layer_dict(layer) for layer in self.layers],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "outputs": [_finite({str(bits): error for bits, error in output.items()}) for output in self.outputs],
            "tuned": {str(bits): list(kl) for bits, kl in self.tuned.items()},
            "overflow": {str(bits): list(cost) for bits, cost in self.overflow.items()},
        }

    def to_json(self) -> bytes:
        """The content of report.json."""
        return (json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "the report") -> "Report":
        """Raises CheckpointError for anything that `to_dict` did not make."""
        if data.get("version") != VERSION:
            raise CheckpointError(f"{source} has version {data.get('version')!r}; this matquant reads version {VERSION}; install a newer matquant")
        try:
            protocol = data["protocol"]
            return Report(
                _text(data["model"]),
                None if data["base_model"] is None else _text(data["base_model"]),
                Recipe.of_record(data["recipe"]),
                tuple(_row(row) for row in data["rows"]),
                None if protocol is None else _protocol(protocol),
                tuple(_layer(layer) for layer in data["layers"]),
                tuple((_text(skip["name"]), _text(skip["reason"])) for skip in data["skipped"]),
                tuple({int(bits): _number(error) for bits, error in output.items() if error is not None} for output in data["outputs"]),
                _twos(data["tuned"]),
                _twos(data["overflow"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MatquantError) as error:
            raise CheckpointError(f"{source} is not what matquant writes: {error!r}; run matquant eval for fresh numbers") from None


def public(place: str) -> str:
    """`place` without the folders that only say where it lay on one machine."""
    path = Path(place)
    return path.name or place if path.is_absolute() else place


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def _layer_dict(layer: LayerReport) -> dict[str, Any]:
    keyed = lambda errors: _finite({str(bits): errors[bits] for bits in sorted(errors, reverse=True)})  # noqa: E731
    stages = {stage: keyed(errors) for stage, errors in layer.stages.items()}
    shape = [layer.shape.out, layer.shape.in_features]
    return {"name": layer.name, "shape": shape, "errors": keyed(layer.errors), "stages": stages, "notes": list(layer.notes)}


# --- reading back: every value is checked, because a folder may come from anywhere --------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _row(data: Mapping[str, Any]) -> Row:
    wanted = {part.name for part in fields(Row)}
    if set(data) != wanted:
        raise ValueError(f"a row has {sorted(data)}, not {sorted(wanted)}")
    optional = {name: None if data[name] is None else _number(data[name]) for name in ("bits", "kl", "kl_p999", "top1")}
    numbers = {name: _number(data[name]) for name in ("bits_per_weight", "bits_per_weight_model", "perplexity")}
    return Row(label=_text(data["label"]), file_bytes=_whole(data["file_bytes"]), **optional, **numbers)


def _protocol(data: Mapping[str, Any]) -> Protocol:
    seq_len, stride, tokens, sequences = (_whole(data[name]) for name in ("seq_len", "stride", "tokens", "sequences"))
    return Protocol(seq_len, stride, tokens, sequences, _text(data["bos"]), _text(data["text"]))


def _layer(data: Mapping[str, Any]) -> LayerReport:
    out, in_features = map(_whole, data["shape"])
    stages = {_text(stage): _errors(errors) for stage, errors in data["stages"].items()}
    return LayerReport(_text(data["name"]), Shape(out, in_features), _errors(data["errors"]), tuple(map(_text, data["notes"])), stages)


def _twos(data: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    return {int(bits): (_number(first), _number(second)) for bits, (first, second) in data.items()}


def _errors(data: Mapping[str, Any]) -> dict[int, float | None]:
    return {int(bits): None if error is None else _number(error) for bits, error in data.items()}


# --- tables -----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    headers: list[str]
    rows: list[list[str]]


def quality_rows(rows: Sequence[Row]) -> Table:
    """One line a width. The columns that need the original are left out where it was not there."""
    compared = any(row.kl is not None for row in rows)
    headers = ["bits", "bits/weight", "whole model", "to fetch", "perplexity", *(["KL", "KL 99.9 %", "top-1"] if compared else [])]
    return Table(headers, [_cells(row)[: len(headers)] for row in rows])


def _cells(row: Row) -> list[str]:
    sizes = [f"{row.bits_per_weight:.2f}", f"{row.bits_per_weight_model:.2f}", size(row.file_bytes)]
    top1 = "-" if row.top1 is None else f"{100 * row.top1:.1f} %"
    return [row.label, *sizes, _perplexity(row.perplexity), _short(row.kl), _short(row.kl_p999), top1]


def layer_rows(layers: Sequence[LayerReport]) -> Table:
    """One line a layer: relative output error at every width."""
    widths = sorted({bits for layer in layers for bits in layer.errors}, reverse=True)
    headers = ["layer", "shape", *(f"{bits} bits" for bits in widths), *(["notes"] if any(layer.notes for layer in layers) else [])]
    rows = [
        [layer.name, f"{layer.shape.out} x {layer.shape.in_features}", *(_error(layer.errors.get(bits)) for bits in widths), "; ".join(layer.notes)]
        for layer in layers
    ]
    return Table(headers, [row[: len(headers)] for row in rows])


def skipped_rows(skipped: Sequence[tuple[str, str]]) -> Table:
    return Table(["layer", "left as it is because"], [list(line) for line in skipped])


def tuned_words(report: Report) -> str:
    """What end-to-end tuning of the reads did, or ""."""
    changes = ", ".join(f"{_short(before)} to {_short(after)} at {bits} bits" for bits, (before, after) in report.tuned.items())
    return f"reads tuned end to end: KL on sequences held out went from {changes}" if changes else ""


def overflow_words(report: Report) -> str:
    """What Extra Precision costs as the paper counts it and in truth, or ""."""
    planes = f"from planes, as counted above, it is {min(report.overflow) + 1} at {min(report.overflow)} bits" if report.overflow else ""
    counts = ", ".join(f"{bits + share:.2f} at {bits} bits ({stored:.2f} stored sparsely)" for bits, (share, stored) in report.overflow.items())
    return f"code bits a weight as published, one for each that overflows and none for where it is: {counts}; {planes}" if counts else ""


def size(count: int | float) -> str:
    """Bytes for people: 1.25 GB is 1.25e9 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.0f} GB" if count >= 999.5 else f"{count:.3g} GB"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _short(value: float | None) -> str:
    """Three significant digits, and at most four decimals."""
    if value is None:
        return "-"
    if abs(value) >= 1e5 or (0 < abs(value) < 1e-4):
        return f"{value:.1e}"
    decimals = min(4, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 0
    return f"{value:.{decimals}f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
