"""Rewrite the generated parts of README.md and docs/CLI.md: `make docs`. tests/test_docs.py fails where they are out of date.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. NAME is `flags COMMAND` (from the command line
itself), `exit codes` (from errors.py), `results` (from benchmarks/results/readme.json: {"caption", "rows"}, rows as
`matquant eval --json` prints them), `quality MODEL`, `ablation MODEL`, `favor MODEL`, `closer NAME` (from benchmarks/results/quality-MODEL.json,
benchmarks/quality.py), `peers MODEL` (peers-MODEL.json, benchmarks/peers.py), `speed MODEL` (speed-MODEL.json, benchmarks/speed.py), `serving MODEL`
(serving-MODEL.json, benchmarks/serving.py), `drafts MODEL` (drafts-MODEL.json, benchmarks/drafts.py), `plans MODEL` (plans-MODEL.json, benchmarks/plans.py),
`learned MODEL` (learned-MODEL.json, benchmarks/learned.py) or `gpu NAME` (gpu-NAME.json, benchmarks/gpu).
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from learned import learned
from speeds import drafts, gpu, serving, speed
from tables import MEASURES, REPO, counts, kl_words, load, markdown, name_of, ratios, spread, table, thousandths, variants

from matquant import errors
from matquant.cli import BUG, INTERRUPTED, application
from matquant.evaluate import Row
from matquant.report import quality_rows

FILES = ("README.md", "docs/CLI.md", "docs/GPU.md", "docs/RESULTS.md")
RESULTS = REPO / "benchmarks" / "results" / "readme.json"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.S)


def flags(command: str) -> str:
    """Arguments and flags of one command, with their defaults."""
    found = typer.main.get_command(application(command)).commands[command]
    rows: list[list[str]] = []
    for parameter in found.params:
        if parameter.param_type_name == "argument":
            rows.append([f"`{parameter.metavar}`", "required", parameter.help])
            continue
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        value = f" {parameter.metavar}" if parameter.metavar else ""
        rows.append([names + value, _default(parameter), parameter.help])
    return markdown(["flag", "default", "meaning"], rows)


def _default(parameter: typer.core.TyperOption) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return "" if parameter.default in (None, False) else str(parameter.default)


def exit_codes() -> str:
    """One line a code; the words are the docstrings of the error classes that carry it."""
    rows = [["0", "done"], [str(BUG), "a bug in matquant; run again with `--debug` and report it"]]
    for kind in (errors.RecipeError, errors.InputError, errors.ResourceError, errors.CheckpointError):
        words = (kind.__doc__ or "").strip().rstrip(".")
        rows.append([str(kind.exit_code), words[0].lower() + words[1:]])
    rows.append([str(INTERRUPTED), "interrupted; the message says how to continue"])
    return markdown(["code", "meaning"], rows)


def results() -> str:
    if not RESULTS.is_file():
        return "No results are stored yet; `make demo` prints the table for SmolLM2-135M-Instruct.\n"
    stored = json.loads(RESULTS.read_text())
    rows = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in stored["rows"]]
    return f"{stored['caption']}\n\n{markdown(*quality_rows(rows))}"


QUALITY_ORDER = (
    "rtn", "gptq", "gptq+refit", "matgptq-348", "matgptq-2348", "nested", "targets-843", "targets-842", "favor-8", "block", "dedicated", "integer-zero", "round"
)  # fmt: skip
ABLATION_ORDER = (
    "one-pass", "streams-refit", "streams-refit+refit", "one-stream", "two-streams", "symmetric-target", "full-target", "no-clip-search",
    "sweeps-6", "overlap", "rotated", "all-streams", "nested"
)  # fmt: skip
FAVOR_ORDER = ("all-streams", "favor-2", "favor-4", "favor-8")


def quality(model: str) -> str:
    """KL, perplexity, top-1 and bits per weight of every method at every width and text, with the command and the setting."""
    stored = load(model)
    setting, runs = stored["setting"], variants(stored)
    commands = dict.fromkeys(run["command"] for key, run in stored["runs"].items() if key.partition("/")[0] in QUALITY_ORDER)
    torch_version = next(iter(stored["runs"].values()))["machine"]["versions"]["torch"]
    original = ", ".join(f"{value:.2f} on {text}" for text, value in stored["original"].items())
    parts = [
        "\n".join(f"    {command}" for command in commands)
        + f"\n\nGroups of {setting['group_size']}. Calibrated on {counts(setting['train'])} of {name_of(setting['calibration'])}, "
        f"measured on {counts(setting['held_out'])} of each text. Perplexity of the original: {original}. "
        f"torch {torch_version}, float32. Where there are several seeds (calibration sequences): mean ± half the spread.\n"
    ]
    for text in stored["original"]:
        for title, key, words in MEASURES:
            parts.append(f"{title}, {name_of(text)}:\n\n{table(runs, QUALITY_ORDER, text, key, words)}")
    parts.append(
        f"bits per weight, metadata included:\n\n{table(runs, QUALITY_ORDER, next(iter(stored['original'])), 'bits_per_weight', thousandths)}"
    )
    if "gptq" in runs:
        parts.append(
            f"KL over that of classic GPTQ dedicated to the width (mean over seeds and texts):\n\n{ratios(runs, QUALITY_ORDER, 'gptq', list(stored['original']))}"
        )
    return "\n".join(parts)


def closer(name: str) -> str:
    """KL and what perplexity it costs, of runs measured on more tokens: every seed, and their mean."""
    stored = load(name)
    setting, runs, original = stored["setting"], stored["runs"], stored["original"]
    rows = []
    for words, values in variants(stored).values():
        for (text, bits), of in values.items():
            costs = [100 * (value / original[text] - 1) for value in of["perplexity"]]
            percent = [f"{cost:+.2f} %" for cost in (sum(costs) / len(costs), *costs)]
            rows.append([words, str(bits), name_of(text), spread(of["kl"], kl_words), percent[0], ", ".join(percent[1:])])
    commands = dict.fromkeys(run["command"] for run in runs.values())
    return (
        "\n".join(f"    {command}" for command in commands)
        + f"\n\nGroups of {setting['group_size']}, measured on {counts(setting['held_out'])} of each text.\n\n"
        + markdown(["", "bits", "text", "KL", "perplexity over the original's", "of each seed"], rows)
    )


def ablation(model: str) -> str:
    """KL of our stages one by one, on one choice of calibration sequences."""
    return _first_seed(model, ABLATION_ORDER)


def favor(model: str) -> str:
    """KL with one width favoured."""
    return _first_seed(model, FAVOR_ORDER)


def _first_seed(model: str, order: Sequence[str]) -> str:
    stored = load(model)
    runs = {key: run for key, run in stored["runs"].items() if key.endswith("/0")}
    return table(variants({"runs": runs}), order, next(iter(stored["original"])), "kl", kl_words)


def peers(model: str) -> str:
    """KL and bits per weight of other packages' checkpoints, and of ours on the same tokens."""
    theirs, ours = load(model, "peers"), load(model)
    for key in ("group_size", "train", "held_out"):
        assert theirs["setting"][key] == ours["setting"][key], key
    runs = theirs["runs"]
    texts = list(theirs["original"])
    versions = dict.fromkeys(f"{name} {number}" for run in runs.values() for name, number in run["versions"].items())
    kept = {key: run for key, run in ours["runs"].items() if key in ("gptq/0", "nested/0", "block/0")}
    shown = variants({"runs": {**kept, **runs}})
    order = ("gptq", *sorted(key.partition("/")[0] for key in runs), "nested", "block")
    parts = [f"{', '.join(versions)}. Same {counts(ours['setting']['train'])} to calibrate on as ours, groups of {ours['setting']['group_size']}.\n"]
    parts += [f"KL to the original, {name_of(text)}:\n\n{table(shown, order, text, 'kl', kl_words)}" for text in texts]
    parts.append(f"bits per weight, metadata included:\n\n{table(shown, order, texts[0], 'bits_per_weight', thousandths)}")
    return "\n".join(parts)


