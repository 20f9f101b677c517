"""Quantization-aware training from the command's point of view."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import RESUME, Crash, Lines, Tiny, partial, sums
from torch import Tensor

from matquant import models, train
from matquant import qat as method
from matquant.checkpoint import verify
from matquant.errors import InputError, RecipeError
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("no_plots")
BATCH = 16 * 8


@pytest.fixture
def qat(recipe: Recipe) -> Recipe:
    """Ten steps."""
    return replace(recipe, method="qat", train_tokens=BATCH * 10, batch_tokens=BATCH, learning_rate=2e-3, eval_samples=3)


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(models.SafetensorsFiles(sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_every_width_predicts_the_text_better(kind: str, tiny: Tiny, qat: Recipe, tmp_path: Path) -> None:
    follow = Lines()
    before = quantize(str(tiny(kind)), tmp_path / "rtn", replace(qat, method="minmax"), RunOptions())
    after = quantize(str(tiny(kind)), tmp_path / "qat", qat, RunOptions(), follow)
    assert verify(tmp_path / "qat") == [] and ("training", 10, 10) in follow.stages
    for old, new in zip(before.rows[1:], after.rows[1:], strict=True):
        assert new.perplexity < old.perplexity - 3
    old, new = tensors(tmp_path / "rtn"), tensors(tmp_path / "qat")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    kinds = {name.rpartition(".")[2] if name[-1] not in "23" else name[-7:] for name in changed}
    assert set(old) == set(new) and {"weight", "scale"} <= kinds
    assert not [name for name in changed if "norm" in name or "ln_" in name or "embed" in name or "wte" in name or "lm_head" in name]
    assert all(0 < layer.errors[3] < layer.errors[2] < 1 for layer in after.layers)  # pyright: ignore


def test_weights_alone(tiny: Tiny, qat: Recipe, tmp_path: Path) -> None:
    alone = replace(qat, learn_scales=False, refit_bits=0, eval_samples=0)
    quantize(str(tiny("llama")), tmp_path / "rtn", replace(alone, method="minmax"), RunOptions())
    quantize(str(tiny("llama")), tmp_path / "qat", alone, RunOptions())
    old, new = tensors(tmp_path / "rtn"), tensors(tmp_path / "qat")
    changed = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"weight", "2"}  # planes


def test_interrupted_and_resumed(tiny: Tiny, qat: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = replace(qat, teachers={2: 3, 3: 0}, balance_gradients=True, finetune_reads=BATCH * 2)
    quantize(str(tiny("llama")), tmp_path / "whole", taught, RunOptions())
    out, log = tmp_path / "cut", train.Fit._log

    def kill(self: Any, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 6:
            raise Crash

    monkeypatch.setattr(method, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train.Fit, "_log", kill)
        quantize(str(tiny("llama")), out, taught, RunOptions())
    assert (partial(out) / "training" / "state").exists() and not any((partial(out) / "trained").iterdir())
    follow = Lines()
    quantize(str(tiny("llama")), out, taught, RESUME, follow)
    assert sums(out) == sums(tmp_path / "whole") and not partial(out).exists()
    assert min(done for stage, done, _ in follow.stages if stage == "training") == 7


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_made_twice_change_nothing(kind: str, tiny: Tiny, qat: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(qat, train_tokens=BATCH * 3, teachers={2: 3}, finetune_reads=BATCH, eval_samples=0)
    quantize(str(tiny(kind)), tmp_path / "kept", short, RunOptions())
    calls: list[Any] = []
    original = train.recomputed

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "recomputed", counted)
    quantize(str(tiny(kind)), tmp_path / "twice", short, RunOptions(gradient_checkpointing=True))
    assert calls and sums(tmp_path / "twice") == sums(tmp_path / "kept")


def test_losses_are_logged_and_tracked(tiny: Tiny, qat: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    short = replace(qat, train_tokens=BATCH * 3, finetune_reads=BATCH * 2, eval_samples=0)
    quantize(str(tiny("llama")), tmp_path / "out", short, RunOptions(track=("tensorboard",)))
    for name, widths, steps in (("training", "32", 3), ("tuning-3", "3", 2), ("tuning-2", "2", 2)):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(steps)) and all(set(row["loss"]) == set(widths) for row in rows)
        events = EventAccumulator(str(tmp_path / "out.logs" / name))
        events.Reload()
        for width in widths:
            tracked = [event.value for event in events.Scalars(f"loss/{width}")]
            assert tracked == pytest.approx([row["loss"][width] for row in rows])


def test_trackers_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"cannot track with 'tensorbord'; choose from tensorboard, trackio \(did you mean tensorboard\?\)"):
        RunOptions(track=("tensorbord",))
    monkeypatch.setattr(train, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(RecipeError, match="trackio is not installed; pip install trackio, or leave --track out"):
        RunOptions(track=("trackio",))


def test_random_widths(tiny: Tiny, qat: Recipe, tmp_path: Path) -> None:
    quantize(str(tiny("llama")), tmp_path / "out", replace(qat, random_width=True, eval_samples=0), RunOptions())
    assert verify(tmp_path / "out") == []


def test_an_early_end_is_told_and_one_at_once_is_an_error(tiny: Tiny, qat: Recipe, tmp_path: Path) -> None:
    follow, short = Lines(), replace(qat, eval_samples=0)
    with pytest.MonkeyPatch.context() as patch:
        answers = iter([True] * 3 + [False])
        patch.setattr(train, "math", SimpleNamespace(**vars(math) | {"isfinite": lambda value: next(answers)}))
        quantize(str(tiny("llama")), tmp_path / "late", short, RunOptions(), follow)
        assert "note: training ended early: gradients of step 3 were not finite" in follow.lines
        patch.setattr(train, "math", SimpleNamespace(**vars(math) | {"isfinite": lambda value: False}))
        with pytest.raises(
            InputError, match="training ended before its first step: gradients of step 0 were not finite; try a smaller --learning-rate"
        ):
            quantize(str(tiny("llama")), tmp_path / "never", short, RunOptions())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"teachers": {4: 8}, "targets": {2: 1}}, r"teachers names 4 bits, which is no target; choose from 2"),
        ({"teachers": {4: 2}}, r"2 bits cannot teach 4 bits; a teacher is wider, or 0 for the original model"),
        ({"teachers": {4: 9}}, r"cannot read 9 bits from a 8-bit parent"),
        ({"teachers_only": True}, r"teachers_only, but no width has a teacher; name some, for instance --teachers 2:8"),
        ({"method": "qat", "overlap": True}, r"method qat trains no overlapping residuals; switch overlap off"),
        ({"warmup": 1.5}, r"warmup is 1.5 and weight_decay 0.0; one is a share from 0 to 1"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be a positive number, for instance 1"),
        ({"divergence": "l2"}, r"divergence is 'l2'; choose from kl, reverse-kl, mse"),
        ({"decay": "linear"}, r"decay is 'linear'; choose from cosine, constant"),
    ],
)
def test_recipes_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe(**wrong)


def test_teachers_survive_a_file() -> None:
    recipe = Recipe(teachers={2: 8, 4: 0})
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.to_dict()["teachers"] == {"4": 0, "2": 8}
