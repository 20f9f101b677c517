"""quantize() from a folder to a folder: every architecture, equal bytes for equal runs, killed anywhere and resumed, bad input."""

import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from torch import Tensor

import matquant
from matquant import activations, blocks, calibration, groups, models, pipeline
from matquant.checkpoint import Checkpoint, files, verify, writing
from matquant.errors import InputError, MatquantError, RecipeError, ResourceError, ResumeError
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe
from matquant.report import Report

IDS = (torch.arange(2 * 24).reshape(2, 24) * 31 + 7) % 250
SMALL = Recipe(group_size=32, parent_bits=3, bits=(3, 2), targets={3: 2.0, 2: 1.0}, clip_search=False, num_samples=2, seq_len=16, eval_samples=1)
FAST = replace(SMALL, method="minmax", refit_bits=0, eval_samples=0)
RESUME, OVERWRITE = RunOptions(resume=True), RunOptions(overwrite=True)
Tiny = Callable[[str], Path]
Edited = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_plot(request: pytest.FixtureRequest, quick_collect: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than all the rest of a run of a tiny model; the tests that ask for them have `plot` in their names."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(pipeline, "quality_svg", lambda rows: None)
        monkeypatch.setattr(pipeline, "errors_svg", lambda layers, outputs: None)


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return replace(SMALL, calibration=str(text))


@pytest.fixture(scope="session")
def want(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `recipe` makes of "llama" when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("want") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quality_svg", lambda rows: None)
        patch.setattr(pipeline, "errors_svg", lambda layers, outputs: None)
        quantize(str(tiny("llama")), folder, replace(SMALL, calibration=str(text)), RunOptions())
    return folder


@dataclass
class Lines:
    """Progress that remembers."""

    stages: list[tuple[str, int, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __call__(self, stage: str, done: int, of: int) -> None:
        self.stages.append((stage, done, of))

    def line(self, text: str) -> None:
        self.lines.append(text)


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


# --- what comes out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    targets = {8: 100.0, 4: 2.0, 2: 1.0}
    recipe = Recipe(
        group_size=16, bits=(8, 4, 2), targets=targets, calibration=str(text), clip_search=False, num_samples=2, seq_len=40, eval_samples=1
    )
    follow, out = Lines(), tmp_path / "out"
    report = quantize(str(tiny(name)), out, recipe, RunOptions(), follow)
    assert verify(out) == [] and not partial(out).exists()
    kl = {row.label: row.kl for row in report.rows}
    assert list(kl) == ["32", "8", "4", "2"] and kl["8"] < 1e-4 and kl["8"] < kl["4"] < kl["2"] < 0.1
    checkpoint = Checkpoint.open(out)
    assert sorted(layer.name for layer in report.layers) == sorted(checkpoint.modules)
    assert all(layer.errors[8] < layer.errors[4] < layer.errors[2] < 1 for layer in report.layers)
    skipped = [line for line in follow.lines if line.startswith("skipped ")]
    assert skipped == [f"skipped {module}: {reason}" for module, reason in report.skipped] and bool(skipped) == (name == "mixtral")

    dense = models.load_dense("it", tiny(name), None, dtype=torch.float32)
    with torch.no_grad():
        original = dense(IDS).logits
    model = matquant.from_pretrained(out, 8)
    for bits in (8, 2):
        matquant.set_bits(model, bits)
        for module in checkpoint.modules:
            layer = dense.get_submodule(module)
            layer.weight.data = models.held_as(layer, checkpoint.read(module).read(bits).dense())
        with torch.no_grad():
            logits = model(IDS).logits
            torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
        p, q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < {8: 1e-4, 2: 0.1}[bits]


def test_the_folder(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    follow, out = Lines(), tmp_path / "out"
    report = quantize(str(tiny("llama")), out, recipe, RunOptions(), follow)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "README.md", "report.json", "tokenizer.json", "generation_config.json", "MANIFEST.json"} <= names
    assert not any(name.startswith(".") or "partial" in name for name in names)
    assert str(tmp_path) not in (out / "report.json").read_text() + (out / "README.md").read_text() + (out / "config.json").read_text().replace(
        recipe.calibration, ""
    )
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    saved = Report.from_dict(json.loads((out / "report.json").read_text()))
    assert saved.rows == report.rows and saved.layers == report.layers and saved.outputs == report.outputs
    assert len(report.outputs) == 2 and all(0 < output[3] < output[2] < 1 for output in report.outputs)
    assert report.protocol is not None and report.protocol.text == f"{recipe.calibration}, the part not calibrated on"
    assert saved.protocol == replace(report.protocol, text="calibration.txt, the part not calibrated on")
    assert report.rows[1].file_bytes == Checkpoint.open(out).bytes_for(3) - sum((out / n).stat().st_size for n in ("README.md", "report.json")) - (
        (out / "MANIFEST.json").stat().st_size - manifest_before(out)
    )
    assert {stage for stage, _, _ in follow.stages} == {"quantizing", "writing", "measuring"}
    assert "no plot: it needs matplotlib (pip install 'matquant[plot]')" in follow.lines


def manifest_before(out: Path) -> int:
    """Size of MANIFEST.json before the report and the card came in."""
    manifest = files.Manifest.load(out)
    assert manifest is not None
    return len(files.Manifest({name: entry for name, entry in manifest.files.items() if name not in ("README.md", "report.json")}).to_bytes())


def test_plot_and_license(edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = edited("llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# model\n")
    quantize(str(folder), tmp_path / "out", recipe, RunOptions())
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"<?xml") for name in ("quality.svg", "errors.svg"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "(quality.svg)" in card and "(errors.svg)" in card and verify(tmp_path / "out") == []


def test_equal_runs_give_equal_bytes(tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path) -> None:
    torch.rand(5)  # whatever state the process is in
    quantize(str(tiny("llama")), tmp_path / "again", recipe, RunOptions())
    assert sums(tmp_path / "again") == sums(want)


def test_streams_on_disk_give_equal_bytes(tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without and with an interruption, and with the streams where they were not before: that is no other run."""
    options = RunOptions(streams_on_disk=True)
    quantize(str(tiny("llama")), tmp_path / "again", recipe, options)
    assert sums(tmp_path / "again") == sums(want)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(activations, "propagate", 2, patch)
        quantize(str(tiny("llama")), out, recipe, options)
    assert {path.name for path in (partial(out) / "blocks").glob("stream*")} == {"stream-0.bin", "stream-2.bin", "stream-3.bin"}
    quantize(str(tiny("llama")), out, recipe, RESUME)
    assert sums(out) == sums(want) and not partial(out).exists()


def test_sampled_calibration(tiny: Tiny, tmp_path: Path) -> None:
    own = replace(SMALL, calibration="self", num_samples=3, eval_samples=2)
    follow = Lines()
    one, _, other = (quantize(str(tiny("llama")), tmp_path / str(i), r, RunOptions(), follow) for i, r in enumerate([own, own, replace(own, seed=1)]))
    assert sums(tmp_path / "0") == sums(tmp_path / "1")
    assert one.rows != other.rows and one.layers != other.layers
    protocol = one.protocol
    assert protocol is not None and (protocol.sequences, protocol.seq_len, protocol.tokens) == (2, 16, 30)
    assert protocol.text == "sampled from the original, seed 0, not calibrated on" and protocol.bos == "token 256 leads every sequence"
    assert ("sampling text", 16, 16) in follow.stages


def test_rounding_to_nearest_needs_no_text(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((activations, "record"), (calibration, "read_texts"), (calibration, "sample_windows")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("calibrated"))
    report = quantize(str(tiny("llama")), tmp_path / "out", replace(FAST, seq_len=4000), RunOptions())
    assert report.rows == () and report.protocol is None and len(report.layers) == 14 and verify(tmp_path / "out") == []
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()


def test_rounding_to_nearest_can_be_measured(tiny: Tiny, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "record", lambda *args: pytest.fail("calibrated"))
    report = quantize(str(tiny("llama")), tmp_path / "out", replace(recipe, method="minmax", refit_bits=0, eval_samples=3), RunOptions())
    assert report.protocol is not None and report.protocol.sequences == 3 and len(report.rows) == 3


def test_a_text_of_its_own_for_the_report(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Quite another text. " * 20)
    reports = {}
    for calibrated in (recipe, replace(recipe, method="minmax", refit_bits=0)):
        for wanted in (2, 0):
            options = RunOptions(eval_text=other, overwrite=True)
            report = reports[calibrated.method, wanted] = quantize(
                str(tiny("llama")), tmp_path / "out", replace(calibrated, eval_samples=wanted), options
            )
            assert bool(report.rows) == bool(report.protocol) == bool(wanted)
    for method in ("gptq", "minmax"):
        protocol = reports[method, 2].protocol
        assert protocol is not None and (protocol.text, protocol.sequences) == (str(other), 2)
    assert reports["gptq", 2].layers == reports["gptq", 0].layers


def test_short_calibration_is_told(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    short, follow = tmp_path / "short.txt", Lines()
    short.write_text("x" * 16 * 5)
    report = quantize(
        str(tiny("llama")), tmp_path / "out", replace(recipe, calibration=str(short), num_samples=32, eval_samples=8), RunOptions(), follow
    )
    assert f"{short} has text for 4 of 32 sequences to calibrate on" in follow.lines
    assert report.protocol is not None and report.protocol.sequences == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_calculating_in_16_bits(dtype: str, edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    folder = edited("llama", {"dtype": "bfloat16"}, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    report = quantize(str(folder), tmp_path / "out", recipe, RunOptions(dtype=dtype))
    assert report.rows[0].label == "16" and report.rows[1].kl is not None and 0 < report.rows[1].kl < 0.1
    assert {tensor.dtype for tensor in Checkpoint.open(tmp_path / "out").base.values()} == {torch.bfloat16}
    assert verify(tmp_path / "out") == []


def test_dead_inputs_and_overflow_are_notes_in_the_report(edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25

    out = tmp_path / "out"
    report = quantize(str(edited("llama", change=change)), out, replace(recipe, clip_search=True, scale_dtype="float32"), RunOptions())
    notes = {layer.name: layer.notes for layer in report.layers if layer.notes}
    assert notes == {
        "model.layers.0.mlp.down_proj": ("3 of 96 inputs are always 0: their weights are rounded to nearest",),
        "model.layers.1.mlp.down_proj": ("the Hessian is not finite: rounded to nearest",),
    }
    assert verify(out) == [] and all(row.kl is not None and row.kl < 1 for row in report.rows)


def test_remote_code_travels_with_the_checkpoint(edited: Edited, tmp_path: Path) -> None:
    folder = edited("llama")
    (folder / "own.py").write_text("")
    (folder / "tokenizer (1).json").write_text("{}")
    for trusted in (False, True):
        quantize(str(folder), tmp_path / "out", FAST, RunOptions(trust_remote_code=trusted, overwrite=True))
        assert (tmp_path / "out" / "own.py").exists() == trusted and verify(tmp_path / "out") == []


# --- killed and resumed ---------------------------------------------------------------------------------------------------


def steps(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with 0, 1, 2 ... before everything that changes a file. Patches for good: for a process of its own."""
    number = count()

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            act(next(number))
            return function(*args, **kwargs)

        return wrapped

    def write_bytes(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            act(next(number))
            return file.write(content[len(content) // 2 :])

    for module, name in [(os, n) for n in ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir")] + [
        (blocks, "save_file"),
        (writing, "save_file"),
    ]:
        setattr(module, name, before(getattr(module, name)))
    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
    yield


def kill_everywhere(model: str, text: str, folder: Path, stride: int, options: RunOptions, at_least: int) -> None:
    """Kill a run before each of its steps (every `stride`-th), resume, compare. Needs a process without threads."""
    torch.set_num_threads(1)
    pipeline.quality_svg = lambda rows: None
    pipeline.errors_svg = lambda layers, outputs: None
    gc.freeze()
    out, want, recipe = folder / "out", folder / "want", replace(SMALL, calibration=text)
    quantize(model, want, recipe, RunOptions(overwrite=True))
    expected = sums(want)
    for moment in count(0, stride):
        shutil.rmtree(out, ignore_errors=True)
        if options.overwrite:
            shutil.copytree(want, out)
            (out / "README.md").write_text("former")
        child = os.fork()
        if not child:
            next(steps(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == moment else None))  # noqa: B023
            quantize(model, out, recipe, options)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            assert sums(out) == expected and moment >= stride * at_least
            return
        assert code == -signal.SIGKILL, f"step {moment}: exit code {code}"
        resumed = replace(options, resume=partial(out).exists())
        if not resumed.resume:
            resumed = replace(resumed, overwrite=True)  # killed before the first or after the last step
        quantize(model, out, recipe, resumed)
        assert sums(out) == expected, f"step {moment}"
        assert sorted(path.name for path in folder.iterdir()) == ["out", "want"], f"step {moment}"
    raise AssertionError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_anywhere(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """A sample of the 63 and 75 steps of a run; strides of 1 take a minute each."""
    (tmp_path / "runs").mkdir()
    places = f"{str(tiny('llama'))!r}, {str(text)!r}, Path({str(tmp_path / 'runs')!r})"
    code = f"from test_pipeline import *; kill_everywhere({places}, 5, RunOptions(), 10); kill_everywhere({places}, 15, OVERWRITE, 4)"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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


@pytest.fixture
def interrupted(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> Iterator[Path]:
    """The output of a run that was interrupted in its second block."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(activations, "propagate", 2, patch)
        with pytest.raises(Crash):
            quantize(str(tiny("llama")), out, recipe, RunOptions())
    assert not out.exists() and sorted(path.name for path in (partial(out) / "blocks").iterdir()) == ["00000.safetensors"]
    yield out


@pytest.mark.parametrize(
    "module, name, number",
    [
        (calibration, "read_texts", 1),
        (activations, "propagate", 1),
        (groups, "quantize_group", 3),
        (pipeline, "write", 1),
        (pipeline, "evaluate", 1),
        (pipeline, "add_files", 1),
        (pipeline, "_clean_up", 1),
    ],
)
def test_interrupted_and_resumed(
    module: Any, name: str, number: int, tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(module, name, number, patch)
        quantize(str(tiny("llama")), out, recipe, RunOptions())
    assert partial(out).exists()
    report = quantize(str(tiny("llama")), out, recipe, RESUME)
    assert sums(out) == sums(want) and not partial(out).exists()
    assert report.to_dict()["rows"] == json.loads((out / "report.json").read_text())["rows"]


def test_measured_once(tiny: Tiny, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured again with the report in the folder, the bytes to fetch would be others."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(pipeline, "replace_whole", 2, patch)
        quantize(str(tiny("llama")), out, recipe, RunOptions())
    assert (partial(out) / "checkpoint" / "report.json").exists()
    monkeypatch.setattr(pipeline, "evaluate", lambda *args, **kwargs: pytest.fail("measured again"))
    quantize(str(tiny("llama")), out, recipe, RESUME)
    assert verify(out) == []


def test_another_recipe_is_refused(interrupted: Path, tiny: Tiny, recipe: Recipe) -> None:
    before = sums(partial(interrupted))
    with pytest.raises(ResumeError, match=r"is a run with other settings \(group_size: 32 -> 16; seed: 0 -> 5\); use the same, or start over"):
        quantize(str(tiny("llama")), interrupted, replace(recipe, group_size=16, seed=5), RESUME)
    assert sums(partial(interrupted)) == before
    for options, words in [
        (replace(RESUME, dtype="bfloat16"), "dtype: float32 -> bfloat16"),
        (replace(RESUME, eval_text=Path("x.txt")), r"eval_text: None -> x.txt"),
    ]:
        with pytest.raises(ResumeError, match=rf"other settings \({words}\)"):
            quantize(str(tiny("llama")), interrupted, recipe, options)
    assert sums(partial(interrupted)) == before
    quantize(str(tiny("llama")), interrupted, recipe, RESUME)


def test_another_number_of_threads_is_refused(interrupted: Path, tiny: Tiny, recipe: Recipe) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ResumeError, match=rf"\(threads: {threads} -> {threads + 1}\)"):
            quantize(str(tiny("llama")), interrupted, recipe, RESUME)
    finally:
        torch.set_num_threads(threads)


def test_another_model_is_refused(edited: Edited, tiny: Tiny, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight changed, in a file of the same size and time; a tokenizer's; a file more; another folder."""
    folder, out = edited("llama"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(activations, "propagate", 2, patch)
        quantize(str(folder), out, recipe, RunOptions())
    weights, good = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    stat = weights.stat()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ResumeError, match=r"other settings \(weights: [0-9a-f]{16} -> [0-9a-f]{16}\)"):
        quantize(str(folder), out, recipe, RESUME)
    weights.write_bytes(good)
    (folder / "vocab.txt").write_text("more")
    with pytest.raises(ResumeError, match=r"other settings \(vocab.txt: None -> [0-9a-f]{16}\)"):
        quantize(str(folder), out, recipe, RESUME)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ResumeError, match=r"other settings \(model: .*edited-llama -> "):
        quantize(str(tiny("llama")), out, recipe, RESUME)
    quantize(str(folder), out, recipe, RESUME)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"recipe": {}}', b'{"recipe": {"colour": "red"}, "identity": {}}', b"\xff"])
def test_a_damaged_record(content: bytes, interrupted: Path, tiny: Tiny, recipe: Recipe) -> None:
    (partial(interrupted) / "run.json").write_bytes(content)
    with pytest.raises(ResumeError, match=r"run.json is damaged or of another version of matquant; start over with --overwrite"):
        quantize(str(tiny("llama")), interrupted, recipe, RESUME)
    quantize(str(tiny("llama")), interrupted, recipe, OVERWRITE)
    assert verify(interrupted) == [] and not partial(interrupted).exists()


def test_damaged_work(interrupted: Path, tiny: Tiny, recipe: Recipe, want: Path) -> None:
    block, windows = partial(interrupted) / "blocks" / "00000.safetensors", partial(interrupted) / "windows.safetensors"
    good = windows.read_bytes()
    windows.write_bytes(good[:-4])
    with pytest.raises(ResumeError, match=r"windows.safetensors is damaged; start over with --overwrite"):
        quantize(str(tiny("llama")), interrupted, recipe, RESUME)
    windows.write_bytes(good)
    block.write_bytes(block.read_bytes()[:-4])
    follow = Lines()
    quantize(str(tiny("llama")), interrupted, recipe, RESUME, follow)
    assert follow.lines[0] == f"block 0 is made again: {block} is damaged"
    assert sums(interrupted) == sums(want)


def test_what_is_there_already(interrupted: Path, tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = str(tiny("llama")), tmp_path / "done"
    with pytest.raises(InputError, match=r"out.partial holds an interrupted run; continue it with --resume, or start over with --overwrite"):
        quantize(model, interrupted, recipe, RunOptions())
    with pytest.raises(ResumeError, match=r"nothing to resume: there is no .*done.partial; start without --resume"):
        quantize(model, out, recipe, RESUME)
    quantize(model, out, recipe, RunOptions())
    before = sums(out)
    assert before == sums(want)
    for options in (RunOptions(), RESUME):
        with pytest.raises(InputError, match=r"done exists already; choose another output folder, or replace it with --overwrite"):
            quantize(model, out, recipe, options)
    other = replace(FAST, group_size=16, eval_samples=1, calibration=recipe.calibration)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(pipeline, "evaluate", 1, patch)
        quantize(model, out, other, OVERWRITE)
    assert sums(out) == before, "the former folder is replaced at the end"
    quantize(model, out, other, replace(RESUME, overwrite=True))
    quantize(model, tmp_path / "want", other, RunOptions())
    assert sums(out) == sums(tmp_path / "want") != before and not partial(out).exists()


def test_overwrite_deletes_checkpoints_only(tiny: Tiny, edited: Edited, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for place in (home, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(InputError, match=r"is no finished checkpoint, and --overwrite deletes nothing else"):
            quantize(str(tiny("llama")), place, FAST, OVERWRITE)
    assert (home / "thesis.txt").exists()
    model = edited("llama")
    (model / "MANIFEST.json").write_text("{}")
    with pytest.raises(InputError, match=r"edited-llama holds the model itself, which --overwrite would delete"):
        quantize(str(model), model, FAST, OVERWRITE)
    empty = tmp_path / "empty"
    empty.mkdir()
    quantize(str(tiny("llama")), empty, FAST, OVERWRITE)
    quantize(str(tiny("llama")), empty, FAST, OVERWRITE)
    assert verify(empty) == [] and model.exists()


# --- bad input ------------------------------------------------------------------------------------------------------------


def refused(kind: type[MatquantError], words: str, model: Path | str, out: Path, recipe: Recipe, options: RunOptions = RunOptions()) -> None:
    """It is refused in these words, and nothing is left behind."""
    before = sorted(out.parent.rglob("*")) if out.parent.is_dir() else []
    with pytest.raises(kind, match=words):
        quantize(str(model), out, recipe, options)
    assert before == (sorted(out.parent.rglob("*")) if out.parent.is_dir() else [])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", r"empty.txt is empty; give a file with text"),
        ("image.txt", b"\x89PNG\r\n\x1a\n", r"image.txt is not text: byte 0 is not UTF-8"),
        ("zeros.txt", b"\0\0\0\0", r"zeros.txt is not text: it holds zero bytes"),
        ("short.txt", b"too short for two", r"short.txt has 17 tokens, fewer than 2 sequences of 16; give more text, or a smaller --seq-len"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"bad.jsonl, line 2: not JSON"),
        ("gone.txt", None, r"no calibration file .*gone.txt; give FILE.txt, FILE.jsonl, hf:DATASET\[:SPLIT\] or self"),
    ],
)
def test_bad_texts(name: str, content: bytes | None, words: str, tiny: Tiny, recipe: Recipe, text: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(InputError, words, tiny("llama"), tmp_path / "out", replace(recipe, calibration=str(tmp_path / name)))
    words = words.replace("fewer than 2 sequences of 16; give more text, or", "fewer than one sequence of 16; give more text or")
    if name != "short.txt":
        refused(InputError, words, tiny("llama"), tmp_path / "out", recipe, RunOptions(eval_text=tmp_path / name))


def test_bad_models(tiny: Tiny, edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(InputError, r"no model 'nobody/nothing-here'", "nobody/nothing-here", out, recipe)
    refused(InputError, r"is a file; give the folder that holds it", tiny("llama") / "config.json", out, recipe)
    refused(InputError, r"group size 48 does not divide 64 input channels", tiny("llama"), out, replace(recipe, group_size=48))
    refused(InputError, r"nothing to quantize: .* after --skip \*", tiny("llama"), out, replace(recipe, skip=("*",)))
    for calibration_text in (recipe.calibration, "self"):
        long = replace(recipe, seq_len=129, calibration=calibration_text)
        refused(InputError, r"sequences of 129 tokens, but the model has 128 positions; use --seq-len 128 or less", tiny("llama"), out, long)
    bad = edited("llama", change=lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    refused(InputError, r"model.norm.weight holds non-finite values; the model is damaged", bad, out, recipe)
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(InputError, r"model.safetensors is not a readable safetensors file", bad, out, recipe)
    quantize(str(tiny("llama")), tmp_path / "done", FAST, RunOptions())
    refused(InputError, r"is quantized already \(matquant\); give the original model", tmp_path / "done", out, recipe)


def test_a_tokenizer_of_another_model(edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    def small(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensors[name][:99].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")})

    model = edited("llama", {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, small)
    words = r"the text holds token 220, but the model knows 99; use the tokenizer that belongs to it"
    refused(InputError, words, model, tmp_path / "out", recipe)
    (model / "tokenizer.json").write_text("{")
    refused(InputError, r"has no usable tokenizer", model, tmp_path / "out", recipe)
    quantize(str(model), tmp_path / "out", FAST, RunOptions())  # needs none


def test_bad_places(tiny: Tiny, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    refused(InputError, r"there is no folder .*nowhere to put out into; create it first", model, tmp_path / "nowhere" / "out", recipe)
    (tmp_path / "file").write_text("")
    refused(InputError, r"there is no folder .*file to put out into", model, tmp_path / "file" / "out", recipe)
    monkeypatch.chdir(tmp_path)
    for place in (Path("."), Path(".."), Path("/")):
        with pytest.raises(InputError, match=r"has no name of its own; give the folder to make, for instance"):
            quantize(str(model), place, recipe, RunOptions())

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(InputError, r"cannot write .*out.partial: .*Permission denied; choose another output folder", model, tmp_path / "out", recipe)


def test_bad_options() -> None:
    with pytest.raises(RecipeError, match=r"dtype is 'float31'; choose from float32, bfloat16, float16 \(did you mean float32\?\)"):
        RunOptions(dtype="float31")
    with pytest.raises(RecipeError, match=r"device is 'frob'; give cpu, cuda or cuda:N"):
        RunOptions(device="frob")


@pytest.mark.parametrize(
    "module, name, number, left",
    [(blocks, "save_file", 2, 0), (blocks, "save_file", 3, 1), (writing, "save_file", 1, 2), (writing, "save_file", 2, 2), (os, "fsync", 16, 2)],
)
def test_a_full_disk(
    module: Any, name: str, number: int, left: int, tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While blocks are written, and while the checkpoint is: what is finished stays, and the run goes on when there is space."""
    out, calls, original = tmp_path / "out", count(1), getattr(module, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match=r"no space left to write .*out.partial"):
        patch.setattr(module, name, full)
        quantize(str(tiny("llama")), out, recipe, RunOptions())
    assert not out.exists() and len(list((partial(out) / "blocks").iterdir())) == left
    quantize(str(tiny("llama")), out, recipe, RESUME)
    assert sums(out) == sums(want)


def test_too_little_memory(tiny: Tiny, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError("that much"), torch.OutOfMemoryError("CUDA out of memory")):

        def full(*args: object, error: BaseException = error) -> None:
            raise error

        with (
            monkeypatch.context() as patch,
            pytest.raises(ResourceError, match=r"out of memory \(.*\); use a smaller --num-samples or a machine with"),
        ):
            patch.setattr(groups, "quantize_group", full)
            quantize(str(tiny("llama")), tmp_path / "out", recipe, OVERWRITE)
    quantize(str(tiny("llama")), tmp_path / "out", recipe, RESUME)


def test_the_protocol_names_the_token_that_leads_the_text_measured_on(tiny, tmp_path: Path) -> None:
    """Sampled calibration starts from <s>; a text of one's own is led only by what the tokenizer itself puts there: nothing."""
    (tmp_path / "text.txt").write_text("Measured on this, calibrated on something else. " * 20)
    recipe = Recipe(group_size=32, num_samples=2, seq_len=32, eval_samples=2)
    report = pipeline.quantize(str(tiny("llama")), tmp_path / "out", recipe, pipeline.RunOptions(eval_text=tmp_path / "text.txt"))
    assert report.protocol is not None and report.protocol.bos == "none"
