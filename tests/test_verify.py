"""Every way to be a wrong checkpoint that docs/FORMAT.md names has its error here, from `open`, `read` and `verify`.

Each case is resealed (MANIFEST.json written anew), so that it is the structure that is refused and not the sha256.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import RECIPE, SHAPES, edit_json, reads_right, reseal, save

from matquant.checkpoint import Checkpoint, verify
from matquant.checkpoint.files import MAX_BYTES
from matquant.errors import CheckpointError, InputError
from matquant.recipe import Recipe

DOWN, Q = SHAPES
BASE, PLANE3, PLANE7 = (f"model-{label}-00001-of-00001.safetensors" for label in ("base", "plane3", "plane7"))
INDEX = "model.safetensors.index.json"
NARROW = Recipe(group_size=4, parent_bits=3, bits=(3, 2), targets={3: 1})


Damage = Callable[[Path], object]


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Damage that changes the tensors of one file."""

    def apply(folder: Path) -> None:
        held = load_file(folder / file)
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / file)

    return apply


def config(**changes: Any) -> Damage:
    """Damage that changes keys of quantization_config."""
    return lambda folder: edit_json(folder / "config.json", lambda data: data["quantization_config"].update(changes))


def dropped(key: str) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda data: data["quantization_config"].pop(key))


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    """Damage that changes the index's weight_map."""
    return lambda folder: edit_json(folder / INDEX, lambda data: change(data["weight_map"]))


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def text(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def link(file: str, target: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return apply


def put(name: str, value: float, place: tuple[int, ...] = (0, 0)) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held[name].__setitem__(place, value)


def resize(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held.update({name: torch.ones(shape, dtype=dtype)})


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


STRUCTURE: dict[str, tuple[Damage, str]] = {
    "unknown version": (config(format_version=3), "format_version is 3; this matquant reads versions 1 and 2; install a newer matquant"),
    "version of another type": (config(format_version=True), "format_version is True"),
    "no version": (dropped("format_version"), "format_version is None"),
    "parent_bits as text": (config(parent_bits="8"), "parent_bits is '8'; it must be of type int"),
    "parent_bits out of range": (config(parent_bits=9), "parent_bits is 9; allowed: 2 to 8"),
    "symmetric as a number": (config(symmetric=1), "symmetric is 1; it must be of type bool"),
    "group size that divides nothing": (config(group_size=5), "group_size 5 does not divide"),
    "group size 0": (config(group_size=0), "group_size is 0"),
    "unknown slicing": (config(slicing="flor"), r"slicing is 'flor'; choose from floor, round, round-overflow \(did you mean floor\?\)"),
    "unknown scale_dtype": (config(scale_dtype="float8"), "scale_dtype is 'float8'; choose from"),
    "overlap without floor": (config(overlap=True, slicing="round"), "overlap needs slicing floor"),
    "width above the parent": (config(widths=[9, 8, 6, 4, 3, 2]), "cannot read 9 bits"),
    "widths not descending": (config(widths=[2, 3, 4, 6, 8]), "must be a descending list of widths"),
    "no widths": (config(widths=[], refit_widths=[]), "must hold bits"),
    "refit of a width not offered": (config(refit_widths=[5]), r"every one of refit_widths \[5\]"),
    "default not offered": (config(bits=7), r"must hold bits \(7\)"),
    "no modules": (config(modules={}), "modules must map each quantized module"),
    "modules with a negative size": (config(modules={DOWN: -24, Q: 12}), "modules must map each quantized module"),
    "a module more": (config(modules={DOWN: 24, Q: 12, "x": 4}), "tensor 'x.weight' is missing"),
    "modules_to_not_convert as text": (config(modules_to_not_convert="lm_head"), "must be a list of names"),
    "another recipe": (config(recipe={"seed": 1}), "recipe_hash is not the hash of recipe"),
    "no recipe but its hash": (dropped("recipe"), "recipe_hash is not the hash"),
    "other input channels": (config(modules={DOWN: 24, Q: 20}), r"q_proj.weight is U8 \[2, 6, 2\]; 20 input channels ask for U8 \[2, 6, 3\]"),
    "refits not declared": (config(refit_widths=[4, 3]), "extra tensor '.*scale.2'"),
    "zeros declared": (config(symmetric=False), "zero' is missing"),
    "tensor missing": (tensors(PLANE3, lambda t: t.pop(f"{Q}.plane.3")), r"q_proj.plane.3' is missing from model-plane3"),
    "tensor missing, index too": (
        both(tensors(PLANE3, lambda t: t.pop(f"{Q}.plane.3")), index(lambda m: m.pop(f"{Q}.plane.3"))),
        r"tensor '.*q_proj.plane.3' is missing \(1 missing in all\); every module must have the same planes",
    ),
    "base tensor missing": (tensors(BASE, lambda t: t.pop("model.norm.weight")), "tensor 'model.norm.weight' is missing from model-base"),
    "tensor extra": (tensors(PLANE3, resize("spare", (1,), torch.uint8)), "holds tensor 'spare', which .* does not list"),
    "tensor extra, index too": (
        both(tensors(PLANE3, resize(f"{Q}.plane.8", (6, 2), torch.uint8)), index(lambda m: m.update({f"{Q}.plane.8": PLANE3}))),
        "extra tensor '.*q_proj.plane.8': module '.*q_proj' of this checkpoint has weight, scale, plane.2",
    ),
    "tensor with a name below a reserved one": (
        both(tensors(BASE, resize(f"{Q}.weight.x", (1,), torch.uint8)), index(lambda m: m.update({f"{Q}.weight.x": BASE}))),
        "extra tensor '.*weight.x'",
    ),
    "tensor in two files": (tensors(PLANE7, resize(f"{Q}.plane.3", (6, 2), torch.uint8)), "a duplicate or a misplaced tensor"),
    "index entry of another file": (index(lambda m: m.update({f"{Q}.plane.3": PLANE7})), "a duplicate or a misplaced tensor"),
    "wrong dtype of a plane": (
        tensors(PLANE3, resize(f"{Q}.plane.3", (6, 2), torch.int8)),
        r"plane.3 is I8 \[6, 2\]; 12 input channels ask for U8 \[6, 2\]",
    ),
    "wrong shape of a plane": (tensors(PLANE3, resize(f"{Q}.plane.3", (6, 3), torch.uint8)), r"plane.3 is U8 \[6, 3\]"),
    "wrong shape of the weight": (tensors(BASE, resize(f"{Q}.weight", (12, 2), torch.uint8)), r"weight is U8 \[12, 2\]"),
    "empty weight": (tensors(BASE, resize(f"{Q}.weight", (2, 0, 2), torch.uint8)), r"weight is U8 \[2, 0, 2\]"),
    "wrong dtype of a scale": (tensors(BASE, resize(f"{Q}.scale", (6, 3), torch.float32)), r"scale is F32 \[6, 3\]; .* ask for F16"),
    "wrong shape of a refit": (tensors(BASE, resize(f"{Q}.zero.2", (6, 1), torch.uint8)), r"zero.2 is U8 \[6, 1\]"),
    "wrong dtype of a refit": (tensors(BASE, resize(f"{Q}.scale.2", (6, 3), torch.float16)), r"scale.2 is F16 \[6, 3\]; .* ask for U8 \[6, 3\]"),
    "zeros as numbers with a point": (
        both(
            config(symmetric=False),
            tensors(BASE, lambda t: t.update({f"{DOWN}.zero": torch.ones(5, 6).half(), f"{Q}.zero": torch.ones(6, 3).half()})),
            index(lambda m: m.update({f"{DOWN}.zero": BASE, f"{Q}.zero": BASE})),
        ),
        r"zero is F16 \[5, 6\]; .* ask for U8 \[5, 6\]",
    ),
    "base file missing": (lambda folder: (folder / BASE).unlink(), "model-base.* is missing, which holds"),
    "index outside the folder": (
        index(lambda m: m.update({"model.norm.weight": "../other.safetensors"})),
        "puts 'model.norm.weight' into '../other.safetensors'",
    ),
    "index with an absolute path": (index(lambda m: m.update({"model.norm.weight": "/etc/passwd"})), "puts 'model.norm.weight' into '/etc/passwd'"),
    "index into a subfolder": (
        index(lambda m: m.update({"model.norm.weight": "sub/x.safetensors"})),
        "names of .safetensors files in the same folder",
    ),
    "index names a pickle": (
        index(lambda m: m.update({"model.norm.weight": "pytorch_model.bin"})),
        "into 'pytorch_model.bin'; allowed: names of .safetensors",
    ),
    "index with a number": (index(lambda m: m.update({"model.norm.weight": 1})), "puts 'model.norm.weight' into 1"),
    "index without weight_map": (text(INDEX, b"{}"), "must have a weight_map"),
    "link out of the folder": (link(PLANE7, "/etc/hostname"), "is a link out of the checkpoint, to /etc/hostname; copy the file"),
    "link to itself": (link(PLANE7, PLANE7), "cannot be followed|is a link"),
    "config.json linked out": (link("config.json", "/etc/hostname"), "is a link out of the checkpoint"),
    "a fifo": (lambda folder: ((folder / PLANE7).unlink(), os.mkfifo(folder / PLANE7)), "is not a regular file"),
    "a folder for a file": (lambda folder: ((folder / PLANE7).unlink(), (folder / PLANE7).mkdir()), "is not a regular file"),
    "pickle by content": (text(PLANE7, pickle.dumps({"a": 1})), "not a safetensors file .*: it is a pickle file, which is never opened"),
    "torch pickle by content": (lambda folder: torch.save({}, folder / PLANE7), "it is a pickle file, which is never opened"),
    "not safetensors": (text(PLANE7, b"\xff" * 100), "not a safetensors file .*: it is damaged or half-fetched"),
    "empty weight file": (lambda folder: (folder / PLANE7).write_bytes(b""), "not a safetensors file"),
    "weight file that the index does not list": (
        lambda folder: rename(folder, "README.md", "adapter.safetensors"),
        "holds adapter.safetensors, which",
    ),
    "two sets of weights": (lambda folder: shutil.copy(folder / BASE, folder / "model.safetensors"), "has both model.safetensors and"),
    "no index": (lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")], r"has neither .* \(nothing to read\)"),
    "a pickle instead": (
        lambda folder: ([path.unlink() for path in folder.glob("*.safetensors*")], torch.save({}, folder / "pytorch_model.bin")),
        r"has neither .*pytorch_model.bin may be pickle files, which are never opened",
    ),
    "config not JSON": (text("config.json", b"{"), "config.json is not valid JSON"),
    "config not UTF-8": (text("config.json", b"\xff{}"), "config.json is not valid JSON"),
    "config a list": (text("config.json", b"[]"), "must hold a JSON object, not list"),
    "config nested deeply": (text("config.json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "is nested too deeply"),
    "config with NaN": (text("config.json", b'{"a": NaN}'), "NaN is not JSON"),
    "config with a key twice": (text("config.json", b'{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    "config with a number too long": (text("config.json", b'{"a": ' + b"9" * 10_000 + b"}"), "config.json is not valid JSON"),
    "config too large": (text("config.json", b" " * (MAX_BYTES["config.json"] + 1)), "is longer than 4194304 bytes"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_open_and_verify_refuse_a_wrong_structure(tmp_path: Path, case: str) -> None:
    damage, message = STRUCTURE[case]
    folder = tmp_path / "out"
    save(folder)
    damage(folder)
    reseal(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)
    problems = verify(folder)
    assert any(re.search(message, problem) for problem in problems), problems


VALUES: dict[str, tuple[Recipe, Damage, str, int]] = {
    "scale NaN": (RECIPE, tensors(BASE, put(f"{Q}.scale", float("nan"))), "scale is not finite everywhere", 8),
    "scale infinite": (RECIPE, tensors(BASE, put(f"{Q}.scale", float("inf"))), "scale is not finite everywhere", 8),
    "scale zero": (RECIPE, tensors(BASE, put(f"{Q}.scale", 0)), "scale is not positive everywhere", 8),
    "scale negative": (RECIPE, tensors(BASE, put(f"{Q}.scale", -1)), "scale is not positive everywhere", 8),
    "refit scale zero": (RECIPE, tensors(BASE, put(f"{Q}.scale.2", 0)), "scale.2 is not positive everywhere", 2),
    "refit scale zero in a plane file": (RECIPE, tensors(PLANE3, put(f"{Q}.scale.4", 0)), "scale.4 is not positive everywhere", 4),
    "zero too large": (NARROW, tensors(BASE, put(f"{Q}.zero", 8)), "zero exceeds 7, the largest code", 3),
    "padding in plane 1": (RECIPE, tensors(BASE, put(f"{Q}.weight", 0x10, (1, 5, 1))), "weight has padding bits that are not zero", 8),
    "padding in plane 7": (RECIPE, tensors(PLANE7, put(f"{Q}.plane.7", 0x80, (0, 1))), "plane.7 has padding bits that are not zero", 8),
}


@pytest.mark.parametrize("case", VALUES)
def test_read_and_verify_refuse_wrong_values(tmp_path: Path, case: str) -> None:
    recipe, damage, message, bits = VALUES[case]
    save(tmp_path / "out", recipe)
    damage(tmp_path / "out")
    reseal(tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    for width in (bits, None):
        with pytest.raises(CheckpointError, match=message + ".*; the checkpoint is damaged"):
            checkpoint.read(Q, width)
    assert len(problems := verify(tmp_path / "out")) == 1 and message in problems[0]


FILES: dict[str, tuple[Damage, str]] = {
    "a changed file": (lambda f: (f / "README.md").write_bytes(b"# Small\n"), "README.md differs from its sha256"),
    "a longer file": (lambda f: (f / "README.md").write_bytes(b"# smaller\n"), "README.md has 10 bytes, but MANIFEST.json says 8"),
    "a missing file": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "an extra file": (lambda f: (f / "notes.txt").write_bytes(b"x"), "notes.txt is not listed in MANIFEST.json"),
    "an extra file in a subfolder": (lambda f: (f / "plans/notes.txt").write_bytes(b"x"), "notes.txt is not listed"),
    "an extra pickle": (lambda f: (f / "optimizer.pt").write_bytes(b"x"), "optimizer.pt may be a pickle file"),
    "a linked folder": (lambda f: (f / "sub").symlink_to("/etc"), "is a link out of the checkpoint"),
    "no MANIFEST": (lambda f: (f / "MANIFEST.json").unlink(), "has no MANIFEST.json, so damaged bytes cannot be found"),
    "MANIFEST of another version": (lambda f: edit_json(f / "MANIFEST.json", lambda m: m.update(version=2)), 'must have "version": 1'),
    "MANIFEST spelt otherwise": (lambda f: edit_json(f / "MANIFEST.json", lambda m: None), "its digest or spelling is wrong"),
    "MANIFEST with a path outside": (
        lambda f: edit_json(f / "MANIFEST.json", lambda m: m["files"].update({"../x": {"sha256": "", "size": 0}})),
        "has a bad entry for '../x'",
    ),
    "a plan for an unknown layer": (
        lambda f: (f / "plans/mixed.json").write_text('{"default": 4, "layers": {"x": 4}}'),
        "mixed.json, line 1: the plan names layer 'x'",
    ),
    "a plan for an unknown width": (lambda f: (f / "plans/mixed.json").write_text('{"default": 5}'), "the plan gives default 5 bits"),
    "a plan that is no plan": (lambda f: (f / "plans/mixed.json").write_text("["), "mixed.json, line 1"),
    "a plan too large": (lambda f: (f / "plans/mixed.json").write_text(" " * 2**22 + "{}"), "is longer than 4194304 bytes"),
}


@pytest.mark.parametrize("case", FILES)
def test_verify_compares_every_file(tmp_path: Path, case: str) -> None:
    damage, message = FILES[case]
    save(tmp_path / "out")
    damage(tmp_path / "out")
    assert any(message in problem for problem in verify(tmp_path / "out")), verify(tmp_path / "out")


def test_verify_lists_every_problem_and_not_only_the_first(tmp_path: Path) -> None:
    save(tmp_path / "out")
    tensors(BASE, put(f"{Q}.scale", 0))(tmp_path / "out")
    (tmp_path / "out/README.md").write_bytes(b"")
    (tmp_path / "out/x").touch()
    assert len(verify(tmp_path / "out")) == 4  # README.md, x, the base file, the scale


def test_edited_on_purpose(tmp_path: Path) -> None:
    """A changed config.json is refused with the way out; the README may change without stopping a reader."""
    weights = save(tmp_path / "out")
    (tmp_path / "out/README.md").write_bytes(b"edited on the Hub")
    (tmp_path / "out/.gitattributes").touch()
    assert reads_right(Checkpoint.open(tmp_path / "out"), weights)
    assert len(verify(tmp_path / "out")) == 1
    edit_json(tmp_path / "out/config.json", lambda data: data.update(use_cache=True))
    with pytest.raises(CheckpointError, match=r"config.json differs from its sha256 .*delete MANIFEST.json if the edit was meant"):
        Checkpoint.open(tmp_path / "out")
    (tmp_path / "out/MANIFEST.json").unlink()
    assert reads_right(Checkpoint.open(tmp_path / "out"), weights)


@pytest.mark.parametrize("name", ["config.json", INDEX, "MANIFEST.json", "tokenizer.json", "plans/mixed.json"])
def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save(tmp_path / "out")
    really = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == tmp_path / "out" / name:
            raise PermissionError(13, "Permission denied", str(self))
        return really(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert any("Permission denied" in problem for problem in verify(tmp_path / "out"))
    if name in ("config.json", INDEX, "MANIFEST.json"):
        with pytest.raises(CheckpointError, match=f"cannot read .*{name}: Permission denied"):
            Checkpoint.open(tmp_path / "out")


def test_the_index_of_a_checkpoint_without_its_quantization_config(tmp_path: Path) -> None:
    save(tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    reseal(tmp_path / "out")
    with pytest.raises(InputError, match="describes no matquant checkpoint"):
        Checkpoint.open(tmp_path / "out")
    assert any("describes no matquant checkpoint" in problem for problem in verify(tmp_path / "out"))
