"""Reads tuned end to end: what changes, what must not, and how a run goes on."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import RESUME, Crash, Lines, Tiny, crash_at, partial, sums
from torch import Tensor

from matquant import calibration, corpus, models, train, tuning
from matquant.checkpoint import Checkpoint, verify
from matquant.errors import RecipeError
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe
from matquant.report import Report
from matquant.texts import training_text
from matquant.trainable import read_at
from matquant.tuning import student

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def tuned(recipe: Recipe) -> Recipe:
    return replace(recipe, finetune_reads=16 * 8 * 6, batch_tokens=16 * 8, finetune_rate=0.01, eval_samples=3)


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(models.SafetensorsFiles(sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_only_the_reads_of_narrow_widths_change_and_they_get_better(kind: str, tiny: Tiny, tuned: Recipe, tmp_path: Path) -> None:
    follow = Lines()
    before = quantize(str(tiny(kind)), tmp_path / "plain", replace(tuned, finetune_reads=0), RunOptions())
    after = quantize(str(tiny(kind)), tmp_path / "tuned", tuned, RunOptions(), follow)
    assert verify(tmp_path / "tuned") == [] and ("tuning 2 bits", 6, 6) in follow.stages
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    changed = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in old if not torch.equal(old[name], new[name])}
    assert set(old) == set(new) and changed == {"scale.3", "zero.3", "scale.2", "zero.2"}
    assert set(after.tuned) == {3, 2} and before.tuned == {}
    for kl_before, kl_after in after.tuned.values():
        assert kl_after < kl_before
    assert Report.from_dict(after.to_dict()).tuned == after.tuned
    for row_before, row_after in zip(before.rows[1:], after.rows[1:], strict=True):  # on text of its own
        assert row_after.kl is not None and row_before.kl is not None and row_after.kl < row_before.kl


def test_a_student_computes_what_the_checkpoint_does(tiny: Tiny, recipe: Recipe, want: Path) -> None:
    import matquant

    source = models.open_source(str(tiny("llama")))
    loaded = matquant.from_pretrained(want, 3, keep=3)
    weights = {name: module.nested() for name, module in loaded.named_modules() if name in Checkpoint.open(want).modules}
    model, layers = student(source, weights, (3, 2), torch.device("cpu"), torch.float32)
    for name, table in Checkpoint.open(want).tables.items():  # it is the original but for its layers
        model.get_submodule(name).weight.data = Checkpoint.open(want).table(name).read(table.bits).dense()
    ids = torch.arange(24).reshape(2, 12)
    for bits in (3, 2):
        read_at(layers, bits)
        matquant.set_bits(loaded, bits)
        assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-5)


def test_interrupted_and_resumed(tiny: Tiny, tuned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second width, after a state was saved."""
    quantize(str(tiny("llama")), tmp_path / "whole", tuned, RunOptions())
    out = tmp_path / "cut"
    steps = 0
    log = train.Fit._log

    def count(self: Any, step: int, *rest: Any) -> None:
        nonlocal steps
        log(self, step, *rest)
        steps += 1
        if steps == 10:
            raise Crash

    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train.Fit, "_log", count)
        quantize(str(tiny("llama")), out, tuned, RunOptions())
    left = {path.name for path in (partial(out) / "tuning").iterdir()}
    assert left == {"3.safetensors", "training-2"} and (partial(out) / "tuning" / "training-2" / "state").exists()
    follow = Lines()
    quantize(str(tiny("llama")), out, tuned, RESUME, follow)
    assert sums(out) == sums(tmp_path / "whole") and not partial(out).exists()
    assert [done for stage, done, _ in follow.stages if stage == "tuning 2 bits"] == [4, 5, 6]
    assert not [stage for stage, _, _ in follow.stages if stage == "tuning 3 bits"]


