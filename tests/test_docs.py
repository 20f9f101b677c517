"""Prose that can be run is run: commands parse, snippets compile, links lead somewhere, tables are those that the code makes."""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from building import build_checkpoint
from transformers import AutoModelForCausalLM

from matquant.checkpoint import Checkpoint, verify
from matquant.cli import application, commands, main
from matquant.cli.flags import flag_name
from matquant.plan import BitPlan
from matquant.recipe import Recipe

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


@pytest.fixture(scope="module")
def generator(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate.py")


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text) if found == language]


def shown_commands() -> list[tuple[str, str]]:
    """(where, command line) of every `matquant ...` in a shell block of the documents or a comment of a recipe."""
    found = [(path.name, line) for path in DOCUMENTS for code in blocks(path.read_text(), "sh") for line in code.splitlines()]
    found += [(path.name, line.lstrip("# ")) for path in RECIPES for line in path.read_text().splitlines() if line.startswith("#")]
    return [(name, line) for name, line in found if re.match(r"matquant \w", line)]


def test_there_are_commands_to_check() -> None:
    shown = {shlex.split(line)[1] for _, line in shown_commands()}
    assert shown == set(commands.COMMANDS)


@pytest.mark.parametrize(("where", "line"), shown_commands(), ids=lambda value: str(value)[:60])
def test_a_shown_command_parses(where: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(application(name)).commands[name]
    command.make_context(name, arguments)  # parses and converts, runs nothing; raises on an unknown flag or a missing argument


def test_the_page_on_plans_runs(rounded: Callable[[str], Path], tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and snippet of docs/PLANS.md, in order, in a folder with what it names: a small checkpoint, its original, a latency table."""
    text = (REPO / "docs" / "PLANS.md").read_text()
    original = shutil.copytree(tiny("llama-tied"), tmp_path / "original")
    AutoModelForCausalLM.from_pretrained(original).half().save_pretrained(original)  # else what is not quantized takes more than all the rest
    build_checkpoint(original, tmp_path / "smollm2", Recipe(method="minmax", group_size=-1))
    shapes = {(shape.out, shape.in_features) for shape in Checkpoint.open(tmp_path / "smollm2").modules.values()}
    rows = [{"out": out, "in": size, "bits": r, "seconds": 1e-4 * r} for out, size in shapes for r in (8, 6, 4, 3, 2)]
    (tmp_path / "latency.json").write_text(json.dumps({"overhead_seconds": 1e-3, "latency": rows}))
    monkeypatch.chdir(tmp_path)
    lines = [line for code in blocks(text, "sh") for line in code.splitlines()]
    assert len(lines) > 15
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "matquant" and main(arguments) == 0, line
    for code in blocks(text, "python"):
        exec(compile(code, "PLANS.md", "exec"), {})
    (shown,) = blocks(text, "json")
    BitPlan.from_json(shown).check(Checkpoint.open(tmp_path / "smollm2").modules, (8, 6, 4, 3, 2))
    assert verify(tmp_path / "smollm2") == [] and (tmp_path / "front.svg").is_file() and (tmp_path / "front.png").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_snippets_compile(path: Path) -> None:
    for code in blocks(path.read_text(), "python"):
        ast.parse(code)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    prose = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("name", ["README.md", "docs/CLI.md", "docs/GPU.md", "docs/RESULTS.md"])
def test_generated_parts_are_up_to_date(name: str, generator: ModuleType) -> None:
    text = (REPO / name).read_text()
    assert "<!-- generated:" in text
    assert generator.regenerate(text) == text, f"{name} is out of date; run `make docs`"


def test_other_packages_are_compared_at_their_width_or_with_our_widest(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(bits: int, words: str, rate: float) -> dict[str, Any]:
        rates = {"decode": rate, "prefill": rate}
        return {"bits": bits, "words": words, "read_bytes": 1, "median": rates, "best": rates}

    runs = {"a": run(8, "matquant", 20), "b": run(4, "matquant", 40), "c": run(4, "OpenVINO", 16), "d": run(16, "torch", 8)}
    stored = {
        "setting": {"name": "", "threads": 2, "rounds": 1, "prompt_tokens": 8, "new_tokens": 4},
        "command": "",
        "probe_gb_s": [1.0],
        "runs": runs,
    }
    machine = {"processor": "", "isa": "", "llama.cpp": "", "packages": {"openvino-4": {"openvino": "1.2"}}}
    serving = generator.serving
    monkeypatch.setitem(serving.__globals__, "load", lambda model, kind: stored | {"machine": machine, "skipped": {"torchao-4": "not there"}})
    text = serving("any")
    shown = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines() if line.startswith("| ")][2:]
    assert shown == [
        ["16", "torch", "8.0 (8.0)", "2.50"],
        ["8", "matquant", "20 (20)", ""],
        ["4", "matquant", "40 (40)", ""],
        ["4", "OpenVINO", "16 (16)", "2.50"],
    ]
    assert "openvino 1.2" in text and "torchao-4 (not there)" in text


def test_the_manual_has_every_command_and_every_recipe_flag() -> None:
    text = (REPO / "docs" / "CLI.md").read_text()
    for name in commands.COMMANDS:
        assert f"<!-- generated: flags {name} -->" in text
    for name in Recipe.__dataclass_fields__:
        assert f"`{flag_name(name)}`" in text


def test_readme_names_the_two_commands_first() -> None:
    lines = [line.strip() for line in (REPO / "README.md").read_text().splitlines() if line.strip()]
    assert [line.split("#")[0].strip() for line in lines[1:3]] == ["make demo", "make test"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    Recipe.load(path)
    assert f"--recipe recipes/{path.name}" in path.read_text()
