"""Quality against size, errors along the depth of the model, and speed, as SVG. Needs matplotlib (pip install 'matquant[plot]'); nothing else does."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from matquant.evaluate import Row
from matquant.report import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.4, 3.2  # inches of one panel
COLOR, GRAY = "#1f5fa8", "#666666"
HOPELESS = 1e12  # no perplexity is drawn above this one
# Fixed salt: matplotlib numbers the elements of an SVG at random otherwise, and equal runs must give equal bytes. Text stays
# text (searchable, small), in whatever plain font the reader has.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "matquant",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def as_svg(figure: "Figure", title: str) -> bytes:
    """Equal figures give equal bytes under STYLE."""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": "matquant", "Title": title})
    return content.getvalue()


def quality_svg(rows: Sequence[Row]) -> bytes | None:
    """KL to the original and perplexity against bits per weight; None without matplotlib, or with nothing to draw.

    Both axes of quality are logarithmic: a width less costs about a constant factor. Equal rows give equal bytes.
    """
    reads = sorted((row for row in rows if not _is_original(row)), key=lambda row: row.bits_per_weight)
    if not reads or not available():
        return None
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _figure(reads, next((row.perplexity for row in rows if _is_original(row)), None))
        return as_svg(figure, "Quality at every width")


WIDTH_COLORS = {8: "#440154", 7: "#46327e", 6: "#365c8d", 5: "#277f8e", 4: "#1fa187", 3: "#4ac16d", 2: "#d8a61c"}


def errors_svg(layers: Sequence[LayerReport], outputs: Sequence[Mapping[int, float]]) -> bytes | None:
    """Relative output error of every layer (dotted: after the method's first stage; solid: at the end) and of every block's
    output, by width, in the order of the model; None without matplotlib, or with nothing to draw."""
    measured = [layer for layer in layers if any(error is not None and error > 0 for error in layer.errors.values())]
    if not measured or not available():
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        panels = 2 if any(outputs) else 1
        figure = Figure(figsize=(WIDTH, HEIGHT * panels), layout="constrained", facecolor="white")
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        _depth_panel(axes[0], [layer.errors for layer in measured], "-", "relative output error of each layer; dotted: after its first stage")
        first = [next(iter(layer.stages.values()), {}) for layer in measured]
        _depth_panel(axes[0], first, ":")
        axes[0].set_xlabel("layer")
        if panels == 2:
            _depth_panel(axes[1], outputs, "-", "relative error of each block's output")
            axes[1].set_xlabel("block")
        return as_svg(figure, "Errors along the depth of the model")


def speed_figure(decode: Mapping[int, float], prefill: Mapping[int, float], drafts: Mapping[int, float], kind: str) -> bytes:
    """Tokens a second against the read width, as "svg" or "png"; drafts: of decoding at the widest, by draft width. Needs matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT * 2), layout="constrained", facecolor="white")
        panels = {"decoding, tokens a second": decode, "prefill, tokens a second": prefill}
        for axes, (title, rates) in zip(figure.subplots(2, 1, sharex=True), panels.items(), strict=True):
            axes.plot(list(rates), list(rates.values()), "o-", color=COLOR, linewidth=1.2, markersize=4.5)
            axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        for bits, rate in drafts.items():
            place = (max(decode), rate)
            figure.axes[0].scatter(*place, edgecolors=COLOR, facecolors="white", s=22, zorder=3)
            figure.axes[0].annotate(f"drafted at {bits}", place, xytext=(-5, 4), textcoords="offset points", ha="right", color=COLOR)
        figure.axes[1].set_xticks(list(decode))
        figure.axes[1].set_xlabel("read width, bits")
        if kind == "svg":
            return as_svg(figure, "Speed at every width")
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=150)
        return content.getvalue()


def _depth_panel(axes: "Axes", rows: Sequence[Mapping[int, float | None]], style: str, title: str = "") -> None:
    for bits in sorted({bits for row in rows for bits in row}, reverse=True):
        points = [(x, row[bits]) for x, row in enumerate(rows) if row.get(bits)]
        label = f"{bits} bits" if title else None
        axes.plot([x for x, _ in points], [y for _, y in points], style, color=WIDTH_COLORS[bits], linewidth=1.1, label=label)
    axes.set_yscale("log")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(ncols=5, fontsize=8, frameon=False)


def _figure(reads: Sequence[Row], original: float | None) -> "Figure":
    from matplotlib.figure import Figure

    compared = [row for row in reads if row.kl is not None and row.kl > 0]
    panels = 2 if compared else 1
    figure = Figure(figsize=(WIDTH, HEIGHT * panels), layout="constrained", facecolor="white")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if compared:
        _panel(axes[0], compared, [row.kl or 0.0 for row in compared], "KL to the original (nats)")
    _panel(axes[-1], reads, [min(row.perplexity, HOPELESS) for row in reads], "perplexity")
    if original is not None:
        axes[-1].axhline(original, color=GRAY, linestyle="--", linewidth=1)
        axes[-1].annotate("original", (1, original), xycoords=("axes fraction", "data"), ha="right", va="top", color=GRAY)
    axes[-1].set_xlabel("bits per quantized weight, scales included")
    return figure


def _is_original(row: Row) -> bool:
    return row.bits is not None and row.bits > 8


def _panel(axes: "Axes", rows: Sequence[Row], values: Sequence[float], title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = [(row, row.bits_per_weight, value) for row, value in zip(rows, values, strict=True)]
    uniform = [(x, y) for row, x, y in points if row.bits is not None]
    axes.plot([x for x, _ in uniform], [y for _, y in uniform], color=COLOR, linewidth=1.2, alpha=0.5)
    for row, x, y in points:
        mixed = row.bits is None  # a hollow point off the line, named below it
        axes.scatter([x], [y], edgecolors=COLOR, facecolors="white" if mixed else COLOR, s=22, zorder=3)
        beside: dict[str, Any] = {"xytext": (-5, -12), "ha": "right"} if mixed else {"xytext": (5, 4)}
        axes.annotate(_name(row), (x, y), textcoords="offset points", color=COLOR, **beside)
    axes.set_yscale("log")
    wide = max(values) > 20 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(0.08, 0.16)


def _name(row: Row) -> str:
    return f"{row.label} bits" if row.label.isdigit() else row.label


def _tick(value: float, _: Any) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}"
