"""Size against KL, and a plan as a heat map of blocks and modules, in the style of matquant.plot. Needs matplotlib (pip install 'matquant[plot]')."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.errors import InputError
from matquant.plan import BitPlan
from matquant.plot import COLOR, GRAY, HEIGHT, STYLE, WIDTH, WIDTH_COLORS, as_svg, available

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
TITLE = "Plans: size against KL"


@dataclass(frozen=True)
class Point:
    """One plan on the chart. kind: uniform, plan (named) or front (predicted, drawn as a line). kl: measured where it was, else predicted."""

    label: str
    kind: str
    bits_per_weight: float
    kl: float
    measured: bool


def draw(path: Path, points: Sequence[Point], plan: BitPlan | None, layers: Sequence[str]) -> None:
    """Write FILE.svg or FILE.png. Raises InputError for another ending, or without matplotlib."""
    if path.suffix not in FORMATS:
        raise InputError(f"cannot draw {path}; the name must end in {' or '.join(FORMATS)}")
    if not available():
        raise InputError("drawing needs matplotlib; pip install 'matquant[plot]'")
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _figure(points, plan, layers)
        if path.suffix == ".svg":
            content = as_svg(figure, TITLE)
        else:
            buffer = BytesIO()
            figure.savefig(buffer, format="png", dpi=160, metadata={"Software": "matquant", "Title": TITLE})
            content = buffer.getvalue()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another file") from None


def grid(plan: BitPlan, layers: Sequence[str]) -> tuple[list[int], list[str], dict[tuple[int, str], tuple[int, ...]]]:
    """(blocks, modules, (block, module) -> widths there). A module is the last part of a name; experts of one block share a place."""
    found: dict[tuple[int, str], set[int]] = {}
    for name in layers:
        block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        found.setdefault((block, name.rpartition(".")[2]), set()).add(plan.bits(name))
    blocks = sorted({block for block, _ in found})
    return blocks, list(dict.fromkeys(module for _, module in found)), {place: tuple(sorted(bits)) for place, bits in found.items()}


def _figure(points: Sequence[Point], plan: BitPlan | None, layers: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    panels = 1 if plan is None else 2
    figure = Figure(figsize=(WIDTH, HEIGHT * panels), layout="constrained", facecolor="white")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    _front(axes[0], [point for point in points if point.kl > 0])
    if plan is not None:
        _heat(axes[1], plan, layers)
    return figure


def _front(axes: "Axes", points: Sequence[Point]) -> None:
    line = sorted((point.bits_per_weight, point.kl) for point in points if point.kind == "front")
    axes.plot([x for x, _ in line], [y for _, y in line], color=GRAY, linewidth=1, label="best plans, predicted")
    for point in points:
        if point.kind == "front":
            continue
        uniform = point.kind == "uniform"
        axes.scatter([point.bits_per_weight], [point.kl], edgecolors=COLOR, facecolors=COLOR if uniform else "white", s=22, zorder=3)
        beside: dict[str, Any] = {"xytext": (5, 4)} if uniform else {"xytext": (-5, -12), "ha": "right"}
        words = f"{point.label} bits" if uniform else point.label + ("" if point.measured else " (predicted)")
        axes.annotate(words, (point.bits_per_weight, point.kl), textcoords="offset points", color=COLOR, **beside)
    axes.set_yscale("log")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("bits per quantized weight, metadata counted")
    axes.set_title("KL (nats a token); filled: uniform widths, hollow: plans", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.margins(0.08, 0.12)


def _heat(axes: "Axes", plan: BitPlan, layers: Sequence[str]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    blocks, modules, places = grid(plan, layers)
    white = (1.0, 1.0, 1.0)
    colors = [[to_rgb(WIDTH_COLORS[min(places[b, m])]) if (b, m) in places else white for b in blocks] for m in modules]
    axes.imshow(colors, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(modules)), modules)
    step = max(1, len(blocks) // 15)
    axes.set_xticks(range(0, len(blocks), step), [str(b) if b >= 0 else "head" for b in blocks[::step]])
    axes.set_xlabel("block")
    used = sorted({bits for own in places.values() for bits in own}, reverse=True)
    axes.legend(
        handles=[Patch(color=WIDTH_COLORS[r], label=f"{r} bits") for r in used], ncols=len(used), fontsize=8, frameon=False,
        loc="lower right", bbox_to_anchor=(1, 1),
    )  # fmt: skip
