"""Block refinement: train the rounding and each low width's scale and zero so that a block's output stays what it was.

GPTQ looks at one layer at a time. Here a whole block is compared with the original block on the original's inputs, each width fed
from its own stream, and the integers are moved until the outputs agree:

    min over q, m, u   sum_r ||block_r(x_r) - block(x)||^2           r = the targets up to 4 bits

* Reads. The two bytes of a refit (codes.py) are trained as floats and rounded in every forward pass. Most of the gain is theirs, at
  learning rates far above the usual (docs/LOG.md).
* Rounding. A latent y (float, in units of the 4-bit code) stands behind every high nibble: p_4 = floor(y), p_r = floor(y / 2^(4-r)).
  It starts at the 8-bit code, y = (q + 1/2) / 16, so that what moves first is what lay near a border and costs other widths least.
  Gradients pass the floor as if it were not there (straight-through, https://arxiv.org/abs/1308.3432; trained rounding with a
  bounded shift is AutoRound's, https://arxiv.org/abs/2309.05516; all parameters of a block at once are EfficientQAT's,
  https://arxiv.org/abs/2407.11062).
* Widths fight over the shared latent, and the 2-bit loss is a hundred times the 4-bit one. So each width's gradient is divided by its
  own norm before they are added: gradients are balanced, not losses. Favoured widths count three times.

Then the high nibble is frozen, and the low one is fitted to the original weight for the wide reads (residual.py), with `overlap` or
without. Some sequences are held out of the training: a block that gets worse there at any target, or whose loss is not finite,
keeps what it had. Latents and losses are float32 whatever the block computes in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant import models
from matquant.activations import Call
from matquant.codes import UNIT, read_rule
from matquant.recipe import Recipe
from matquant.weight import NestedWeight, Refit

HIGH = 4  # bits of the high nibble
REACH = 1.0  # 4-bit codes that a latent may move; at these rates none comes near it
HELD_OUT = 8  # one sequence in so many is held out
WORSE = 1.0  # a loss above this share of the one before is worse
BETAS = (0.9, 0.95)
M_RATE, U_RATE = 6.0, 1200.0  # relative to the rate of y


@dataclass
class Latent:
    """What is trained of one layer: y [out, in], and m, u [out, groups] of every width."""

    start: NestedWeight
    origin: Float[Tensor, "out in"]
    y: Float[Tensor, "out in"]
    m: dict[int, Float[Tensor, "out groups"]]
    u: dict[int, Float[Tensor, "out groups"]]

    @property
    def trained(self) -> list[int]:
        """The widths whose m and u are trained: those that store them."""
        return [r for r in self.m if r in self.start.refits]

    @staticmethod
    def of(weight: NestedWeight, widths: Sequence[int]) -> "Latent":
        y = (weight.codes.float() + 0.5) / 2 ** (weight.grid.bits - HIGH)
        zero = torch.full_like(weight.scale, weight.grid.center).float() if weight.zero is None else weight.zero.float()
        m = {r: weight.refits[r].scale.float() / UNIT if r in weight.refits else torch.ones_like(zero) for r in widths}
        u = {r: weight.refits[r].zero.float() if r in weight.refits else zero * 2.0 ** (8 - weight.grid.bits) for r in widths}
        return Latent(weight, y.clone(), y, m, u)

    def sliced(self, bits: int) -> Float[Tensor, "out groups size"]:
        out, groups = self.start.scale.shape
        return (self.y / 2 ** (HIGH - bits)).floor().reshape(out, groups, -1)

    def bytes(self, bits: int) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(m, u) as the two bytes hold them."""
        return (self.m[bits] * UNIT).round().clamp(1, 255) / UNIT, self.u[bits].round().clamp(0, 255)

    def read(self, bits: int) -> Float[Tensor, "out in"]:
        """The weight at `bits`, as codes.refit_affine reads it."""
        grid = self.start.grid
        step, shift = read_rule(bits, grid, self.start.slicing)
        m, u = self.bytes(bits)
        s, middle = self.start.scale.float(), grid.max_code / 2
        offset = s * (m * (shift - middle) + middle - u * 2.0 ** (grid.bits - 8))
        return torch.addcmul(offset[..., None], self.sliced(bits), (s * (m * step))[..., None]).reshape(self.y.shape)

    def gradients(self, dw: Float[Tensor, "out in"], bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """(dL/dy, dL/dm, dL/du) from dL/dw, the floor passed straight through."""
        grid = self.start.grid
        step, shift = read_rule(bits, grid, self.start.slicing)
        s, p = self.start.scale.float(), self.sliced(bits)
        dwg = dw.reshape(p.shape)
        dy = (dwg * (s * self.m[bits] * (step / 2 ** (HIGH - bits)))[..., None]).reshape(dw.shape)
        total = dwg.sum(-1)
        dm = s * (step * (dwg * p).sum(-1) + (shift - grid.max_code / 2) * total)
        return dy, dm, -s * 2.0 ** (grid.bits - 8) * total

    def bound(self) -> None:
        """Keep y within reach of where it started and within the codes."""
        top = 2.0**HIGH - 1e-3
        torch.minimum(torch.maximum(self.y, (self.origin - REACH).clamp(min=0)), (self.origin + REACH).clamp(max=top), out=self.y)

    def frozen(self) -> NestedWeight:
        """The integers. The low nibble is that nearest to where the 8-bit code was."""
        d = self.start.grid.bits - HIGH
        high = self.y.floor()
        low = (self.start.codes.float() - high * 2**d).clamp(0, 2**d - 1)
        codes = (high * 2**d + low).to(torch.uint8)
        refits = dict(self.start.refits)
        for r in self.trained:
            m, u = self.bytes(r)
            refits[r] = Refit((m * UNIT).to(torch.uint8), u.to(torch.uint8))
        return replace(self.start, codes=codes, refits=refits)


@dataclass(frozen=True)
class Trainer:
    """One block in training. layers: name in the block -> its module. streams: width -> inputs; goal: the original's outputs."""

    block: nn.Module
    call: Call
    layers: Mapping[str, nn.Module]
    streams: Mapping[int, Float[Tensor, "samples length hidden"]]
    goal: Float[Tensor, "samples length hidden"]

    def loss(self, weights: Mapping[str, Tensor], bits: int, sample: int) -> Tensor:
        """Squared error of the block's output on one sequence, float32."""
        output = self.call.with_weights(self.block, {f"{name}.weight": w for name, w in weights.items()}, self.streams[bits][sample][None])
        return (output[0].float() - self.goal[sample].float()).square().sum()

    def held(self, weights: Mapping[str, Tensor], bits: int, samples: Sequence[int]) -> float:
        """The same over several sequences, without gradients."""
        with torch.no_grad():
            return sum(self.loss(weights, bits, sample).item() for sample in samples)

    def weights_of(self, reads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: models.held_as(self.layers[name], w) for name, w in reads.items()}

    def step(self, latents: Mapping[str, Latent], bits: int, samples: Sequence[int]) -> tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """(loss, gradients of y, m, u of every layer) at one width."""
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights_of({n: latent.read(bits) for n, latent in latents.items()}).items()}
        total = 0.0
        dws = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves.values()]
        for sample in samples:
            loss = self.loss(leaves, bits, sample)
            for dw, grad in zip(dws, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                dw += grad
            total += loss.item()
        as_rows = [models.as_rows(self.layers[name], dw) for name, dw in zip(leaves, dws, strict=True)]
        return total, {name: latents[name].gradients(dw, bits) for name, dw in zip(leaves, as_rows, strict=True)}


@dataclass(frozen=True)
class Refined:
    """weights: by layer name in the block. change: loss on the sequences held out, after over before, of every target.

    kept: why the weights are those that came in; "" if they are refined.
    """

    weights: Mapping[str, NestedWeight]
    change: Mapping[int, float]
    kept: str = ""

    @property
    def note(self) -> str:
        """One line for the report."""
        change = ", ".join(f"{bits} bits {value:.2f}" for bits, value in self.change.items())
        return (
            f"block refinement changed nothing: {self.kept}"
            if self.kept
            else f"block refined; loss on sequences held out, of the loss before: {change}"
        )


Residual = Callable[[Mapping[str, NestedWeight]], dict[str, NestedWeight]]


def refine(trainer: Trainer, weights: Mapping[str, NestedWeight], residual: Residual, recipe: Recipe, seed: int) -> Refined:
    """Train, fit the residual, and keep the result if it is better, or as good, on the sequences held out at every target.

    weights: by layer name in the block. residual: puts weights on the grid of the checkpoint, their low planes fitted anew.
    """
    widths = [r for r in recipe.targets if r <= HIGH]
    plain = residual(weights) if recipe.overlap else dict(weights)
    trained = train(trainer, weights, widths, recipe, seed) if widths else None
    if trained is None:
        return Refined(plain, {}, "its loss was not finite" if widths else "no target is at most 4 bits wide")
    found = residual(trained)
    before, after = (held_out(trainer, each, recipe) for each in (weights, found))
    change = {r: after[r] / before[r] if before[r] > 0 else 1.0 for r in before}
    worse = [r for r, value in change.items() if not value <= WORSE]
    if worse:
        return Refined(plain, change, "it was worse on sequences held out at " + ", ".join(f"{r} bits ({change[r]:.2f} of the loss)" for r in worse))
    return Refined(found, change)


def held_out(trainer: Trainer, weights: Mapping[str, NestedWeight], recipe: Recipe) -> dict[int, float]:
    """Loss of every target on the sequences held out."""
    _, samples = split(len(trainer.goal))
    reads = {r: trainer.weights_of({name: weight.read(r).dense() for name, weight in weights.items()}) for r in recipe.targets}
    return {r: trainer.held(reads[r], r, samples) for r in reads}


def train(trainer: Trainer, weights: Mapping[str, NestedWeight], widths: Sequence[int], recipe: Recipe, seed: int) -> dict[str, NestedWeight] | None:
    """The high nibbles and reads of `widths` after training; None if some loss was not finite. weights: by layer name in the block."""
    latents = {name: Latent.of(weight, widths) for name, weight in weights.items()}
    samples, _ = split(len(trainer.goal))
    generator = torch.Generator().manual_seed(seed)
    rates = {"y": recipe.refine_rate, "m": recipe.refine_rate * M_RATE, "u": recipe.refine_rate * U_RATE}
    groups = {
        "y": [latent.y for latent in latents.values()],
        "m": [latent.m[r] for latent in latents.values() for r in latent.trained],
        "u": [latent.u[r] for latent in latents.values() for r in latent.trained],
    }
    optimizer = torch.optim.Adam([{"params": groups[kind], "lr": rate} for kind, rate in rates.items()], betas=BETAS, eps=1e-30)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe.refine_steps)
    for _ in range(recipe.refine_steps):
        chosen = [samples[i] for i in torch.randperm(len(samples), generator=generator)[: recipe.refine_batch].tolist()]
        for latent in latents.values():
            latent.y.grad = torch.zeros_like(latent.y)
        for bits in widths:
            loss, grads = trainer.step(latents, bits, chosen)
            norm = sum(dy.square().sum() for dy, _, _ in grads.values()) ** 0.5
            if not (torch.isfinite(norm) and loss < float("inf")):
                return None
            share = recipe.importance[bits] / recipe.targets[bits] / norm.clamp(min=1e-30)
            for name, (dy, dm, du) in grads.items():
                latents[name].y.grad += share * dy
                latents[name].m[bits].grad, latents[name].u[bits].grad = dm, du
        optimizer.step()
        decay.step()
        for latent in latents.values():
            latent.bound()
    return {name: latent.frozen() for name, latent in latents.items()}


def split(samples: int) -> tuple[list[int], list[int]]:
    """(sequences to train on, sequences held out): every eighth, and at least one, is held out."""
    held = list(range(0, samples, min(HELD_OUT, max(samples - 1, 1))))[: max(samples // 2, 1)]
    return [sample for sample in range(samples) if sample not in held] or held, held
