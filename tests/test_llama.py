"""What the engine serves, found by a process of its own; memory that serving takes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import build_checkpoint

from matquant import benchmark, llama
from matquant.checkpoint import Checkpoint
from matquant.engine import Engine
from matquant.errors import CheckpointError, InputError, ResourceError, UnservedError
from matquant.recipe import Recipe

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "checkpoint"
    build_checkpoint(tiny("llama-tied"), made, Recipe(method="minmax", group_size=32))
    return made


def same(a: llama.Served, b: llama.Served) -> bool:
    return a.to_json() == b.to_json() and torch.equal(a.geometry.inv_freq, b.geometry.inv_freq)


def test_a_process_of_its_own_finds_the_same_and_is_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llama.examine(folder)
    assert same(llama.Served.from_json(want.to_json()), want)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert same(llama.served(folder), want)
    assert len(list((tmp_path / "matquant").iterdir())) == 1
    monkeypatch.setattr(subprocess, "run", None)
    assert same(llama.served(folder), want)  # no process
    monkeypatch.setattr(llama, "version", lambda name: "another")
    with pytest.raises(TypeError):
        llama.served(folder)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (10, UnservedError, "has other parts"),
        (11, InputError, "has other parts"),
        (-9, ResourceError, r"the process that examines .* ended with -9 \(has other parts\); is there enough memory\?"),
    ],
)
def test_what_the_process_refuses(
    code: int, error: type[Exception], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, "", "warning\nhas other parts\n"))
    with pytest.raises(error, match=message) as caught:
        llama.served(folder)
    assert type(caught.value) is error and not list(tmp_path.iterdir())


def test_the_process_says_why_it_refuses(folder: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama.main(str(tiny("gpt2"))) == 10
    assert capsys.readouterr().err.endswith(
        "the engine serves models of Llama's shape, and GPT2LMHeadModel has other parts; use matquant.from_pretrained\n"
    )
    assert llama.main(str(tmp_path)) == 11
    assert "cannot be built from its config.json" in capsys.readouterr().err
    assert llama.main(str(folder)) == 0
    assert same(llama.Served.from_json(capsys.readouterr().out), llama.examine(folder))


def test_rows_are_those_of_the_file(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.index:
        whole = checkpoint.tensor(name)
        assert torch.equal(checkpoint.rows(name), whole) and torch.equal(checkpoint.rows(name, 1, 3), whole[1:3])
    short = tmp_path / "short"
    short.mkdir()
    for file in folder.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    opened = Checkpoint.open(short, checksums=False)
    victim = short / opened.index["model.embed_tokens.weight"]
    length = int.from_bytes(victim.read_bytes()[:8], "little")
    os.truncate(victim, 8 + length + 100)
    with pytest.raises(CheckpointError, match="cannot read model.embed_tokens.weight: the file ends after"):
        opened.rows("model.embed_tokens.weight")


@pytest.mark.skipif(benchmark.own_peak() is None, reason="this system does not tell a process its peak memory")
def test_serving_takes_weights_and_little_more(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most r-bit weights, metadata and cache + 300 MB; torch alone takes most of that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peak, engine = benchmark.peak_memory(folder, 3, 16, 8, threads=1), Engine.open(folder, 3)
    cache = sum(part.nbytes for part in (engine.stepper.cache(1, 24).keys, engine.stepper.cache(1, 24).values))
    assert peak is not None and engine.read_bytes(3) < peak < engine.read_bytes(3) + cache + 300e6
    with pytest.raises(ResourceError, match="a process that serves .* at 5 bits ended with 1"):
        benchmark.peak_memory(folder, 5, 16, 8, threads=1)
