"""Quantization-aware training: all quantized weights of a model trained through their reads (MatQuant, https://arxiv.org/abs/2502.06786).

    min over W, s, z, reads   sum_r lambda_r [ cross entropy of the next token + divergence from a teacher ]            (joint.py)

Training starts from the original weights on the grids that round-to-nearest takes (with `clip_search`, searched ones). Weights are float32
whatever the model computes in, and the codes are what they round to at the end. Embeddings, norms and the output head stay as they are.

What we add to the paper: scales, zeros and the reads of narrow widths may learn too (LSQ's gradient; weights alone are poor,
https://arxiv.org/abs/2407.11062), any slicing rule, and the choices of joint.py.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matquant import models
from matquant.blocks import BlockRun, Progress, is_whole
from matquant.corpus import Stream
from matquant.errors import InputError
from matquant.evaluate import logits_of
from matquant.joint import Joint
from matquant.recipe import ORIGINAL, Recipe
from matquant.report import LayerReport
from matquant.train import Fit, Means, Schedule, recompute_blocks, whole
from matquant.trainable import TrainedLinear
from matquant.tuning import CLIP, SAVE_SECONDS, SAVES, OpenSource


@dataclass(frozen=True)
class Training:
    """start: the grids to start from, finished. result: where the trained blocks go. folder: for the states."""

    open_source: OpenSource
    load_original: Any
    start: BlockRun
    result: BlockRun
    recipe: Recipe
    folder: Path
    means: Means
    stream: Stream
    follow: Progress

    def run(self) -> None:
        """Make the files of `result`, all of them or none. Raises InputError where training ended before its first step."""
        means = self.means
        if means.world.same(all(file.exists() and is_whole(file) for file in self.result.files)):
            return
        source = self.open_source()
        model = source.model
        models.materialize(source, model, "", means.device, means.dtype)
        model.tie_weights()
        model.requires_grad_(False).eval()
        layers: dict[str, TrainedLinear] = {}
        widths, narrowest, learn = self.recipe.layout.refit_widths, min(self.recipe.targets), self.recipe.learn_scales
        for name in self.start.layers.quantized:
            module = model.get_submodule(name)
            grid = self.start.weight(name)
            layers[name] = TrainedLinear(models.get_weight(module), grid, widths, narrowest, learn, module.bias).to(means.device)
            model.set_submodule(name, layers[name])
        if means.recompute:
            recompute_blocks(models.find_blocks(model)[1])
        trained = self._fit(model, layers).run()
        if trained.stopped:
            self.follow.line(f"note: training ended early: {trained.stopped}")
        if trained.stopped and not trained.steps:
            raise InputError(f"training ended before its first step: {trained.stopped}; try a smaller --learning-rate, or --train-dtype float32")
        for index in range(self.result.layers.count):
            names = self.result.layers.of_block(index)
            for name in names:
                whole(layers[name])
            self.result.save(index, {name: (layers[name].frozen(), self._report(name, layers[name])) for name in names}, {})
        means.world.wait()
        if means.world.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _fit(self, model: nn.Module, layers: dict[str, TrainedLinear]) -> Fit:
        recipe = self.recipe
        dtype = getattr(torch, recipe.train_dtype)
        original = self.load_original() if ORIGINAL in recipe.teachers.values() else None

        def teach(ids: Tensor) -> Tensor:
            with torch.autocast(self.means.device.type, dtype, enabled=dtype != torch.float32):
                return logits_of(original)(ids)

        joint = Joint(
            layers,
            recipe.importance,
            recipe.teachers,
            truth=not recipe.teachers_only,
            divergence=recipe.divergence,
            temperature=recipe.temperature,
            original=teach,
            random_width=recipe.random_width,
            seed=recipe.seed,
        )
        batch = max(recipe.batch_tokens // recipe.seq_len, 1)
        steps = max(recipe.train_tokens // (batch * recipe.seq_len), 1)
        size, warmup = self.means.slice_size(recipe.seq_len), round(recipe.warmup * steps)
        schedule = Schedule(steps, batch, size, warmup, recipe.decay, CLIP, max(steps // SAVES, 1), SAVE_SECONDS)
        weights = {"params": [layer.weight for layer in layers.values()], "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        scales = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad and p is not layer.weight]
        groups = [weights, *([{"params": scales, "lr": recipe.finetune_rate, "weight_decay": 0.0}] if scales else [])]
        follow = lambda done, of, words: self.follow("training", done, of)  # noqa: E731
        balance, log = recipe.balance_gradients, self.means.logs / "training.jsonl"
        return Fit(model, groups, joint, self.stream, schedule, self.folder, log, self.means.accelerator(), dtype, balance, follow=follow)

    def _report(self, name: str, layer: TrainedLinear) -> LayerReport:
        """Errors are those of the trained weights' reads: how far each width is from what the weights became."""
        shape = self.start.layers.quantized[name]
        weight, power = layer.weight.detach(), float(layer.weight.detach().square().sum())
        errors = {r: float((layer.weight_at(r).detach() - weight).square().sum()) / power if power > 0 else None for r in self.recipe.bits}
        return LayerReport(name, shape, errors, ())
