"""What importing costs, which module knows which, and the budgets that keep the source readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCE = REPO / "src" / "matquant"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60
PURE = ("errors", "codes", "packing", "weight", "plan", "recipe")


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(SOURCE)) for file in files]


def loaded_by(statement: str, *watched: str) -> set[str]:
    """Which of the `watched` modules a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*[name for name in {watched!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_watch_works() -> None:
    assert loaded_by("import json", "json", "transformers") == {"json"}


def test_importing_matquant_loads_nothing_heavy() -> None:
    assert loaded_by("import matquant", "torch", "transformers", "numpy", "typer", "rich") == set()


def test_help_loads_nothing_heavy() -> None:
    statement = "from matquant.cli import main; sys.stdout = sys.stderr; assert main(['--help']) == 0; sys.stdout = sys.__stdout__"
    assert loaded_by(statement, "torch", "transformers", "numpy") == set()


@pytest.mark.parametrize("module", PURE)
def test_the_pure_core_knows_neither_transformers_nor_cuda(module: str) -> None:
    statement = f"import matquant.{module}; torch = sys.modules.get('torch'); assert torch is None or not torch.cuda.is_initialized()"
    assert loaded_by(statement, "transformers", "accelerate", "huggingface_hub", "triton", "typer") == set()


def _calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def _imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_no_pickle_no_print_no_remote_code(file: Path) -> None:
    tree = ast.parse(file.read_text())
    calls, imports = _calls(tree), _imports(tree)
    assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"} & imports
    assert not {"torch.load", "torch.save", "eval", "exec", "numpy.load", "np.load"} & calls
    assert file.is_relative_to(SOURCE / "cli") or "print" not in calls
    always = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"]
    assert not any(isinstance(node.value, ast.Constant) and node.value.value is True for node in always)


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_budgets(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_FILE, f"{file} is longer than {MAX_FILE} lines; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{file}:{node.lineno} {node.name} has {length} lines, more than {MAX_FUNCTION}"


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_every_file_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))
    assert file.name != "utils.py"


def test_annotations_stay_objects() -> None:
    """jaxtyping reads annotations when a function is defined; postponed ones would switch its checks off without a word."""
    for file in FILES:
        assert not re.search(r"^from __future__ import annotations", file.read_text(), re.M), file
