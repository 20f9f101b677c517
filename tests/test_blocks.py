"""One block at a time: bounded memory, exact resumption, streams in memory or in files, activations that are no good."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from matquant import activations, blocks, models
from matquant.blocks import BlockRun, Silent, is_whole, save_whole
from matquant.errors import InputError, ResourceError
from matquant.groups import BlockState
from matquant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_collect")

CPU = torch.device("cpu")
RECIPE = Recipe(group_size=32, bits=(4, 2), targets={4: 2.0, 2: 1.0}, parent_bits=4, clip_search=False, asymmetric_calibration=0.0)
PLAIN = replace(RECIPE, method="minmax", refit_bits=0)
ASYMMETRIC = replace(RECIPE, asymmetric_calibration=0.5)
TOKENS = (torch.arange(2 * 40).reshape(2, 40) * 31 + 7) % 250
Tiny = Callable[[str], Path]
Edited = Callable[..., Path]


@dataclass
class Lines(Silent):
    lines: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        self.lines.append(text)


def run_of(
    model: Path, folder: Path, recipe: Recipe = RECIPE, follow: Silent | None = None, dtype: torch.dtype = torch.float32, on_disk: bool = False
) -> BlockRun:
    source = models.open_source(str(model))
    folder.mkdir(exist_ok=True)
    return BlockRun(source, models.find_layers(source.model, recipe), recipe, folder, CPU, dtype, follow or Silent(), on_disk)


def contents(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(a: Path, b: Path) -> bool:
    one, two = contents(a), contents(b)
    return one.keys() == two.keys() and all(
        one[file].keys() == two[file].keys() and all(torch.equal(one[file][name], two[file][name]) for name in one[file]) for file in one
    )


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [RECIPE, PLAIN])
def test_one_block_in_memory(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    run = run_of(tmp_path / "deep", tmp_path / "blocks", recipe)
    assert run.source.note == ""
    seen: list[int] = []
    _, found = models.find_blocks(run.source.model)

    def count(*args: object) -> None:
        seen.append(sum(any(not parameter.is_meta for parameter in block.parameters()) for block in found))

    materialize, quantize_block = models.materialize, BlockState.quantize
    monkeypatch.setattr(models, "materialize", lambda *args: [materialize(*args), count()])
    monkeypatch.setattr(BlockState, "quantize", lambda *args: (count(), quantize_block(*args))[1])
    run.quantize(TOKENS)
    count()
    assert max(seen) == 1 and seen[-1] == 0 and len(seen) > 10
    assert all(file.exists() for file in run.files)


def test_what_cannot_be_read_in_parts_is_loaded_whole_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(tiny("mixtral"), tmp_path / "blocks")
    assert run.source.note.startswith("loaded whole: the files hold")
    before = {name: tensor.clone() for name, tensor in run.source.tensors.items()}
    run.quantize(TOKENS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.source.tensors.items()), "the original was overwritten"


@pytest.mark.parametrize("method", ["gptq", "block"])
def test_streams_of_fewer_sequences_calibrate_the_low_widths(method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, method=method, parent_bits=8, targets={8: 0.1, 4: 1.0, 2: 1.0}, stream_samples=1, refine_steps=2)
    passed: list[dict[int, int]] = []
    original = BlockState.advance
    monkeypatch.setattr(BlockState, "advance", lambda self: (passed.append({r: len(x) for r, x in self.streams.items()}), original(self))[1])
    fewer, all_of_them = (
        run_of(tiny("llama"), tmp_path / "fewer", recipe),
        run_of(tiny("llama"), tmp_path / "all", replace(recipe, stream_samples=len(TOKENS))),
    )
    fewer.quantize(TOKENS)
    assert passed == [{0: len(TOKENS), **dict.fromkeys(recipe.stream_widths, 1)}] * 2
    all_of_them.quantize(TOKENS)
    assert not same(tmp_path / "fewer", tmp_path / "all")
    assert all(0 < error < 1 for output in fewer.outputs() for error in output.values())


# --- resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [RECIPE, PLAIN, ASYMMETRIC])
@pytest.mark.parametrize("keep", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_finished_blocks_are_not_made_again(
    on_disk: bool, keep: tuple[int, ...], recipe: Recipe, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(tiny("llama"), tmp_path / "whole", recipe)
    whole.quantize(TOKENS)
    rest = run_of(tiny("llama"), tmp_path / "rest", recipe, on_disk=on_disk)
    (rest.folder / "stream-2.bin").write_bytes(b"of a run that was killed")
    for index in keep:
        rest.files[index].write_bytes(whole.files[index].read_bytes())
    made: list[int] = []
    original = BlockState.quantize
    monkeypatch.setattr(BlockState, "quantize", lambda self, *args: (made.append(int(self.prefix[-1])), original(self, *args))[1])
    if len(keep) == 2:
        monkeypatch.setattr(models, "materialize", lambda *args: pytest.fail("read the model, with nothing to do"))
    rest.quantize(TOKENS)
    assert made == [index for index in (0, 1) if index not in keep]
    assert same(tmp_path / "whole", tmp_path / "rest")
    assert whole.reports() == rest.reports() and whole.outputs() == rest.outputs()
    kept = (0, 4, 2, "original-inputs") if recipe == ASYMMETRIC else (0, 4, 2)
    streams = {f"stream-{r}.bin" for r in kept} if on_disk and recipe != PLAIN and len(keep) < 2 else {"stream-2.bin"}
    assert {path.name for path in rest.folder.glob("stream*")} == streams


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: flip(path, -1),
        lambda path: flip(path, 3000),
        lambda path: flip(path, path.read_bytes().index(b"notes")),
        lambda path: save_whole(path, {}, {}) or flip(path, 20),
    ],
)
def test_damaged_block_files_are_made_again(damage: Callable[[Path], object], tiny: Tiny, tmp_path: Path) -> None:
    whole, follow = run_of(tiny("llama"), tmp_path / "whole"), Lines()
    whole.quantize(TOKENS)
    rest = run_of(tiny("llama"), tmp_path / "rest", follow=follow)
    for mine, theirs in zip(rest.files, whole.files, strict=True):
        mine.write_bytes(theirs.read_bytes())
    damage(rest.files[0])
    rest.quantize(TOKENS)
    assert same(tmp_path / "whole", tmp_path / "rest") and whole.reports() == rest.reports()
    assert follow.lines[0] == f"block 0 is made again: {rest.files[0]} is damaged"


def test_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_whole(path, {"x": torch.arange(6).reshape(2, 3).T, "empty": torch.zeros(0, 3)}, {"note": "hello"})
    assert is_whole(path) and [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert models.SafetensorsFiles([path]).metadata(path)["note"] == "hello"
    assert not is_whole(tmp_path / "b.safetensors")


@pytest.mark.parametrize("code, kind, words", [(errno.ENOSPC, ResourceError, "no space left to write"), (errno.EIO, InputError, "cannot write")])
def test_disks_that_refuse(code: int, kind: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(kind, match=rf"{words} .*a.safetensors.*continue with --resume"):
        save_whole(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_as_safetensors_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(blocks, "save_file", refuse)
    with pytest.raises(ResourceError, match=r"no space left to write .*a.safetensors"):
        save_whole(tmp_path / "a.safetensors", {"x": torch.zeros(10**6)}, {})
    assert not list(tmp_path.iterdir())


# --- what is not calibrated ---------------------------------------------------------------------------------------------


def test_rounding_to_nearest_looks_at_no_activations(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "record", lambda *args: pytest.fail("ran the model"))
    run = run_of(tiny("llama"), tmp_path / "blocks", PLAIN)
    assert not run.calibrated
    run.quantize(torch.zeros(0, 8, dtype=torch.long))
    assert run.outputs() == ({}, {}) and not any(report.stages for report in run.reports())
    dense = models.load_dense("it", tiny("llama"), None)
    for report in run.reports():
        w = models.get_weight(dense.get_submodule(report.name))
        for bits, error in report.errors.items():
            read = run.weight(report.name).read(bits).dense()
            assert error == pytest.approx(float((w - read).square().sum() / w.square().sum()), rel=1e-4)
    for change in ({"method": "gptq"}, {"clip_search": True}, {"refit_bits": 2}):
        assert replace(run, recipe=replace(PLAIN, **change)).calibrated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_calibration_in_either_dtype(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(tiny("llama"), tmp_path / "blocks", dtype=dtype)
    run.quantize(TOKENS)
    reports = run.reports()
    assert [report.name for report in reports] == list(run.layers.quantized)
    assert all(0 < report.errors[4] < 0.05 and report.errors[4] < report.errors[2] < 0.5 for report in reports)
    assert all(report.shape == run.layers.quantized[report.name] and not report.notes for report in reports)


def test_blocks_of_which_everything_is_skipped(tiny: Tiny, tmp_path: Path) -> None:
    whole = run_of(tiny("llama"), tmp_path / "blocks", replace(RECIPE, skip=("model.layers.0.*",)))
    whole.quantize(TOKENS)
    assert [report.name for report in whole.reports()] == whole.layers.of_block(1) and not whole.layers.of_block(0)
    assert all(map(is_whole, whole.files))


def test_experts_that_no_token_reaches(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a router never chose v_proj: it comes last and alone, and counts its inputs as equally strong."""
    stages, statistics = activations.stages, activations.statistics

    def unreached(block: object, call: object, hidden: Tensor, layers: dict) -> list[list[list[str]]]:
        name = next(name for name in layers if name.endswith("v_proj"))
        return [*stages(block, call, hidden, {other: layer for other, layer in layers.items() if other != name}), [[name]]]

    def nothing(*args: object) -> dict:
        leaders = args[5]
        assert isinstance(leaders, list)
        return {} if leaders[0].endswith("v_proj") else statistics(*args)

    monkeypatch.setattr(activations, "stages", unreached)
    monkeypatch.setattr(activations, "statistics", nothing)
    follow = Lines()
    run = run_of(tiny("llama"), tmp_path / "blocks", follow=follow)
    run.quantize(TOKENS)
    assert {r.name: r.notes for r in run.reports() if r.notes} == {
        f"model.layers.{i}.self_attn.v_proj": ("no token reached it: its inputs count as equally strong",) for i in (0, 1)
    }
    assert "note: model.layers.1.self_attn.v_proj: no token reached it: its inputs count as equally strong" in follow.lines


