"""End-to-end tuning of the reads: codes frozen, scales and zeros of the narrow widths learn to predict what the original predicts.

    min over (m, u) of all layers   mean over tokens  KL(p || q_r)            p: the original's next-token distribution, q_r: the r-bit read's

one width after another, each for itself, so that none can hurt another: the second phase of EfficientQAT
(https://arxiv.org/abs/2407.11062, E2E-QP), which trains the scales of a single width on the next token; the original's predictions teach more
per token. Sequences held out of the training decide whether a width keeps what it has learned.

Every width is a training of its own (train.py); its result is one safetensors file, so that a killed run goes on where it was.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from matquant import models
from matquant.blocks import Progress, is_whole, save_whole
from matquant.corpus import Stream
from matquant.evaluate import logits_of, measure
from matquant.joint import Joint
from matquant.recipe import ORIGINAL, Recipe
from matquant.train import Fit, Means, Schedule, recompute_blocks, whole
from matquant.trainable import TunedLinear, read_at
from matquant.weight import NestedWeight

WARMUP = 0.05  # of the steps
CLIP = 1.0
SAVES = 20  # states a training saves, at most
SAVE_SECONDS = 60.0  # between two at least: a state is three times as large as what is trained

OpenSource = Callable[[], models.Source]


@dataclass(frozen=True)
class Tuning:
    """folder: where results and states lie. open_source: as it was quantized. load_original: the model before all that.

    held: sequences that decide. stream: endless others.
    """

    open_source: OpenSource
    load_original: Callable[[], Any]
    weights: Mapping[str, NestedWeight]
    recipe: Recipe
    folder: Path
    means: Means
    held: Int[Tensor, "samples length"]
    stream: Stream
    follow: Progress

    @property
    def files(self) -> dict[int, Path]:
        return dict(zip(self.recipe.layout.refit_widths, tuned_files(self.folder, self.recipe), strict=True))

    def run(self) -> None:
        """Make the file of every width that has none."""
        todo = self.means.world.same([bits for bits, file in self.files.items() if not (file.exists() and is_whole(file))])
        if not todo:
            return
        original = self.load_original()
        for bits in todo:
            self._tune(bits, original)

    def _tune(self, bits: int, original: Any) -> None:
        model, layers = student(self.open_source(), self.weights, self.recipe.layout.refit_widths, self.means.device, self.means.dtype)
        if self.means.recompute:
            recompute_blocks(models.find_blocks(model)[1])
        reads = [layer.reads for layer in layers.values()]
        own = [part[str(bits)] for read in reads for part in (read.reach, read.v)]
        for part in own:
            part.requires_grad_(True)
        start = [{name: part.detach().clone() for name, part in read.state_dict().items()} for read in reads]
        before = self._kl(model, layers, bits, original)
        trained = self._fit(bits, model, layers, own, original).run()
        after = self._kl(model, layers, bits, original)
        for read in reads:
            whole(read)
        if trained.stopped:
            self.follow.line(f"note: tuning of {bits} bits ended early: {trained.stopped}")
        if not after < before:
            self.follow.line(f"note: {bits} bits keep their reads: KL on sequences held out is {before:.4g}, and tuned {after:.4g}")
            after = before
            for read, was in zip(reads, start, strict=True):
                read.load_state_dict(was)
        refits = {name: layer.reads.refits()[bits] for name, layer in layers.items()}
        tensors = {f"{name}.{kind}.{bits}": getattr(fit, kind).cpu() for name, fit in refits.items() for kind in ("scale", "zero")}
        if self.means.world.first:
            save_whole(self.files[bits], tensors, {"kl": json.dumps([before, after])})
            shutil.rmtree(self._states(bits), ignore_errors=True)
        self.means.world.wait()

    def _states(self, bits: int) -> Path:
        return self.folder / f"training-{bits}"

    def _fit(self, bits: int, model: nn.Module, layers: Mapping[str, TunedLinear], parameters: list[nn.Parameter], original: Any) -> Fit:
        recipe = self.recipe
        dtype = getattr(torch, recipe.train_dtype)

        def teach(ids: Tensor) -> Tensor:
            with torch.autocast(self.means.device.type, dtype, enabled=dtype != torch.float32):
                return logits_of(original)(ids)

        batch = max(recipe.batch_tokens // recipe.seq_len, 1)
        steps = max(recipe.finetune_reads // (batch * recipe.seq_len), 1)
        size = self.means.slice_size(recipe.seq_len)
        schedule = Schedule(steps, batch, size, max(round(WARMUP * steps), 1), "cosine", CLIP, max(steps // SAVES, 1), SAVE_SECONDS)
        group = {"params": parameters, "lr": recipe.finetune_rate, "weight_decay": 0.0}
        joint = Joint(layers, {bits: 1.0}, {bits: ORIGINAL}, truth=False, original=teach)
        follow = lambda done, of, words: self.follow(f"tuning {bits} bits", done, of)  # noqa: E731
        name, accelerator = f"tuning-{bits}", self.means.accelerator()
        log = self.means.logs / f"{name}.jsonl"
        return Fit(model, [group], joint, self.stream, schedule, self._states(bits), log, accelerator, dtype, name=name, follow=follow)

    def _kl(self, model: nn.Module, layers: Mapping[str, nn.Module], bits: int, original: Any) -> float:
        """To the original, on the sequences held out."""
        found = measure(logits_of(model), logits_of(original), self.held, [(str(bits), lambda: read_at(layers, bits))])[1].kl
        assert found is not None
        return self.means.world.same(found)


def tuned_files(folder: Path, recipe: Recipe) -> list[Path]:
    """Where the tuned reads of every width lie, widest first; none if the recipe tunes none."""
    return [folder / f"{bits}.safetensors" for bits in recipe.layout.refit_widths] if recipe.finetune_reads else []


def changes(files: Sequence[Path]) -> dict[int, tuple[float, float]]:
    """KL to the original on the sequences held out, before and after, by width."""
    stored = models.SafetensorsFiles(list(files))
    kl = {int(file.stem): json.loads(stored.metadata(file)["kl"]) for file in files}
    return {bits: (before, after) for bits, (before, after) in kl.items()}


def student(
    source: models.Source, weights: Mapping[str, NestedWeight], widths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, TunedLinear]]:
    """(the source's model with layers to tune in the place of those that were quantized; these, by name). Nothing is trained yet."""
    model = source.model
    models.materialize(source, model, "", device, dtype)
    model.tie_weights()
    layers: dict[str, TunedLinear] = {}
    for name, weight in weights.items():
        layers[name] = TunedLinear(weight, widths, model.get_submodule(name).bias).to(device)
        model.set_submodule(name, layers[name])
    return model.requires_grad_(False).eval(), layers
