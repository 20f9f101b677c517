"""Joint loss over widths: sum_r lambda_r L_r, one width after another (MatQuant, https://arxiv.org/abs/2502.06786, Eq. 7).

    L_r = [cross entropy of the next token]  +  [divergence from the logits of a teacher]

A teacher is another width of the same model, read with the same weights (co-distillation, `{2: 8}`), or the original model
(`{2: 0}`). It gets no gradient. A width with a teacher may keep the truth beside it, or see the teacher alone; a width without one
sees the truth.

Widths run one after another, each with a backward of its own, so that memory does not grow with their number: widest first, so that
the logits of a width that teaches are there when they are wanted.

With `random_width` each layer draws a width of its own for the step (DropBits' idea, https://arxiv.org/abs/2109.02100): one forward
instead of one a width, and mixed plans are trained for. Widths are drawn in proportion to lambda.

With `balance` lambda_r weighs gradients rather than losses: weights are lambda_r / |g_r|, where |g_r| is the norm of the width's own
gradient, measured now and then (GradNorm's aim, https://arxiv.org/abs/1711.02257, without its own training).
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matquant.losses import Divergence, distance, next_token
from matquant.recipe import ORIGINAL
from matquant.trainable import read_at

MIXED = 0  # what stands for the width of a loss where every layer has its own

Forward = Callable[[Tensor], Tensor]
"""ids Int[Tensor, "batch length"] -> logits Float[Tensor, "batch length vocab"]"""


@dataclass(frozen=True)
class Part:
    """What one backward pass is for: lambda_r L_r, and L_r by itself, which stays where it is until somebody wants to know."""

    bits: int
    weighted: Float[Tensor, ""]
    value: Float[Tensor, ""]

    @property
    def loss(self) -> float:
        return self.value.item()


@dataclass
class Joint:
    """layers: in training, by name. original: wanted where ORIGINAL teaches. truth: beside a teacher too."""

    layers: Mapping[str, nn.Module]
    targets: Mapping[int, float]
    teachers: Mapping[int, int] = field(default_factory=dict[int, int])
    truth: bool = True
    divergence: Divergence = "kl"
    temperature: float = 1.0
    original: Forward | None = None
    random_width: bool = False
    seed: int = 0
    norms: dict[int, float] = field(default_factory=dict[int, float])  # |g_r|, where lambda weighs gradients

    @property
    def passes(self) -> int:
        """How many parts there are."""
        return 1 if self.random_width else len(self.targets)

    @property
    def weights(self) -> dict[int, float]:
        """What each L_r is multiplied by; they sum to the lambdas' sum."""
        raw = {r: lam / self.norms.get(r, 1.0) for r, lam in self.targets.items()}
        return {r: weight * sum(self.targets.values()) / sum(raw.values()) for r, weight in raw.items()} if self.norms else raw

    def parts(self, forward: Forward, ids: Int[Tensor, "batch length"], step: int) -> Iterator[Part]:
        """One after another; the caller makes the backward of each before it asks for the next."""
        logits = self._teachers(forward, ids)
        if self.random_width:
            read_at(self.layers, self._drawn(step))
            yield self._part(MIXED, 1.0, forward(ids), next(iter(logits.values()), None), ids)
            return
        for bits, weight in sorted(self.weights.items(), reverse=True):
            read_at(self.layers, bits)
            found = forward(ids)
            if bits in self.teachers.values():
                logits[bits] = found.detach()
            yield self._part(bits, weight, found, logits.get(self.teachers[bits]) if bits in self.teachers else None, ids)

    def _teachers(self, forward: Forward, ids: Tensor) -> dict[int, Tensor]:
        """Logits of the teachers that are not in training at this step; of all widths under `random_width`, where the widest teaches."""
        wanted = set(self.teachers.values())
        wide = {r for r in wanted if r != ORIGINAL and (self.random_width or r not in self.targets)}
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            if ORIGINAL in wanted:
                assert self.original is not None
                found[ORIGINAL] = self.original(ids)
            for bits in sorted(wide, reverse=True)[: 1 if self.random_width else None]:
                read_at(self.layers, bits)
                found[bits] = forward(ids)
        return found

    def _part(self, bits: int, weight: float, logits: Tensor, teacher: Tensor | None, ids: Tensor) -> Part:
        parts = [next_token(logits, ids)] if teacher is None or self.truth else []
        if teacher is not None:
            parts.append(distance(logits, teacher, self.divergence, self.temperature))
        loss = torch.stack(parts).sum()
        return Part(bits, loss * weight, loss.detach())

    def _drawn(self, step: int) -> dict[str, int]:
        """A width for every layer; the same in all processes and after a resume."""
        draw, widths = random.Random(f"{self.seed}, {step}"), list(self.targets)
        return dict(zip(self.layers, draw.choices(widths, [self.targets[r] for r in widths], k=len(self.layers)), strict=True))
