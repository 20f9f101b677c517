"""quantize() killed anywhere and resumed; what is not resumed is refused, and never deleted unasked."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FAST, OVERWRITE, RESUME, SMALL, Crash, Edited, Lines, Tiny, crash_at, partial, sums

from matquant import activations, blocks, calibration, groups, pipeline
from matquant.checkpoint import verify, writing
from matquant.errors import InputError, ResumeError
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("no_plots")


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
    code = f"from test_resume import *; kill_everywhere({places}, 5, RunOptions(), 10); kill_everywhere({places}, 15, OVERWRITE, 4)"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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
        (pipeline, "clean_up", 1),
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
        crash_at(pipeline, "replace_whole", 1, patch)
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
