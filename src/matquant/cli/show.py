"""Results on stdout, as tables for people or JSON for machines; progress on stderr."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table as Grid
from rich.text import Text

from matquant import doctor
from matquant.checkpoint import Description
from matquant.cli.writing import Completion
from matquant.evaluate import Protocol, Row
from matquant.plan import Table as Stored
from matquant.report import Report, Table, layer_rows, overflow_words, quality_rows, size, skipped_rows, tuned_words

if TYPE_CHECKING:
    from matquant.estimate import Estimate

QUIET_SECONDS = 20  # between two lines about one stage where there is no bar


def emit(value: Any) -> None:
    """JSON on stdout. NaN and infinities are no JSON and never leave here."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def say(*lines: str) -> None:
    """Plain lines on stdout, never read as rich markup, never wrapped."""
    for line in lines:
        sys.stdout.write(line + "\n")


def draw(table: Table, left: int = 1) -> None:
    """A table as wide as it needs where stdout is no terminal, so that pipes and logs lose nothing."""
    Console(width=None if sys.stdout.isatty() else 200).print(grid(table, left))


def grid(table: Table, left: int = 1) -> Grid:
    """A table whose first `left` columns are text and the rest numbers."""
    drawn = Grid(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(table.headers):
        drawn.add_column(header, justify="left" if index < left or header == "notes" else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn


# --- inspect, verify, generate, doctor ------------------------------------------------------------------------------


def description(found: Description, as_json: bool) -> None:
    if as_json:
        return emit(_description_dict(found))
    layout = found.layout
    zero = "symmetric" if layout.grid.symmetric else "asymmetric"
    fetch = {r: size(count) for r, count in found.file_bytes.items()}
    here = {r: "yes" if r in found.widths else "planes missing" for r in layout.widths}
    lines = [[str(r), f"{found.bits_per_weight(r):.2f}", fetch.get(r, "?"), here[r]] for r in layout.widths]
    say(
        f"{found.folder}: {len(found.modules)} quantized layers, {found.quantized:,} of {found.parameters:,} weights",
        f"parent {layout.grid.bits} bits, groups of {layout.grid.group_size}, {zero}, slicing {layout.slicing}, scales {layout.scale_dtype}"
        + (", overlap" if layout.grid.overlap else ""),
        f"planes 0-{found.planes - 1} of 0-{layout.grid.bits - 1} are here; default width {found.bits}",
        *[f"missing: {name}" for name in found.missing],
    )
    draw(Table(["bits", "bits/weight", "to fetch", "readable here"], lines))
    say(*[_table_line(name, table) for name, table in found.tables.items()])
    say(f"not quantized: {', '.join(found.not_converted) or 'nothing inside the blocks'}", f"plans: {', '.join(found.plans) or 'none'}")
    if found.recipe is not None:
        say(f"recipe {found.recipe.hash[:12]}: method {found.recipe.method}, calibration {found.recipe.calibration}, seed {found.recipe.seed}")


def _table_line(name: str, table: Stored) -> str:
    size_ = table.layout.grid.group_size
    groups = "one scale a row" if size_ == -1 else f"groups of {size_}"
    return f"table {name}: {table.shape.out} x {table.shape.in_features} at {table.bits} bits, {groups}, {size(table.stored_bytes)}; read so at every width"


def _description_dict(found: Description) -> dict[str, Any]:
    grid_ = found.layout.grid
    return {
        "folder": str(found.folder),
        "parent_bits": grid_.bits,
        "group_size": grid_.group_size,
        "symmetric": grid_.symmetric,
        "overlap": grid_.overlap,
        "slicing": found.layout.slicing,
        "scale_dtype": found.layout.scale_dtype,
        "bits": found.bits,
        "planes": found.planes,
        "widths": list(found.widths),
        "missing": list(found.missing),
        "offered": [{"bits": r, "bits_per_weight": found.bits_per_weight(r), "file_bytes": found.file_bytes.get(r)} for r in found.layout.widths],
        "parameters": found.parameters,
        "quantized": found.quantized,
        "modules": {name: [shape.out, shape.in_features] for name, shape in found.modules.items()},
        "tables": {
            name: {"shape": [table.shape.out, table.shape.in_features], "bits": table.bits, "group_size": table.layout.grid.group_size}
            for name, table in found.tables.items()
        },
        "not_converted": list(found.not_converted),
        "plans": list(found.plans),
        "recipe": None if found.recipe is None else found.recipe.to_dict(),
        "recipe_hash": None if found.recipe is None else found.recipe.hash,
        "versions": dict(found.versions),
    }


def problems(folder: Path, found: Sequence[str], as_json: bool) -> None:
    if as_json:
        return emit({"folder": str(folder), "sound": not found, "problems": list(found)})
    say(*found) if found else say(f"{folder} is sound")


class Stream:
    """Text on a terminal as it comes. Elsewhere, and where JSON is wanted, nothing comes early."""

    def __init__(self, as_json: bool = False, always: bool = False) -> None:
        self.shows = always or (sys.stdout.isatty() and not as_json)

    def __call__(self, text: str) -> None:
        if self.shows:
            sys.stdout.write(text)
            sys.stdout.flush()


def completion(result: Completion, as_json: bool) -> None:
    if as_json:
        return emit(result.to_dict())
    say("" if Stream().shows else result.prompt + result.text)
    rate = f", {result.tokens / result.seconds:.1f} tokens/s" if result.seconds else ""
    sys.stderr.write(f"{result.bits} bits: {result.tokens} tokens in {result.seconds:.1f} s{rate}\n")
    if result.draft_bits is not None:
        sys.stderr.write(drafting(result.draft_bits, result.acceptance, result.repeated, result.tokens_per_pass) + "\n")


def drafting(bits: int, acceptance: float | None, repeated: float | None, per_pass: float | None) -> str:
    """What drafting brought, in words."""
    return (
        f"drafted at {bits} bits: {acceptance or 0:.0%} accepted, {repeated or 0:.0%} of the text copied from itself, "
        f"{per_pass or 0:.2f} tokens a pass of the verifier"
    )


def facts(found: Mapping[str, Any], as_json: bool) -> None:
    advice = doctor.problems(found)
    if as_json:
        return emit({**found, "advice": advice})
    say(f"python {found['python']} on {found['platform']}")
    say("  ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items()))
    say(f"{found['cpu_cores']} cores, torch uses {found['threads']} threads, {found['cpu_capability']}")
    memory = found["ram_free_bytes"]
    say(f"free: memory {'unknown' if memory is None else size(memory)}, disk {size(found['disk_free_bytes'])}")
    gpus = [f"{gpu['name']} (compute {gpu['capability']}), {size(gpu['free_bytes'])} of {size(gpu['total_bytes'])} free" for gpu in found["cuda"]]
    say(f"CUDA: {'; '.join(gpus) or 'none'}")
    say(*[f"{name}={value}" for name, value in found["environment"].items()], *[f"note: {line}" for line in advice])


# --- quality --------------------------------------------------------------------------------------------------------


def rows(protocol: Protocol, found: Sequence[Row], as_json: bool) -> None:
    if as_json:
        return emit([row_dict(row) | {"protocol": asdict(protocol)} for row in found])
    draw(quality_rows(found))
    say(protocol_line(protocol))


def row_dict(row: Row) -> dict[str, Any]:
    """bits is a whole number wherever it is one."""
    bits = int(row.bits) if row.bits is not None and row.bits == int(row.bits) else row.bits
    return asdict(row) | {"bits": bits}


def protocol_line(protocol: Protocol) -> str:
    counts = f"{protocol.tokens} tokens in {protocol.sequences} sequences of {protocol.seq_len}, stride {protocol.stride}"
    return f"measured on {counts}; BOS: {protocol.bos}; text: {protocol.text}"


# --- quantize -------------------------------------------------------------------------------------------------------


def report(found: Report, folder: Path, run: str, as_json: bool) -> None:
    """run: what it took, for the closing line."""
    if as_json:
        return emit({"folder": str(folder)} | found.to_dict())
    say("relative output error of every layer, on the calibration text")
    draw(layer_rows(found.layers), left=2)
    if found.skipped:
        draw(skipped_rows(found.skipped), left=2)
    if found.rows and found.protocol:
        say("")
        draw(quality_rows(found.rows))
        say(protocol_line(found.protocol))
    say(*(words for words in (tuned_words(found), overflow_words(found)) if words))
    say(run, f"written to {folder}; next: matquant generate {folder} 'Once upon a time' --bits 4")


def estimate(found: "Estimate", as_json: bool) -> None:
    if as_json:
        return emit(asdict(found))
    say(f"{found.model}: {found.layers} layers to quantize, {found.weights:,} weights")
    sizes = [[str(r), f"{found.bits_per_weight[r]:.2f}", size(count)] for r, count in found.read_bytes.items()]
    draw(Table(["bits", "bits/weight", "quantized part"], sizes))
    if found.skipped:
        draw(skipped_rows(found.skipped), left=2)
    say(
        f"folder {size(found.file_bytes)}; roughly {clock(found.seconds)} and {size(found.memory_bytes)} of memory on this machine",
        "nothing was written",
    )


def clock(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """A bar with the time left and the peak memory, on stderr; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        memory = TextColumn("{task.fields[memory]}")
        self.bar = Bar(*columns, memory, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.seconds: dict[str, float] = {}
        self.last = self.told = time.monotonic()

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, of: int) -> None:
        """`done` of `of` steps of a stage are finished. The time since the last call went into it, or into none if it only starts."""
        now = time.monotonic()
        doing = stage if done else "other"
        self.seconds[doing] = self.seconds.get(doing, 0.0) + now - self.last
        self.last = now
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=of, memory="")
        self.bar.update(self.tasks[stage], completed=done, total=of, memory=f"peak {size(peak_memory())}")
        if not self.console.is_terminal and (done in (0, of) or now - self.told > QUIET_SECONDS):
            self.told = now
            self.line(f"{stage} {done}/{of}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text), highlight=False, soft_wrap=True)

    def summary(self) -> str:
        """What the run took: time by stage and memory."""
        rest = time.monotonic() - self.last
        seconds = self.seconds | {"other": self.seconds.get("other", 0.0) + rest}
        parts = ", ".join(f"{stage} {clock(spent)}" for stage, spent in seconds.items())
        return f"time {clock(sum(seconds.values()))} ({parts}); peak memory {size(peak_memory())}"


def peak_memory() -> int:
    """Bytes that this process has held at most (Linux counts kilobytes, macOS bytes)."""
    import resource  # has no counterpart on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
