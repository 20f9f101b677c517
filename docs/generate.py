"""Rewrite the generated parts of README.md and docs/CLI.md: `make docs`. tests/test_docs.py fails where they are out of date.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. NAME is `flags COMMAND` (from the command line
itself), `exit codes` (from errors.py), `results` (from benchmarks/results/readme.json: {"caption", "rows"}, rows as
`matquant eval --json` prints them), or `quality MODEL` (from benchmarks/results/quality-MODEL.json, benchmarks/quality.py).
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from matquant import errors
from matquant.cli import BUG, INTERRUPTED, application
from matquant.evaluate import Row
from matquant.report import quality_rows

REPO = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/CLI.md", "docs/RESULTS.md")
RESULTS = REPO / "benchmarks" / "results" / "readme.json"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.S)


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def quality(model: str) -> str:
    """KL, perplexity, top-1 and bits per weight of every variant at every width, with the command and the setting."""
    stored = json.loads((REPO / "benchmarks" / "results" / f"quality-{model}.json").read_text())
    setting, machine, variants = stored["setting"], stored["machine"], stored["variants"]
    widths = sorted({row["bits"] for variant in variants.values() for row in variant["rows"]}, reverse=True)
    parts = [
        f"    {stored['command']}\n\nGroups of {setting['group_size']}. Calibrated on {_counts(setting['train'])} of {_text(setting['calibration'])}, "
        f"measured on {_counts(setting['held_out'])} of {_text(setting['text'])}. torch {machine['versions']['torch']}, float32, commit {machine['commit']}.\n"
    ]
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("KL to the original, nats a token", "kl", lambda value: f"{value:.4f}" if value < 0.1 else f"{value:.3f}"),
        ("perplexity", "perplexity", lambda value: f"{value:.2f}" if value < 1000 else f"{value:.0f}"),
        ("top-1 agreement with the original", "top1", lambda value: f"{value:.3f}"),
        ("bits per weight, metadata included", "bits_per_weight", lambda value: f"{value:.2f}"),
    ]
    for title, key, text in measures:
        rows = [line for name in QUALITY_ORDER if name in variants for line in _quality_lines(variants[name], widths, key, text)]
        parts.append(f"{title}:\n\n{markdown(['', *map(str, widths)], rows)}")
    return "\n".join(parts)


QUALITY_ORDER = ("rtn", "gptq", "gptq-symmetric", "matgptq", "floor", "round", "floor-symmetric", "round-symmetric")


def _quality_lines(variant: dict[str, Any], widths: list[int], key: str, text: Callable[[float], str]) -> list[list[str]]:
    """One line without refits and one with them, where there are any; widths that have none repeat what they read."""
    plain = {row["bits"]: row[key] for row in variant["rows"] if not row["refit"]}
    refits = {row["bits"]: row[key] for row in variant["rows"] if row["refit"]}
    lines = [(variant["words"], plain)] + ([(variant["words"] + ", refit", plain | refits)] if refits else [])
    return [[words, *(text(values[bits]) for bits in widths)] for words, values in lines]


def _counts(shape: list[int]) -> str:
    return f"{shape[0]} x {shape[1]} tokens"


def _text(name: str) -> str:
    return "text sampled from the model" if name == "self" else name


def render(name: str) -> str:
    kind, _, rest = name.partition(" ")
    if kind == "flags":
        return flags(rest)
    if kind == "quality":
        return quality(rest)
    return {"exit codes": exit_codes, "results": results}[name]()


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
