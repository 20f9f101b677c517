"""The format: a folder built by hand from docs/FORMAT.md, round trips, laziness in bytes, partial folders, writing."""

import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from small_checkpoint import FILES, RECIPE, SHAPES, content, edit_json, nested, reads_right, reseal, same, save

from matquant.checkpoint import Checkpoint, describe, module_tensors, quantization_config, verify, write, writing
from matquant.errors import CheckpointError, InputError, MissingPlanesError, PlanError, RecipeError, ResourceError
from matquant.plan import Shape
from matquant.recipe import Recipe

# --- by hand, from docs/FORMAT.md alone: no matquant code in this part -----------------------------------------------


def hand_planes(q: np.ndarray, c: int) -> np.ndarray:
    out, columns = q.shape
    planes = np.zeros((c, out, -(-columns // 8)), np.uint8)
    for i in range(c):
        for o in range(out):
            for n in range(columns):
                planes[i, o, n // 8] |= ((int(q[o, n]) >> (c - 1 - i)) & 1) << (n % 8)
    return planes


def hand_planes_needed(r: int, c: int, slicing: str) -> int:
    return r if slicing == "floor" else min(r + 1, c)


def hand_read(module: dict[str, Any], r: int, config: dict[str, Any]) -> np.ndarray:
    """Section 5 of the spec: (p, scale_r, offset_r) of one weight at a time. float64 holds every product, so that each rounds once."""
    c, slicing, q = config["parent_bits"], config["slicing"], module["q"]
    d, (out, columns) = c - r, q.shape
    size = columns if config["group_size"] == -1 else config["group_size"]
    reads = np.zeros((out, columns, 3), np.float32)
    for o in range(out):
        for n in range(columns):
            code, group = int(q[o, n]), n // size
            s = float(module["scale"][o, group])
            z = 2 ** (c - 1) if config["symmetric"] else float(module["zero"][o, group])
            bit = (code >> (d - 1)) & 1 if d else 0
            step, shift = 2**d, 0.0
            if config["overlap"] and r > 4:
                p, step, shift = (8 >> d) * (code >> 4) + ((code & 15) >> d), 2 * 2**d, 2 * ((2**d - 1) / 2 - 7.5) + 7.5
            elif slicing == "floor":
                p, shift = code >> d, (2**d - 1) / 2
            else:
                p = (code >> d) + bit
                p = min(p, 2**r - 1) if slicing == "round" else p
            if r in config["refit_widths"]:
                m, u, mid = int(module[f"scale.{r}"][o, group]) / 128, int(module[f"zero.{r}"][o, group]), (2**c - 1) / 2
                scale, offset = s * (m * step), s * (m * (shift - mid) + mid - u * 2.0 ** (c - 8))
            else:
                scale, offset = s * step, s * (shift - z)
            reads[o, n] = p, scale, offset
    return reads


def hand_build(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Section 2 to 7 of the spec. Returns the modules' codes and numbers."""
    chance, c, scale_dtype = np.random.default_rng(0), config["parent_bits"], config["scale_dtype"]
    modules: dict[str, dict[str, Any]] = {}
    families: dict[str, dict[str, np.ndarray]] = {"base": {"model.norm.weight": np.ones(3, np.float32)}}
    for name, (out, columns) in shapes.items():
        size = columns if config["group_size"] == -1 else config["group_size"]
        affine = (out, columns // size)
        module: dict[str, Any] = {"q": chance.integers(0, 2**c, (out, columns)), "scale": (chance.random(affine) + 0.1).astype(scale_dtype)}
        if not config["symmetric"]:
            module["zero"] = chance.integers(0, 2**c, affine, np.uint8)
        for r in config["refit_widths"]:
            module |= {f"scale.{r}": chance.integers(1, 256, affine, np.uint8), f"zero.{r}": chance.integers(0, 256, affine, np.uint8)}
        modules[name] = module
        planes = hand_planes(module["q"], c)
        families["base"][f"{name}.weight"] = planes[:2]
        for k in range(2, c):
            families.setdefault(f"plane{k}", {})[f"{name}.plane.{k}"] = planes[k]
        for key in module.keys() - {"q"}:
            held = hand_planes_needed(int(key.split(".")[1]), c, config["slicing"]) if "." in key else 2
            families["base" if held <= 2 else f"plane{held - 1}"][f"{name}.{key}"] = module[key]
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for label, tensors in families.items():
        file = f"model-{label}-00001-of-00001.safetensors"
        save_numpy(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    section = config | {"quant_method": "matquant", "format_version": 1, "bits": config["widths"][0]}
    section["modules"] = {name: columns for name, (_, columns) in shapes.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    files = {}
    for path in folder.iterdir():
        raw = path.read_bytes()
        files[path.name] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps({"digest": digest, "files": files, "version": 1}, indent=1, sort_keys=True) + "\n")
    return modules


# --- and opened by matquant -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, -1])
@pytest.mark.parametrize(
    ("c", "slicing", "overlap", "refits"),
    [(8, "floor", False, [3, 2]), (8, "floor", True, [8, 2]), (8, "round", False, [4, 2]), (8, "round-overflow", False, []), (4, "round", False, [4, 3]), (2, "floor", False, [2])],
)  # fmt: skip
def test_a_checkpoint_built_from_the_specification_reads_right(tmp_path, c, slicing, overlap, refits, group_size, symmetric, scale_dtype) -> None:
    """Codes, scales and offsets to the bit."""
    config = dict(parent_bits=c, slicing=slicing, overlap=overlap, group_size=group_size, symmetric=symmetric,
                  scale_dtype=scale_dtype, widths=list(range(c, 1, -1)), refit_widths=refits)  # fmt: skip
    modules = hand_build(tmp_path / "hand", config, {"a.q_proj": (3, 12), "a.down": (2, 8)})
    checkpoint = Checkpoint.open(tmp_path / "hand")
    assert checkpoint.widths == tuple(config["widths"]) and checkpoint.planes == c and list(checkpoint.base) == ["model.norm.weight"]
    for name, module in modules.items():
        assert torch.equal(checkpoint.read(name).codes, torch.from_numpy(module["q"]).to(torch.uint8))
        for r in config["widths"]:
            codes, scale, offset = torch.from_numpy(hand_read(module, r, config)).unbind(-1)
            for read in (checkpoint.read(name, r).read(r), checkpoint.read(name).read(r)):
                size = codes.shape[1] // read.scale.shape[1]
                assert torch.equal(read.codes.float(), codes)
                assert torch.equal(read.scale.repeat_interleave(size, 1), scale) and torch.equal(read.offset.repeat_interleave(size, 1), offset)
                torch.testing.assert_close(read.dense(), scale * codes + offset, rtol=1e-6, atol=1e-5)
    assert verify(tmp_path / "hand") == []


RECIPES = [
    RECIPE,
    Recipe(group_size=4, symmetric=False, scale_dtype="bfloat16"),
    Recipe(group_size=-1, slicing="round", scale_dtype="float32"),
    Recipe(group_size=12, slicing="round-overflow", refit_bits=0),
    Recipe(group_size=4, overlap=True, bits=(8, 6), targets={8: 1}),
    Recipe(group_size=4, parent_bits=3, bits=(3, 2), targets={3: 1}),
    Recipe(group_size=4, parent_bits=2, bits=(2,), targets={2: 1}, slicing="round"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.parent_bits}-{r.slicing}-{r.scale_dtype}")
@pytest.mark.parametrize("limit", [100, 2**31])
def test_what_is_written_reads_back_in_any_number_of_shards(tmp_path: Path, recipe: Recipe, limit: int) -> None:
    weights = save(tmp_path / "out", recipe, limit)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.layout == recipe.layout and checkpoint.modules == SHAPES and checkpoint.recipe == recipe and checkpoint.missing == ()
    assert checkpoint.bits == max(recipe.bits) and checkpoint.not_converted == ("lm_head",)
    assert reads_right(checkpoint, weights)
    assert all(same(checkpoint.read(name, r), weights[name], r) for name in SHAPES for r in recipe.bits)
    assert verify(tmp_path / "out") == []


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    _, tensors, config = content()
    write(tmp_path / "a", tensors, config, FILES)
    write(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(config.items())), dict(reversed(FILES.items())))
    assert (tmp_path / "a/MANIFEST.json").read_bytes() == (tmp_path / "b/MANIFEST.json").read_bytes()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").glob("*.*")} == {0o666 & (tmp_path / "a").stat().st_mode}


def test_shards_are_grouped_by_plane_and_hold_the_refits_of_the_width_they_complete(tmp_path: Path) -> None:
    def refits(folder: Path) -> dict[str, str]:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        return {tensor.split(".", 5)[-1]: file.split("-")[1] for tensor, file in index.items() if ".scale." in tensor and "q_proj" in tensor}

    save(tmp_path / "floor")
    assert refits(tmp_path / "floor") == {"scale.2": "base", "scale.3": "plane2", "scale.4": "plane3"}
    save(tmp_path / "round", dataclasses.replace(RECIPE, slicing="round"))
    assert refits(tmp_path / "round") == {"scale.2": "plane2", "scale.3": "plane3", "scale.4": "plane4"}


class Counting(Mapping[str, torch.Tensor]):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.fetched = tensors, []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.fetched.append(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_each_tensor_is_fetched_once_and_family_by_family(tmp_path: Path) -> None:
    _, tensors, config = content()
    lazy = Counting(tensors)
    write(tmp_path / "out", lazy, config, {})
    first = next(iter(tensors))  # the type checker of the tests looks at that one too
    assert sorted(set(lazy.fetched)) == sorted(tensors) and all(lazy.fetched.count(name) == 1 for name in tensors if name != first)
    kinds = [name.split(".plane.")[1] for name in lazy.fetched if ".plane." in name]
    assert kinds == sorted(kinds)


# --- laziness ---------------------------------------------------------------------------------------------------------


def resident_bytes(path: Path) -> int:
    """Bytes of the file that are in the page cache, whole pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    size, page, descriptor = path.stat().st_size, os.sysconf("SC_PAGESIZE"), os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, 1, 1, descriptor, 0)  # PROT_READ, MAP_SHARED: maps, reads nothing
        pages = (ctypes.c_ubyte * -(-size // page))()
        assert libc.mincore(address, size, pages) == 0
        libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return page * sum(flag & 1 for flag in pages)


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("checksums", [True, False])
def test_reading_r_bits_reads_nothing_of_other_planes_from_disk(tmp_path: Path, checksums: bool) -> None:
    recipe, shapes = Recipe(group_size=64), {"m.proj": Shape(256, 8192)}
    tensors = module_tensors("m.proj", nested(shapes["m.proj"], recipe, 0))
    write(tmp_path / "out", tensors, {"quantization_config": quantization_config(recipe, shapes, [])}, {})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for bits in reversed(recipe.bits):
        for path in files:
            drop_from_cache(path)
        if any(resident_bytes(path) for path in files):
            pytest.skip("this file system keeps dropped pages in memory, so reads cannot be counted")
        checkpoint = Checkpoint.open(tmp_path / "out", checksums=checksums)
        for path in files:
            drop_from_cache(path)  # what reading the headers brought in; a mapped page or two may stay
        before = {path.name: resident_bytes(path) for path in files}
        assert max(before.values()) <= 64 * 1024
        checkpoint.read("m.proj", bits)
        after = {path.name: resident_bytes(path) for path in files}
        wanted = set(checkpoint.weight_files(bits))
        assert len(wanted) == bits - 1
        assert all(after[name] >= shapes["m.proj"].weights // 8 for name in wanted)
        assert {name: after[name] - before[name] for name in after if name not in wanted and after[name] != before[name]} == {}
        del checkpoint  # unmaps, so that the next round starts cold


def test_damage_in_planes_that_a_width_does_not_need_is_not_even_looked_at(tmp_path: Path) -> None:
    weights = save(tmp_path / "out")
    name = next(iter(SHAPES))
    path = next((tmp_path / "out").glob("model-plane3-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert same(checkpoint.read(name, 3), weights[name], 3)
    for attempt in (lambda: checkpoint.read(name, 4), lambda: checkpoint.read(name), lambda: checkpoint.check_files(3, 6)):
        with pytest.raises(CheckpointError, match=r"plane3.*differs from its sha256"):
            attempt()
    checkpoint.check_files(3)
    Checkpoint.open(tmp_path / "out", checksums=False).read(name, 4)  # trusted on request


# --- partial folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slicing", ["floor", "round"])
def test_base_and_the_first_planes_are_a_valid_checkpoint(tmp_path: Path, slicing: Any) -> None:
    recipe = dataclasses.replace(RECIPE, slicing=slicing)
    weights = save(tmp_path / "full", recipe)
    extra = 0 if slicing == "floor" else 1
    full = Checkpoint.open(tmp_path / "full")
    for bits in (2, 3, 4, 6):
        part = tmp_path / f"part{bits}"
        for name in full.files_for(bits):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "full" / name, part / name)
        checkpoint = Checkpoint.open(part)
        assert verify(part) == [] and checkpoint.planes == bits + extra and checkpoint.widths == tuple(r for r in recipe.bits if r <= bits)
        assert sum(path.stat().st_size for path in part.rglob("*") if path.is_file()) == full.bytes_for(bits) == checkpoint.bytes_for(bits)
        assert reads_right(checkpoint, weights)
        assert all(same(checkpoint.read(name), weights[name], bits) for name in SHAPES)
        lost = f"model-plane{bits + extra}-00001-of-00001.safetensors"
        with pytest.raises(MissingPlanesError, match=f"8 bits need planes 0-7, but .* has only 0-{bits + extra - 1}; fetch {lost}"):
            checkpoint.read(next(iter(SHAPES)), 8)
        with pytest.raises(MissingPlanesError, match=lost):
            checkpoint.check_files(8)
        with pytest.raises(MissingPlanesError, match=f"is in {lost}, which is not in"):
            checkpoint.tensor(f"{next(iter(SHAPES))}.plane.{bits + extra}")


def test_a_gap_ends_what_can_be_read(tmp_path: Path) -> None:
    save(tmp_path / "out", max_shard_bytes=1)
    next((tmp_path / "out").glob("model-plane3-00001*")).unlink()  # one shard of plane 3; the rest and planes 4-7 stay
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.planes == 3 and checkpoint.widths == (3, 2)
    problems = verify(tmp_path / "out")
    assert len(problems) == 5 + 2 * 4 and all("is of no use without model-plane3-00001" in problem for problem in problems)


def test_a_folder_that_another_program_saved_opens_without_index_and_manifest(tmp_path: Path) -> None:
    """As transformers' save_pretrained writes it: one file, any order; here also with the first four planes only."""
    weights, tensors, config = content()
    held = {name: tensor.clone() for name, tensor in tensors.items() if not any(f".plane.{k}" in name for k in range(4, 8))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(held, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.planes == 4 and checkpoint.widths == (4, 3, 2) and reads_right(checkpoint, weights)
    with pytest.raises(MissingPlanesError, match="saved without them"):
        checkpoint.check_widths(8)
    assert len(problems := verify(tmp_path)) == 1 and "has no MANIFEST.json" in problems[0]
    assert describe(tmp_path).file_bytes.keys() == {4, 3, 2}
    assert checkpoint.files_for(2) == ["config.json", "model.safetensors"]


def test_links_of_the_hub_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    weights = save(tmp_path / "out")
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    shutil.copytree(tmp_path / "out", blobs)
    (snapshot / "plans").mkdir(parents=True)
    for path in blobs.rglob("*.*"):
        (snapshot / path.relative_to(blobs)).symlink_to(path)
    assert verify(snapshot) == [] and reads_right(Checkpoint.open(snapshot), weights)
    link = snapshot / "model-plane7-00001-of-00001.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "out" / link.name)
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint"):
        Checkpoint.open(snapshot)


# --- what is offered --------------------------------------------------------------------------------------------------


def test_describe_says_what_inspect_needs(tmp_path: Path) -> None:
    save(tmp_path / "out")
    for path in (tmp_path / "out").glob("model-plane[4567]*"):
        path.unlink()
    found = describe(tmp_path / "out")
    assert (found.planes, found.widths, found.bits, len(found.missing)) == (4, (4, 3, 2), 8, 4)
    assert found.parameters == 7 * 3 + 3 + 5 * 24 + 6 * 12 and found.quantized == 5 * 24 + 6 * 12
    assert found.plans == ("plans/mixed.json",) and found.recipe == RECIPE and "matquant" in found.versions
    assert list(found.file_bytes) == [8, 6, 4, 3, 2] and list(found.file_bytes.values()) == sorted(found.file_bytes.values(), reverse=True)
    assert found.bits_per_weight(8) == 8 + 16 / 4 and found.bits_per_weight(2) == 2 + 2 * 16 / 4
    edit_json(tmp_path / "out/config.json", lambda c: [c["quantization_config"].pop(key) for key in ("recipe", "recipe_hash", "versions")])
    reseal(tmp_path / "out")
    assert describe(tmp_path / "out").recipe is None and describe(tmp_path / "out").versions == {}


def test_unknown_names_and_widths(tmp_path: Path) -> None:
    save(tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    with pytest.raises(PlanError, match="does not offer 5 bits; choose from 8, 6, 4, 3, 2"):
        checkpoint.read(next(iter(SHAPES)), 5)
    with pytest.raises(InputError, match=r"no quantized module 'model.layers.0.mlp.down_prj'; did you mean model.layers.0.mlp.down_proj"):
        checkpoint.read("model.layers.0.mlp.down_prj")
    with pytest.raises(InputError, match="see matquant inspect"):
        checkpoint.read("x")
    with pytest.raises(KeyError):
        checkpoint.base["model.layers.0.mlp.down_proj.weight"]
    assert len(checkpoint.base) == 2 and checkpoint.base_shapes == {"model.embed_tokens.weight": (7, 3), "model.norm.weight": (3,)}


def test_a_read_that_fails_has_a_name(tmp_path: Path) -> None:
    save(tmp_path / "out")

    class Broken:
        def get_tensor(self, name: str) -> None:
            raise OSError("Input/output error")

    checkpoint = Checkpoint.open(tmp_path / "out")
    checkpoint = dataclasses.replace(checkpoint, _handles=dict.fromkeys(checkpoint._handles, Broken()))
    with pytest.raises(CheckpointError, match=r"model-base.*: cannot read model.norm.weight: Input/output error"):
        checkpoint.tensor("model.norm.weight")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for attempt in (Checkpoint.open, verify):
        with pytest.raises(InputError, match="is not a folder"):
            attempt(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="describes no matquant checkpoint; quantize the model first"):
        Checkpoint.open(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    _, tensors, config = content()
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already; choose another output folder"):
        write(tmp_path / "there", tensors, config, {})
    for name in ("../x", "config.json", "MANIFEST.json", "x.safetensors", "pytorch_model.bin", ".hidden", "/etc/x", "a//b", ""):
        with pytest.raises(InputError, match="cannot put the file"):
            write(tmp_path / "out", tensors, config, {name: b""})
    with pytest.raises(InputError, match=r"config.json cannot be written as JSON"):
        write(tmp_path / "out", tensors, config | {"x": float("nan")}, {})
    with pytest.raises(InputError, match=r"config.json would have \d+ bytes; readers accept 4194304"):
        write(tmp_path / "out", tensors, config | {"x": "a" * 2**22}, {})
    with pytest.raises(CheckpointError, match=r"down_proj.plane.5' is missing"):
        write(tmp_path / "out", {name: t for name, t in tensors.items() if not name.endswith("down_proj.plane.5")}, config, {})
    with pytest.raises(CheckpointError, match="extra tensor"):
        write(tmp_path / "out", tensors | {f"{next(iter(SHAPES))}.plane.8": torch.zeros(1)}, config, {})
    with pytest.raises(InputError, match=r"cannot write .*/file/out: \[Errno"):
        (tmp_path / "file").touch()
        write(tmp_path / "file/out", tensors, config, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"] and not list((tmp_path / "there").iterdir())


def test_an_interrupted_write_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    _, tensors, config = content()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/stale.safetensors").touch()

    class Interrupted(Counting):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name != next(iter(self.tensors)):  # which the type checker of the tests looks at
                raise KeyboardInterrupt
            return self.tensors[name]

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", Interrupted(tensors), config, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/stale.safetensors").touch()
    write(tmp_path / "out", tensors, config, {})
    assert verify(tmp_path / "out") == [] and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(ResourceError, match=r"no space left to write .*out.*free some"):
        save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kib", [4, 16, 40, 48])
def test_a_disk_that_is_really_full(tmp_path: Path, kib: int) -> None:
    """At several sizes, so that weight files, index, config.json and MANIFEST.json each fail in turn."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here; the test above imitates one")
    try:
        with pytest.raises(ResourceError, match="no space left"):
            save(disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_values_that_no_checkpoint_may_hold_are_refused() -> None:
    weight = nested(Shape(2, 8), Recipe(group_size=4, parent_bits=3, bits=(3, 2), targets={3: 1}), 0)
    for value, words in ((1e6, "finite"), (1e-9, "positive")):
        with pytest.raises(CheckpointError, match=rf"m.scale in float16 is not {words} everywhere; store scales as float32"):
            module_tensors("m", dataclasses.replace(weight, scale=torch.full((2, 2), value).half()))
    with pytest.raises(CheckpointError, match=r"m.zero in uint8 exceeds 7, the largest code; choose another method"):
        module_tensors("m", dataclasses.replace(weight, zero=torch.full((2, 2), 8, dtype=torch.uint8)))
    refit = dataclasses.replace(weight.refits[2], scale=torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"m.scale.2 in uint8 is not positive"):
        module_tensors("m", dataclasses.replace(weight, refits={2: refit}))


def test_the_config_names_everything_a_reader_needs() -> None:
    section = quantization_config(RECIPE, SHAPES, ["lm_head"], bits=4)
    assert section["bits"] == 4 and section["modules"] == {name: shape.in_features for name, shape in SHAPES.items()}
    assert section["recipe_hash"] == hashlib.sha256(json.dumps(section["recipe"], sort_keys=True).encode()).hexdigest()
    assert Recipe.from_dict(json.loads(json.dumps(section["recipe"]))) == RECIPE
    with pytest.raises(RecipeError):
        Recipe.from_dict(section)


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    _, tensors, config = content()
    shared = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "out", tensors | {"a": shared, "b": shared, "c": shared[1:], "d": shared.T}, config, {})
    stored = load_file(next((tmp_path / "out").glob("model-base-*")))
    assert all(torch.equal(stored[name], value) for name, value in {"a": shared, "b": shared, "c": shared[1:], "d": shared.T}.items())