PLAN_SOLVERS = {
    "module": "exact, a width for attention and MLP of a block",
    "exact": "exact, a width for what engines fuse",
    "quadratic": "exact with pairs",
    "evolve": "evolution, two minutes, from that of fused units or a uniform width",
    "evolve-long": "evolution, half an hour, from that for attention and MLP or a uniform width",
    "fisher": "exact, on Fisher-weighted error",
    "output-error": "exact, on the report's output errors",
    "round-off": "MixQuant's rule, no data",
    "pyramid": "pyramid",
    "reverse-pyramid": "reverse pyramid",
    "increasing": "increasing",
    "decreasing": "decreasing",
}


def plans(model: str) -> str:
    """KL of every solver's plan at every budget, uniform widths, and what measuring and solving took."""
    stored = load(model, "plans")
    setting, found, uniform = stored["setting"], stored["plans"], stored["uniform"]
    budgets = sorted({entry["budget"] for entry in found.values()})
    commands = dict.fromkeys(step["command"] for step in stored["steps"].values())
    parts = [
        "\n".join(f"    {command}" for command in commands)
        + f"\n\n{stored['units']} units. Measured on {counts([setting['num_samples'], setting['seq_len']])} of {setting['train']}, evolution on "
        f"{counts([setting['search_samples'], setting['seq_len']])} of it; KL to the original on {counts([setting['score_samples'], setting['score_len']])} of each text below, which no solver saw.\n"
    ]
    for text in setting["texts"]:
        if rows := _plan_rows(found, budgets, lambda entry, text=text: kl_words(entry["kl"][text]) if text in entry.get("kl", {}) else ""):
            parts.append(f"KL by bits a quantized weight, metadata counted, {text}:\n\n{markdown(['', *(f'{b:g}' for b in budgets)], rows)}")
    if closer := stored.get("closer"):
        told = lambda row: [kl_words(row["kl"]), f"{row['more']:+.4f} ± {row['error']:.4f}"]  # noqa: E731
        rows = [[f"{row['budget']:g}", PLAN_SOLVERS.get(row["plan"], f"uniform {row['plan']}"), row["text"], *told(row)] for row in closer.values()]
        tokens = next(iter(closer.values()))["tokens"]
        parts.append(
            f"On {tokens} tokens of each text, and how much more than the widest uniform width within the budget, sequence by sequence "
            f"(± one standard error):\n\n{markdown(['budget', 'plan', 'text', 'KL', 'more'], rows)}"
        )
    shown = sorted(uniform.items(), key=lambda item: item[1]["bits"])
    rows = [
        [f"{r} bits", f"{row['bits']:.3f}", *(kl_words(row["kl"][text]) if text in row["kl"] else "" for text in setting["texts"])]
        for r, row in shown
    ]
    parts.append(f"Uniform widths:\n\n{markdown(['', 'bits/weight', *setting['texts']], rows)}")
    rows = _plan_rows(found, budgets, lambda entry: f"{entry['seconds']:.2f}" if entry["seconds"] < 100 else f"{entry['seconds']:.0f}")
    parts.append(f"Seconds to solve, everything measured before:\n\n{markdown(['', *(f'{b:g}' for b in budgets)], rows)}")
    rows = [
        [name, f"{step['seconds']:.1f}", f"{step['cpu_seconds']:.1f}", f"{step['load'][0]:.1f}", str(step["machine"]["threads"])]
        for name, step in stored["steps"].items()
    ]
    parts.append(f"What else took time:\n\n{markdown(['step', 'seconds', 'processor seconds', 'load of the machine', 'threads'], rows)}")
    return "\n".join(parts)


def _plan_rows(found: dict[str, Any], budgets: list[float], cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    rows = []
    for solver, words in PLAN_SOLVERS.items():
        cells = [cell(found[f"{solver}/{b:g}"]) if f"{solver}/{b:g}" in found else "" for b in budgets]
        if any(cells):
            rows.append([words, *cells])
    return rows


def render(name: str) -> str:
    kind, _, rest = name.partition(" ")
    if kind == "flags":
        return flags(rest)
    if kind in PARTS:
        return PARTS[kind](rest)
    return {"exit codes": exit_codes, "results": results}[name]()


PARTS = {
    "quality": quality,
    "ablation": ablation,
    "favor": favor,
    "closer": closer,
    "peers": peers,
    "speed": speed,
    "serving": serving,
    "drafts": drafts,
    "learned": learned,
    "plans": plans,
    "gpu": gpu,
}


def regenerate(text: str) -> str:
    """The file's text with every generated part made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{render(match['name'])}\n{match[3]}", text)


def main() -> None:
    for name in FILES:
        path = REPO / name
        path.write_text(regenerate(path.read_text()))
        sys.stdout.write(f"{name} is up to date\n")


if __name__ == "__main__":
    main()
