"""Block refinement: move integers by gradients until a quantized block gives what the original block gives on the original's inputs.

    min over q, k, u   sum over tokens   |y_r - y|^2 / max(|y|, |y_r|)^2      y_r = block_r(x_r), y = block(x),      for r = the targets up to 4 bits

GPTQ looks at one layer at a time. Here all layers of a block are trained at once (EfficientQAT's Block-AP,
https://arxiv.org/abs/2407.11062), each width fed from its own stream, through latents behind the codes that may move a little
(latent.py). Every token counts alike: without the quotient the first token, whose power is 10^4 times the others' in many
models (https://arxiv.org/abs/2402.17762), would be all that counts. Over the original's power alone it would be a token that gets such a power
where it should not: by that measure it is 10^4 times as wrong as one that should and does not. What errors are divided by gets no gradient.

Widths fight over the shared code: trained together, each flips codes that the others had placed well. So they take turns, from
coarse to fine, and what is trained is frozen before the next:

    for width r, ascending:   train the planes of r and its read
                              freeze them; sweep over the planes below for all wider targets, refit (repair.py)
    train the reads of every width up to 4 bits, codes frozen
    fit the low nibble for the wide reads, with `overlap` or without (residual.py)

A code moves `refine_reach` at most at 4 bits, and twice as far with each bit less: a weight in the wrong cell costs the wide reads the square
of its way back, and of all weights twice as many lie near a border of 4 bits as of 3.

Straight-through training is noise to a width whose codes are nearly right, and an exact sweep repairs at once what a hundred
steps do not win back. What we change against the sources: several widths, planes frozen in turn, and sweeps between.

Some sequences are held out of the training. A block that gets worse there at any target is trained again with a shorter reach,
then with its codes left alone; reads that do no better there stay as they were. Latents are float32 whatever the block computes in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant import models
from matquant.activations import Call
from matquant.latent import Latent
from matquant.recipe import Recipe
from matquant.residual import HIGH
from matquant.weight import NestedWeight
from matquant.world import ALONE, World

HELD_OUT = 8  # one sequence in so many is held out
BALANCINGS = 3  # how often at most the low nibble is fitted with other weights, for a wide width that came off badly
READ_RATE = 0.01  # of a read's scale, relative to 1, and of its zero, relative to a step of the width
BETAS = (0.9, 0.95)

NONE: Mapping[str, Tensor] = MappingProxyType({})
Weights = dict[str, NestedWeight]  # by layer name in the block
Repair = Callable[[Mapping[str, NestedWeight], int, Recipe], Weights]


@dataclass(frozen=True)
class Trainer:
    """One block in training. layers: name in the block -> its module. streams: width -> inputs; goal: the original's outputs.

    together: whether one call may hold several sequences. dtype: what the block computes in while it is trained. power: a token's error
    counts over its power, the original's or the read one's, whichever is larger, to this. Each of several processes has sequences of its own; losses and gradients are of all.
    """

    block: nn.Module
    call: Call
    layers: Mapping[str, nn.Module]
    streams: Mapping[int, Float[Tensor, "samples length hidden"]]
    goal: Float[Tensor, "samples length hidden"]
    together: bool = True
    dtype: torch.dtype = torch.float32
    power: float = 1.0
    world: World = ALONE

    def loss(self, weights: Mapping[str, Tensor], bits: int, samples: Sequence[int]) -> Tensor:
        """Squared error of the block's output, summed over the tokens of some sequences; float32. weights: by layer name."""
        return self.loss_with({f"{name}.weight": w for name, w in weights.items()}, bits, samples)

    def loss_with(self, parameters: Mapping[str, Tensor], bits: int, samples: Sequence[int]) -> Tensor:
        """The same, whichever of the block's parameters are given, by their names."""
        return self.error(self.output(parameters, bits, samples), samples)

    def output(self, parameters: Mapping[str, Tensor], bits: int, samples: Sequence[int]) -> Float[Tensor, "some length hidden"]:
        """What the block makes of its inputs at a width; in float32."""
        return self.call.with_weights(self.block, parameters, self.streams[bits][samples]).float()

    def error(
        self, output: Float[Tensor, "some length hidden"], samples: Sequence[int], teacher: Float[Tensor, "some length hidden"] | None = None
    ) -> Tensor:
        """Squared error, summed over the tokens of `samples`, of the block's output: from the original's, or a teacher's instead."""
        goal = self.goal[samples].float().to(output.device)
        power = torch.maximum(goal.square().sum(-1), output.detach().square().sum(-1))
        squares = (output - (goal if teacher is None else teacher)).square().sum(-1)
        return (squares / (power + 1e-9 * power.mean() + 1e-30) ** self.power).sum()

    def held(self, weights: Mapping[str, NestedWeight], bits: int, samples: Sequence[int], others: Mapping[str, Tensor] = NONE) -> float:
        """The same of weights as they are read, without gradients, a sequence at a time. others: more of the block's parameters, by name."""
        reads = self.weights_of({name: weight.read(bits).dense() for name, weight in weights.items()})
        with torch.no_grad():
            parameters = {**{f"{name}.weight": w for name, w in reads.items()}, **others}
            return self.world.total(sum(self.loss_with(parameters, bits, [sample]).item() for sample in samples))

    def weights_of(self, reads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense weights as the modules hold them."""
        return {name: models.held_as(self.layers[name], w) for name, w in reads.items()}

    def step(self, latents: Mapping[str, Latent], bits: int, samples: Sequence[int]) -> tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """(loss, gradients of y, m, u of every layer) at one width."""
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights_of({n: latent.read(bits) for n, latent in latents.items()}).items()}
        total, sums = 0.0, [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves.values()]
        device = next(iter(leaves.values())).device.type
        with torch.enable_grad(), torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            for part in [samples] if self.together else [[sample] for sample in samples]:
                loss = self.loss(leaves, bits, part)
                for running, grad in zip(sums, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True):
                    if grad is not None:  # an expert that no token reached has none
                        running += grad
                total += loss.item()
        rows = {name: models.as_rows(self.layers[name], self.world.sum(running)) for name, running in zip(leaves, sums, strict=True)}
        return self.world.total(total), {name: latent.gradients(rows[name], bits) for name, latent in latents.items()}


@dataclass(frozen=True)
class Refined:
    """weights: by layer name in the block. change: loss on the sequences held out, after over before, of every target.

    notes: what was given up, and why, and what became of it.
    """

    weights: Mapping[str, NestedWeight]
    change: Mapping[int, float]
    notes: tuple[str, ...] = ()


def refine(trainer: Trainer, weights: Mapping[str, NestedWeight], repair: Repair, recipe: Recipe) -> Refined:
    """Better integers for a block, or the same; deterministic for `recipe.seed`.

    weights: by layer name in the block. repair(weights, planes, recipe): the same high planes, the planes below fitted anew for the wider
    targets; from `planes` = 4 on, put on the grid of the checkpoint, overlapping or not.
    """
    low = sorted(r for r in recipe.targets if r <= HIGH)
    reads = sorted({r for weight in weights.values() for r in weight.refits if r <= HIGH and r in trainer.streams})
    before = held_out(trainer, weights, recipe)
    notes: list[str] = []
    for reach in (recipe.refine_reach, recipe.refine_reach / 2, 0.0):
        attempt = _Attempt(trainer, repair, recipe, reach, before)
        found = attempt.run(weights, low, reads)
        if found is None:
            notes.append(f"block refinement with reach {reach:g} diverged")
            continue
        after = held_out(trainer, found, recipe)
        change = changed(before, after)
        worse = [r for r, value in change.items() if not value <= 1]
        told = words_of(change)
        if not worse:
            words = f"block refined with reach {reach:g}" if reach else "only reads of the block refined"
            return Refined(found, change, (*notes, f"{words}; loss on sequences held out, of the loss before: {told}"))
        notes.append(f"block refinement with reach {reach:g} was worse on sequences held out: {told}")
    kept = repair(weights, HIGH, recipe) if recipe.overlap else dict(weights)
    return Refined(kept, {}, (*notes, "block not refined"))


def held_out(trainer: Trainer, weights: Mapping[str, NestedWeight], recipe: Recipe, others: Mapping[str, Tensor] = NONE) -> dict[int, float]:
    """Loss of every target on the sequences held out. others: as in `Trainer.held`."""
    _, samples = split(len(trainer.goal))
    return {r: trainer.held(weights, r, samples, others) for r in recipe.targets}


def changed(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    """Loss of every target after training, over that before."""
    return {r: after[r] / before[r] if before[r] > 0 else 1.0 for r in before}


def words_of(change: Mapping[int, float]) -> str:
    """`changed`, as notes tell it."""
    return ", ".join(f"{bits} bits {value:.3f}" for bits, value in change.items())


@dataclass(frozen=True)
class _Attempt:
    """Refinement with one reach. before: losses on the sequences held out, of every target."""

    trainer: Trainer
    repair: Repair
    recipe: Recipe
    reach: float
    before: Mapping[int, float]

    def run(self, weights: Mapping[str, NestedWeight], low: Sequence[int], reads: Sequence[int]) -> Weights | None:
        """All stages in turn; None if some loss was not finite."""
        current: Weights | None = dict(weights)
        fixed = 0
        for bits in low if self.reach else ():
            current = self.train(current, bits, fixed)
            if current is None:
                return None
            fixed = bits
            if bits < HIGH:
                current = self.repair(current, bits, self.recipe)
        for bits in reads:
            trained = self.train(current, bits, fixed=bits)
            if trained is None:
                return None
            current = self.better(current, trained, bits)
        return self.low_nibble(current) if self.reach or self.recipe.overlap else current

    def low_nibble(self, weights: Weights) -> Weights:
        """The planes below the high nibble, fitted for the wide targets. While some of these lose more than before and others do not,
        they count more in the next try: twice as much, then by a factor of 2^(1/2), then of 2^(1/4)."""
        recipe, samples = self.recipe, split(len(self.trainer.goal))[1]
        wide = [r for r in recipe.targets if r > HIGH]
        found = self.repair(weights, HIGH, recipe)
        for attempt in range(BALANCINGS):
            worse = [r for r in wide if self.trainer.held(found, r, samples) > self.before[r]]
            if not worse or len(worse) == len(wide):
                break
            recipe = replace(recipe, targets={r: lam * (2.0 ** (0.5**attempt) if r in worse else 1) for r, lam in recipe.targets.items()})
            found = self.repair(weights, HIGH, recipe)
        return found

    def better(self, weights: Weights, trained: Weights, bits: int) -> Weights:
        """Whichever reads `bits` with less loss on the sequences held out."""
        _, samples = split(len(self.trainer.goal))
        return trained if self.trainer.held(trained, bits, samples) <= self.trainer.held(weights, bits, samples) else weights

    def train(self, weights: Weights, bits: int, fixed: int) -> Weights | None:
        """The planes of `bits` from `fixed` on, and its read; its read alone if these are none. None if a loss was not finite."""
        recipe, moving, reach = self.recipe, fixed < bits, self.reach * 2.0 ** (HIGH - bits)
        latents = {name: Latent.of(weight, (bits,), fixed, reach) for name, weight in weights.items()}
        groups: list[dict[str, Any]] = []
        if moving:  # a linear decay to 0 sums to half the first rate a step
            groups.append({"params": [latent.y for latent in latents.values()], "lr": 2 * reach / recipe.refine_steps})
        own = [latent for latent in latents.values() if bits in latent.start.refits]
        if own:
            groups.append({"params": [latent.m[bits] for latent in own], "lr": READ_RATE})
            groups.append({"params": [latent.u[bits] for latent in own], "lr": READ_RATE * 2.0 ** (8 - bits)})
        if not groups:
            return weights
        # torch's fused step on a CPU takes gradients to lie in memory as their parameters do, and does not look: `step` gives them so
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-30, fused=True)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / recipe.refine_steps)
        for chosen in _draws(split(len(self.trainer.goal))[0], self.trainer.goal.shape[1] * self.trainer.world.size, recipe):
            loss, gradients = self.trainer.step(latents, bits, chosen)
            if not loss < float("inf") or not all(part.sum().isfinite() for parts in gradients.values() for part in parts):
                return None
            for name, (dy, dm, du) in gradients.items():
                latents[name].y.grad, latents[name].m[bits].grad, latents[name].u[bits].grad = dy, dm, du
            optimizer.step()
            decay.step()
            for latent in latents.values():
                latent.bound()
        return {name: latent.frozen(bits) if moving else latent.with_reads() for name, latent in latents.items()}


def _draws(samples: list[int], length: int, recipe: Recipe) -> list[list[int]]:
    """The sequences of every step: as many as hold `refine_tokens`, at least one. length: tokens of a sequence of every process."""
    generator = torch.Generator().manual_seed(recipe.seed)
    count = min(max(recipe.refine_tokens // length, 1), len(samples))
    return [[samples[i] for i in torch.randperm(len(samples), generator=generator)[:count].tolist()] for _ in range(recipe.refine_steps)]


def split(samples: int) -> tuple[list[int], list[int]]:
    """(sequences to train on, sequences held out): every eighth, and at least one, is held out; a single one serves for both."""
    held = list(range(0, samples, min(HELD_OUT, max(samples - 1, 1))))[: max(samples // 2, 1)]
    return [sample for sample in range(samples) if sample not in held] or held, held
