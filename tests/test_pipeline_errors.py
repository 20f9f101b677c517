"""quantize() of bad texts, models, places and options: an error in words, and nothing left behind."""

import errno
import os
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FAST, OVERWRITE, RESUME, Edited, Tiny, partial, sums
from torch import Tensor

from matquant import blocks, groups, pipeline
from matquant.checkpoint import writing
from matquant.errors import InputError, MatquantError, RecipeError, ResourceError
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("no_plots")


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
