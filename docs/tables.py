"""What the generated parts share: stored results and their words."""

import json
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
