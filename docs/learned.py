"""Tables of what training gains, from benchmarks/learned.py."""

from typing import Any

from tables import MEASURES, Values, counts, load, name_of, ratios, table, thousandths

FAMILY = ("baseline", "sliced", "matquant", "single", "extra", "8to2", "8to4-2", "only-8to2", "weights", "balanced", "random", "ours")
TUNED = "+tuned"  # behind a variant's name: its reads were tuned


def learned(model: str) -> str:
    """KL, perplexity and top-1 of every method at every width and text; both base algorithms against their dedicated runs; tuned reads against untuned."""
    stored = load(model, "learned")
    setting, runs = stored["setting"], variants(stored)
    texts = list(dict.fromkeys(text for _, values in runs.values() for text, _ in values))
    commands = dict.fromkeys(run["command"] for run in stored["runs"].values())
    order = [f"{base}-{member}" for base in ("omniquant", "qat") for member in FAMILY]
    order += [name + suffix for name in ("nested", "block") for suffix in ("", TUNED)]
    parts = [
        "\n".join(f"    {command}" for command in commands)
        + f"\n\nGroups of {setting['group_size']}. Calibrated on {counts([setting['num_samples'], setting['seq_len']])} of {setting['calibration']}, trained on "
        f"{setting['tokens']} tokens of {setting['train_text']} (of each width whose reads are tuned), measured on {counts(setting['held_out'])} of each text. "
        "Where there are several seeds: mean ± half the spread.\n"
    ]
    for text in texts:
        parts += [f"{title}, {name_of(text)}:\n\n{table(runs, order, text, key, words)}" for title, key, words in MEASURES]
    parts.append(f"bits per weight, metadata included:\n\n{table(runs, order, texts[0], 'bits_per_weight', thousandths)}")
    for base, words in (("omniquant-baseline", "OmniQuant, one run a width"), ("qat-baseline", "QAT, one run a width")):
        if base in runs:
            parts.append(
                f"KL over that of {words}:\n\n{ratios(runs, [name for name in order if name.startswith(base.partition('-')[0])], base, texts)}"
            )
    for name in ("nested", "block"):
        if name + TUNED in runs:
            parts.append(f"KL over that of {runs[name][0]}:\n\n{ratios(runs, [name + TUNED], name, texts)}")
    return "\n".join(parts)


def variants(stored: dict[str, Any]) -> dict[str, tuple[str, Values]]:
    """Variant -> (its words, values). One whose reads are tuned is two."""
    found: dict[str, tuple[str, Values]] = {}
    for key, run in stored["runs"].items():
        name = key.partition("/")[0]
        for row in run["rows"]:
            label, words = name.removesuffix("-tuned"), run["words"]
            if row["tuned"]:
                label, words = label + TUNED, f"{words}, reads tuned"
            of = found.setdefault(label, (words, {}))[1].setdefault((row["text"], row["bits"]), {})
            for measure in ("kl", "perplexity", "top1", "bits_per_weight"):
                of.setdefault(measure, []).append(row[measure])
    return found
