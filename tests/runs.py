"""What the tests of whole runs share: small recipes and what a folder holds."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from matquant.pipeline import RunOptions
from matquant.recipe import Recipe

IDS = (torch.arange(2 * 24).reshape(2, 24) * 31 + 7) % 250
SMALL = Recipe(group_size=32, parent_bits=3, bits=(3, 2), targets={3: 2.0, 2: 1.0}, clip_search=False, num_samples=2, seq_len=16, eval_samples=1)
FAST = replace(SMALL, method="minmax", refit_bits=0, eval_samples=0)
RESUME, OVERWRITE = RunOptions(resume=True), RunOptions(overwrite=True)
Tiny = Callable[[str], Path]
Edited = Callable[..., Path]


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@dataclass
class Lines:
    """Progress that remembers."""

    stages: list[tuple[str, int, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __call__(self, stage: str, done: int, of: int) -> None:
        self.stages.append((stage, done, of))

    def line(self, text: str) -> None:
        self.lines.append(text)


class Crash(BaseException):
    """As SIGINT would: not an Exception."""


def crash_at(module: Any, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the `number`-th call of module.name raise."""
    calls, original = count(1), getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)
