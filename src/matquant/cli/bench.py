"""`matquant bench`: flags and tables of matquant.benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from matquant.cli.options import FOLDER, HEAD, JSON, THREADS
from matquant.errors import InputError

if TYPE_CHECKING:
    from matquant.benchmark import Benchmark


def bench(
    folder: Path = FOLDER,
    bits: str | None = typer.Option(None, metavar="BITS,...", help="widths to measure", show_default="all that are here"),
    draft_bits: str | None = typer.Option(
        None, "--draft-bits", metavar="BITS,...", help="self-speculation: widths to draft at for the widest of --bits", show_default=False
    ),
    prompt_tokens: int = typer.Option(128, min=1, help="tokens of the prompt"),
    new_tokens: int = typer.Option(32, min=2, help="tokens to add"),
    repeats: int = typer.Option(3, min=1, help="measurements of each number; medians are shown"),
    threads: int | None = THREADS,
    head_bits: int | None = HEAD,
    memory: bool = typer.Option(True, "--memory/--no-memory", help="measure peak memory too: a process for each width"),
    plot: Path | None = typer.Option(None, metavar="FILE", help="draw tokens/s by width as FILE.svg or FILE.png", show_default=False),
    as_json: bool = JSON,
) -> None:
    """Measure speed and memory of the engine at several widths."""
    from matquant import benchmark
    from matquant.checkpoint import Checkpoint
    from matquant.cli import show
    from matquant.cli.flags import parse_bits
    from matquant.cli.writing import check_draft
    from matquant.plan import BitPlan

    checkpoint = Checkpoint.open(folder)
    widths = tuple(sorted(set(parse_bits(bits)), reverse=True)) if bits else checkpoint.widths
    checkpoint.check_widths(*widths)
    drafts = parse_bits(draft_bits, "draft-bits") if draft_bits else ()
    for draft in drafts:
        check_draft(draft, BitPlan(widths[0]), checkpoint.widths)
    check_plot(plot)
    setting = benchmark.Setting(widths, drafts, prompt_tokens, new_tokens, repeats, threads, head_bits, memory)
    with show.Progress() as progress:
        found = benchmark.measure(folder, setting, progress)
    if plot is not None:
        from matquant.plot import speed_figure

        decode, prefill = ({row.bits: getattr(row, name) for row in found.widths} for name in ("decode", "prefill"))
        plot.write_bytes(speed_figure(decode, prefill, {row.draft_bits: row.decode for row in found.drafts}, plot.suffix[1:]))
    show.emit(found.to_dict()) if as_json else tell(found)


def check_plot(file: Path | None) -> None:
    """Raises InputError."""
    from matquant import plot

    if file is None:
        return
    if file.suffix not in (".svg", ".png"):
        raise InputError(f"cannot draw {file}; give a name that ends in .svg or .png")
    if not plot.available():
        raise InputError(f"cannot draw {file} without matplotlib; pip install 'matquant[plot]'")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.parent} is no folder; make it, or draw elsewhere")


def tell(found: "Benchmark") -> None:
    from matquant.cli import show
    from matquant.report import Table, size

    rows = [
        [str(row.bits), f"{row.decode:.1f}", f"{row.prefill:.0f}", f"{row.read_gb_s:.1f}", f"{row.share:.0%}",
         "unknown" if row.peak_bytes is None else size(row.peak_bytes)]
        for row in found.widths
    ]  # fmt: skip
    show.draw(Table(["bits", "decode tokens/s", "prefill tokens/s", "GB/s of weights", "of bandwidth", "peak memory"], rows))
    if found.drafts:
        lines = [
            [
                f"{row.bits} by {row.draft_bits}",
                f"{row.decode:.1f}",
                f"{row.speedup:.2f}",
                f"{row.acceptance:.0%}",
                f"{row.repeated:.0%}",
                f"{row.tokens_per_pass:.2f}",
            ]
            for row in found.drafts
        ]
        show.draw(Table(["drafted", "decode tokens/s", "speed-up", "accepted", "copied", "tokens/pass"], lines))
    counts = f"{found.prompt_tokens} tokens of prompt, {found.new_tokens} new ones, medians of {found.repeats}"
    show.say(
        f"{found.threads} threads, {found.isa}; {counts}; the head at {found.head_bits} bits",
        f"read bandwidth {found.bandwidth_gb_s:.1f} GB/s (torch's sum over numbers larger than the last cache, before and after)",
    )
