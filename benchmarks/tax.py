"""The price of nesting by the weight of 8 bits: KL of one nested checkpoint over that of our own run dedicated to each width, as SVG.

    python benchmarks/tax.py benchmarks/results/quality-stories15M.json docs/tax.svg

Takes the variants lam8-* and dedicated of benchmarks/quality.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from matquant.plot import STYLE, WIDTH_COLORS, as_svg


def kl_of(run: dict[str, Any], text: str) -> dict[int, float]:
    return {row["bits"]: row["kl"] for row in run["rows"] if row["text"] == text}


def draw(stored: dict[str, Any]) -> bytes:
    """One line a width: KL over the dedicated run's, against lam of 8 bits."""
    runs, text = stored["runs"], next(iter(stored["original"]))
    dedicated = kl_of(runs["dedicated/0"], text)
    sweep = sorted((float(key.removeprefix("lam8-").partition("/")[0]), kl_of(run, text)) for key, run in runs.items() if key.startswith("lam8-"))
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for bits in (8, 4, 3, 2):
            points = [(lam, kl[bits] / dedicated[bits]) for lam, kl in sweep]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], "o-", color=WIDTH_COLORS[bits], linewidth=1.2, markersize=3.5, label=f"{bits} bits"
            )
        axes.axhline(1, color="#666666", linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="weight of 8 bits (2 bits: 1)")
        axes.set_title("KL of the nested checkpoint over that of a run dedicated to the width", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        return as_svg(figure, "The price of nesting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_bytes(draw(json.loads(options.results.read_text())))


if __name__ == "__main__":
    main()