def test_killed_between_tuning_and_report(tiny: Tiny, tuned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matquant import pipeline

    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(pipeline, "evaluate", 1, patch)
        quantize(str(tiny("llama")), tmp_path / "out", tuned, RunOptions())
    report = quantize(str(tiny("llama")), tmp_path / "out", tuned, RESUME)
    assert set(report.tuned) == {3, 2}


def test_reads_that_got_no_better_stay(tiny: Tiny, tuned: Recipe, tmp_path: Path) -> None:
    follow = Lines()
    wild = replace(tuned, finetune_rate=30.0)
    report = quantize(str(tiny("llama")), tmp_path / "wild", wild, RunOptions(), follow)
    assert any(line.startswith("note: 2 bits keep their reads: KL on sequences held out is") for line in follow.lines)
    plain = quantize(str(tiny("llama")), tmp_path / "plain", replace(tuned, finetune_reads=0), RunOptions())
    assert report.tuned[2][0] == report.tuned[2][1] and report.rows[-1].kl == plain.rows[-1].kl


def test_an_early_end_is_told(tiny: Tiny, tuned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Lines()
    monkeypatch.setattr(train, "math", SimpleNamespace(**vars(math) | {"isfinite": lambda value: False}))
    quantize(str(tiny("llama")), tmp_path / "out", replace(tuned, eval_samples=0), RunOptions(), follow)
    assert "note: tuning of 2 bits ended early: gradients of step 0 were not finite" in follow.lines


# --- text -------------------------------------------------------------------------------------------------------------


def rows(sequences: Iterator[Tensor] | Tensor, count: int = 10**6) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in islice(sequences, count)}


def test_text_is_neither_reported_on_nor_held_out(tiny: Tiny, recipe: Recipe) -> None:
    tokenizer = models.open_source(str(tiny("llama"))).tokenizer()
    tokens, bos = calibration.token_stream(tokenizer, calibration.read_texts(recipe.calibration)), calibration.leading_token(tokenizer)
    reported = calibration.choose_windows(tokens, 16, 2, 4, 0, "", bos)[1]
    held, stream = training_text(replace(recipe, seq_len=16), tokenizer, torch.zeros(2, 16).long(), 4)
    every = len(tokens) // (16 - (bos is not None))
    found = list(islice(stream(), 2 * every))
    assert len(held) == 8 and not rows(held) & rows(iter(found)) and not rows(reported) & (rows(iter(found)) | rows(held))
    assert len(rows(iter(found))) >= every - 4 - 2 - 8 - 5  # some lines of the text are alike


def test_text_of_its_own_is_taken_whole(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"line {i}\n" for i in range(400)))
    tokenizer = models.open_source(str(tiny("llama"))).tokenizer()
    held, stream = training_text(replace(recipe, train_text=str(other)), tokenizer, torch.zeros(2, 16).long(), 4)
    whole = list(corpus.packed(tokenizer, [other.read_text()], 16, calibration.leading_token(tokenizer)))
    assert rows(held) | rows(stream(), len(whole) - 8) == rows(iter(whole))


def test_sampled_text_is_that_of_the_calibration(tiny: Tiny, recipe: Recipe) -> None:
    tokenizer = models.open_source(str(tiny("llama"))).tokenizer()
    calibrated = torch.arange(10)[:, None].repeat(1, 16)
    held, stream = training_text(replace(recipe, calibration="self"), tokenizer, calibrated, 4)
    order = [int(row[0]) for row in islice(stream(), 18)]
    assert sorted([*order[:9], int(held[0, 0])]) == sorted([*order[9:], int(held[0, 0])]) == list(range(10)) and order[:9] != order[9:]


def test_rows_of_a_dataset_beyond_those_to_calibrate_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, want in ((2003, ["2000", "2001", "2002"]), (3, ["0", "1", "2"])):
        monkeypatch.setattr(calibration, "documents", lambda spec, count=count: (str(i) for i in range(count)))
        assert list(calibration.texts_beyond("hf:name")) == want
    assert list(calibration.texts_beyond("a.txt")) == ["0", "1", "2"]


def test_nothing_to_tune() -> None:
    with pytest.raises(RecipeError, match="finetune_reads tunes the reads of widths that have their own, and none has"):
        Recipe(finetune_reads=1000, refit_bits=0)
    with pytest.raises(RecipeError, match="finetune_rate is 0; it must be a positive number, for instance 0.003"):
        Recipe(finetune_rate=0)
