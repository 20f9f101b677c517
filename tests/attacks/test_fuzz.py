"""Whatever stands in the JSON files: a checkpoint opens or a MatquantError says why not; nothing else ever happens."""

import copy
import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoint import edit_json, save

from matquant.checkpoint import Checkpoint, describe, verify
from matquant.errors import MatquantError

NAMES = ["config.json", "model.safetensors.index.json", "MANIFEST.json"]
BUDGET = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-2, 9) | st.floats() | st.text(max_size=9)
KEYS = st.text(max_size=9) | st.sampled_from(
    ["quant_method", "format_version", "modules", "widths", "weight_map", "files", "size", "..", "\ud800", "\0"]
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    save(folder)
    return folder


def survives(folder: Path, name: str, content: bytes) -> None:
    sane = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        for checksums in (True, False):
            with suppress(MatquantError):
                checkpoint = Checkpoint.open(folder, checksums=checksums)
                for module in checkpoint.modules:
                    checkpoint.read(module)
                dict(checkpoint.base)
        with suppress(MatquantError):
            describe(folder)
        verify(folder)
    finally:
        (folder / name).write_bytes(sane)


@pytest.mark.parametrize("name", NAMES)
@BUDGET
@given(content=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_content(folder: Path, name: str, content: bytes) -> None:
    survives(folder, name, content)


@pytest.mark.parametrize("name", NAMES)
@BUDGET
@given(data=st.data())
def test_a_sound_file_with_one_place_replaced(folder: Path, name: str, data: st.DataObject) -> None:
    whole = json.loads((folder / name).read_text())
    spot: Any = whole
    while isinstance(spot, dict) and spot:
        key = data.draw(st.sampled_from(sorted(spot)))
        if not isinstance(spot[key], dict) or not spot[key] or data.draw(st.booleans()):
            match data.draw(st.sampled_from(["replace", "remove", "rename", "add"])):
                case "replace":
                    spot[key] = data.draw(VALUES)
                case "remove":
                    del spot[key]
                case "rename":
                    spot[data.draw(KEYS)] = spot.pop(key)
                case _:
                    spot[data.draw(KEYS)] = copy.copy(spot[key])
            break
        spot = spot[key]
    survives(folder, name, json.dumps(whole, indent=1, sort_keys=True).encode())


@BUDGET
@given(recipe=st.dictionaries(st.sampled_from(["bits", "targets", "seed", "group_size", "skip", "damping", "slicing", "x"]), VALUES, max_size=5))
def test_any_recipe(folder: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    """A recipe with a right hash, so that it reaches the recipe's own parser."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out/MANIFEST.json").unlink()
    recipe = json.loads(json.dumps(recipe))
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    edit_json(tmp_path / "out/config.json", lambda config: config["quantization_config"].update(recipe=recipe, recipe_hash=digest))
    with suppress(MatquantError):  # such as NaN, which is not JSON
        found = describe(tmp_path / "out").recipe
        assert found is None or found.hash
