"""benchmarks/random_checkpoint.py makes sound checkpoints that the engine reads at every width."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from matquant import checkpoint
from matquant.engine import Engine


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/random_checkpoint.py")


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_checkpoint(script: ModuleType, tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    script.main([str(folder), "--shape", "60,100,2,3,1,50", "--group-size", "20", *(["--tied"] if tied else [])])
    assert checkpoint.verify(folder) == []
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    engine, ids = Engine.open(folder), torch.tensor([1, 7, 4])
    logits = {bits: engine.set_bits(bits) or engine.logits(ids) for bits in (8, 6, 4, 3, 2)}
    size = logits[8].norm()
    assert all(bool(torch.isfinite(found).all()) for found in logits.values())
    assert 0 < (logits[6] - logits[8]).norm() < (logits[4] - logits[8]).norm() < (logits[2] - logits[8]).norm() < 2 * size


def test_equal_arguments_give_equal_bytes(script: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        script.write_random(tmp_path / name, script.Llama(32, 64, 1, 2, 1, 40), 32, seed=5)
    assert (tmp_path / "a" / "MANIFEST.json").read_bytes() == (tmp_path / "b" / "MANIFEST.json").read_bytes()


def test_a_dense_folder_has_the_same_shape(script: ModuleType, tmp_path: Path) -> None:
    script.main([str(tmp_path), "--shape", "60,100,2,3,1,50", "--tied", "--dense"])
    wanted = script.Llama(60, 100, 2, 3, 1, 50, tied=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert found == wanted.base | {f"{name}.weight": (shape.out, shape.in_features) for name, shape in wanted.modules.items()}
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