# --- activations that are no good -----------------------------------------------------------------------------------------


def finite(run: BlockRun) -> bool:
    return all(bool(run.weight(name).read(bits).dense().isfinite().all()) for name in run.layers.quantized for bits in run.recipe.bits)


@pytest.mark.parametrize("method", ["gptq", "minmax"])
def test_dead_inputs(method: str, edited: Edited, tmp_path: Path) -> None:
    """Rows of zeros in up_proj are inputs of down_proj that are always 0."""

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][[0, 1, 2, *range(32, 64)]] = 0

    folder = edited("llama", change=silence)
    run = run_of(folder, tmp_path / "blocks", replace(RECIPE, method=method, clip_search=True))
    run.quantize(TOKENS)
    assert finite(run)
    notes = {report.name: report.notes for report in run.reports() if report.notes}
    dead = ("35 of 96 inputs are always 0: their weights are rounded to nearest",)
    assert notes == ({"model.layers.0.mlp.down_proj": dead} if method == "gptq" else {})


@pytest.mark.parametrize("method", ["gptq", "minmax"])
def test_activations_too_large_for_a_hessian(method: str, edited: Edited, tmp_path: Path) -> None:
    folder = edited("llama", change=lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e25))
    run = run_of(folder, tmp_path / "blocks", replace(RECIPE, method=method, clip_search=True, scale_dtype="float32"))
    run.quantize(TOKENS)
    assert finite(run)
    notes = {report.name: report.notes for report in run.reports()}
    words = {"gptq": "the Hessian is not finite: rounded to nearest", "minmax": "the Hessian is not finite: its inputs count as equally strong"}
    assert notes["model.layers.0.mlp.down_proj"] == (words[method],)
    assert not notes["model.layers.0.mlp.up_proj"]


def test_hessians_without_a_cholesky_factor(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = activations.statistics

    def broken(*args: object) -> dict:
        found = original(*args)
        for h in (h for inputs in found.values() for h in inputs.h.values()):
            h[0, 1] = h[1, 0] = h.diagonal().max() * 1e4
        return found

    monkeypatch.setattr(activations, "statistics", broken)
    run = run_of(tiny("llama"), tmp_path / "blocks", replace(RECIPE, clip_search=True))
    run.quantize(TOKENS)
    assert finite(run) and {report.notes for report in run.reports()} == {("no Cholesky factor up to damping 1: rounded to nearest",)}


def test_errors_of_a_method_that_fails_leave_no_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tiny("llama"), tmp_path / "blocks")
    monkeypatch.setattr(blocks, "module_tensors", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.quantize(TOKENS)
    assert not list(run.folder.glob("*.safetensors*"))
