"""Tables of what training gains, from benchmarks/learned.py."""

from collections.abc import Iterable
from typing import Any

from tables import MEASURES, Values, collect, counts, load, markdown, name_of, ratios, table, thousandths

from matquant.recipe import Recipe

BASES, OURS = ("omniquant", "qat"), ("nested", "block")
FAMILY = ("baseline", "sliced", "matquant", "single", "extra", "8to2", "8to4-2", "only-8to2", "weights", "balanced", "random", "one-stream", "ours")
TUNED = "+tuned"  # behind a variant's name: its reads were tuned


def learned(model: str) -> str:
    """KL, perplexity and top-1 of every method at every width and text; both base algorithms against their dedicated runs; tuned reads against untuned."""
    stored = load(model, "learned")
    setting, runs = stored["setting"], variants(stored)
    texts = list(dict.fromkeys(text for _, values in runs.values() for text, _ in values))
    commands = dict.fromkeys(run["command"] for run in stored["runs"].values())
    order = [f"{base}-{member}" for base in BASES for member in FAMILY] + [name + suffix for name in OURS for suffix in ("", TUNED)]
    parts = [
        "\n".join(f"    {command}" for command in commands)
        + f"\n\n{_groups(setting['group_size'])}. Calibrated on {counts([setting['num_samples'], setting['seq_len']])} of {setting['calibration']}{_training(setting, runs)}, "
        f"measured on {counts(setting['held_out'])} of each text. Where there are several seeds: mean ± half the spread.\n"
    ]
    for text in texts:
        parts += [f"{title}, {name_of(text)}:\n\n{table(runs, order, text, key, words)}" for title, key, words in MEASURES]
    parts.append(f"bits per weight, metadata included:\n\n{table(runs, order, texts[0], 'bits_per_weight', thousandths)}")
    parts += _overflow(stored)
    compared = {f"{base}-baseline": [f"{base}-{member}" for member in FAMILY] for base in BASES}
    for base, others in (compared | {name: [name + TUNED] for name in OURS}).items():
        if base in runs:
            parts.append(f"KL over that of {runs[base][0]}:\n\n{ratios(runs, others, base, texts)}")
    return "\n".join(parts)


def _overflow(stored: dict[str, Any]) -> list[str]:
    """Bits a code of Extra Precision, as published and where it is said which codes overflow; of the first seed."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for run in stored["runs"].values():
        costs = {row["bits"]: tuple(row["overflow"]) for row in run["rows"] if row["overflow"]}
        found |= {run["words"]: found.get(run["words"], costs)} if costs else {}
    widths = sorted({bits for costs in found.values() for bits in costs}, reverse=True)
    rows = [
        [f"{words}, {kind}", *(thousandths(of(bits, *costs[bits])) for bits in widths)]
        for words, costs in found.items()
        for kind, of in (("as published", lambda bits, share, _: bits + share), ("stored sparsely", lambda bits, _, sparse: sparse))
    ]
    told = "bits a code, metadata aside; as published, a bit for each that overflows and none for where it is (the table above: read from planes)"
    return [f"{told}:\n\n{markdown(['', *map(str, widths)], rows)}"] if rows else []


def _groups(size: int) -> str:
    return "A scale for each row" if size == -1 else f"Groups of {size}"


def _training(setting: dict[str, Any], names: Iterable[str]) -> str:
    """What each base algorithm that is there was given to train on."""
    words, steps = "", setting["tokens"] // setting.get("batch_tokens", Recipe().batch_tokens)
    trained = f"{setting['tokens']} tokens of {setting['train_text']}"
    if any(name.startswith("omniquant") for name in names):
        words += f", {setting.get('epochs', Recipe().epochs)} rounds over these by OmniQuant"
    if any(name.startswith("qat") for name in names):
        words += f", {steps} steps of QAT on {trained}, each passed once for every target"
    if any(name.endswith(TUNED) for name in names):
        words += f", trained on {trained} (of each width whose reads are tuned)"
    return words


def variants(stored: dict[str, Any]) -> dict[str, tuple[str, Values]]:
    """Variant -> (its words, values). One whose reads are tuned is two."""
    found: dict[str, tuple[str, Values]] = {}
    for key, run in stored["runs"].items():
        name = key.partition("/")[0]
        for row in run["rows"]:
            label, words = name.removesuffix("-tuned"), run["words"]
            if row["tuned"]:
                label, words = label + TUNED, f"{words}, reads tuned"
            collect(found, label, words, row)
    return found
