"""What the generated parts share: stored results and their words."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load(model: str, kind: str = "quality") -> dict[str, Any]:
    return json.loads((REPO / "benchmarks" / "results" / f"{kind}-{model}.json").read_text())


def counts(shape: list[int]) -> str:
    return f"{shape[0]} x {shape[1]} tokens"


def name_of(name: str) -> str:
    return "text sampled from the model" if name == "self" else name


Values = dict[tuple[str, int], dict[str, list[float]]]  # (text, bits) -> measure -> one value a seed


def collect(found: dict[str, tuple[str, Values]], label: str, words: str, row: dict[str, Any]) -> None:
    """Add one row of a run."""
    of = found.setdefault(label, (words, {}))[1].setdefault((row["text"], row["bits"]), {})
    for measure in ("kl", "perplexity", "top1", "bits_per_weight"):
        of.setdefault(measure, []).append(row[measure])


def variants(stored: dict[str, Any]) -> dict[str, tuple[str, Values]]:
    """Variant -> (its words, values). A variant measured with and without refits is two, the second named NAME+refit."""
    found: dict[str, tuple[str, Values]] = {}
    for key, run in stored["runs"].items():
        name = key.partition("/")[0]
        plain = {(row["text"], row["bits"]) for row in run["rows"] if not row["refit"]}
        for row in run["rows"]:
            where = (row["text"], row["bits"])
            twice = row["refit"] and where in plain
            label, words = (f"{name}+refit", f"{run['words']}, refit") if twice else (name, run["words"])
            collect(found, label, words, row)
    for name in list(found):
        if name.endswith("+refit"):  # where a width has no refit, the row repeats what it reads without
            found[name] = found[name][0], found[name.removesuffix("+refit")][1] | found[name][1]
    return found


def table(runs: dict[str, tuple[str, Values]], order: Sequence[str], text: str, key: str, words: Callable[[float], str]) -> str:
    shown = [name for name in order if name in runs]
    widths = sorted({bits for name in shown for _, bits in runs[name][1]}, reverse=True)
    rows = []
    for name in shown:
        title, values = runs[name]
        rows.append([title, *(spread(values.get((text, bits), {}).get(key, []), words) for bits in widths)])
    return markdown(["", *map(str, widths)], rows)


def spread(values: list[float], words: Callable[[float], str]) -> str:
    if not values:
        return ""
    middle, half = words(sum(values) / len(values)), words((max(values) - min(values)) / 2)
    return f"{middle} ± {half}" if len(values) > 1 and max(values) > min(values) else middle


def ratios(runs: dict[str, tuple[str, Values]], order: Sequence[str], base: str, texts: list[str]) -> str:
    """KL over that of `base`, mean over seeds and texts."""

    def mean(name: str, bits: int, over: list[str]) -> float:
        values = [value for text in over for value in runs[name][1][text, bits]["kl"]]
        return sum(values) / len(values)

    def ratio(name: str, bits: int) -> str:
        both = [text for text in texts if (text, bits) in runs[name][1] and (text, bits) in runs[base][1]]
        return f"{mean(name, bits, both) / mean(base, bits, both):.2f}" if both else ""

    widths = sorted({bits for _, bits in runs[base][1]}, reverse=True)
    shown = [name for name in order if name in runs and name != base]
    rows = [[runs[name][0], *(ratio(name, bits) for bits in widths)] for name in shown]
    return markdown(["", *map(str, widths)], rows)


def kl_words(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def perplexity_words(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def thousandths(value: float) -> str:
    return f"{value:.3f}"


MEASURES: list[tuple[str, str, Callable[[float], str]]] = [
    ("KL to the original, nats a token", "kl", kl_words),
    ("perplexity", "perplexity", perplexity_words),
    ("top-1 agreement with the original", "top1", thousandths),
]
