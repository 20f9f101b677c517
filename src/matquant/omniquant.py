"""OmniQuant (https://arxiv.org/abs/2308.13137): learn how far each group's range is clipped, and how inputs and weights share their scale.

    min over gamma, beta, s, delta   sum_r lambda_r L_r            L_r: error of the block's output at width r (refine.py) [+ the same from a teacher's]

    clipping        low = sigmoid(beta) min W', high = sigmoid(gamma) max W',  scale = (high - low) / (2^c - 1),  zero = round(-low / scale)
    transform       (X - delta) / s,  W' = W diag(s),  b' = b + W delta            the same output from other inputs and weights

of all layers of a block at once, for all targets (MatQuant, https://arxiv.org/abs/2502.06786, section 3.2). Weights stay as they are but for
rounding; both roundings pass gradients straight through (fake.py). Reads of narrow widths learn along (trainable.py).

What we change: training begins at the grid given, not at .982 of the range. Ranges may grow, up to `reach` times what the sigmoids give: the levels
of a narrow read take less than the whole range (2 bits cut by rounding 192 of 255 steps), and a range that can only shrink would never put one
on the largest weights, which carry most in many groups. Learning rates fall, unless `decay` is constant, as there.

The transform costs nothing when the model runs, because what makes the inputs takes over the other half: a norm its weight over s and its
bias minus delta over s, a linear layer its rows over s. Whether it can is not looked up but tried: where a random s, divided out, leaves the
block's output as it was, it can (`find_folds`). Shifts need biases on both sides.

Sequences held out of the training decide: a block whose sum of losses did not fall there is learned again at lower rates, and at last keeps the
grids that it started from. Single widths may lose: clipping that helps 2 bits costs 8, and lambda is what weighs one against the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant import models
from matquant.activations import Call
from matquant.codes import Grid, Slicing, levels, nearest_code
from matquant.fake import fake_read, rounded, snapped
from matquant.recipe import Recipe, decayed
from matquant.refine import Trainer, changed, held_out, split, words_of
from matquant.trainable import Reads, zero_of
from matquant.weight import NestedWeight

RATES = (1.0, 0.25, 0.0625)  # shares of the recipe's that are tried: the block that makes a first token of huge norm wants less than the others
START = 4.0  # sigmoid(4) = .982: next to no clipping, and a gradient (OmniQuant's own)


# --- where a transform can be folded ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """producer: the norm or linear layer that makes the inputs of the `consumers`, names in the block. shift: whether all have biases."""

    producer: str
    consumers: tuple[str, ...]
    shift: bool


def find_folds(
    block: nn.Module, call: Call, hidden: Float[Tensor, "1 length hidden"], layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]
) -> list[Fold]:
    """What can take over the scale of each group's inputs, at most one for a group. layers: to quantize. groups: those that share their inputs."""
    with torch.no_grad():
        want = call(block, hidden)
        found: list[Fold] = []
        for group in groups:
            size = models.layer_shape(layers[group[0]]).in_features
            makers = [name for name, module in block.named_modules() if name not in group and _outputs(module, layers.get(name)) == size]
            biased = {maker: all(getattr(block.get_submodule(name), "bias", None) is not None for name in (maker, *group)) for maker in makers}
            tries = (Fold(maker, tuple(group), shift) for maker in makers for shift in ((True, False) if biased[maker] else (False,)))
            found += next(([fold] for fold in tries if _same(block, call, hidden, want, fold, layers)), [])
    return found


def _outputs(module: nn.Module, layer: nn.Module | None) -> int:
    """Channels that a norm or a layer to quantize makes; 0 for any other module."""
    if layer is not None:
        return models.layer_shape(layer).out
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 1 else 0


def _same(block: nn.Module, call: Call, hidden: Tensor, want: Tensor, fold: Fold, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a random transform leaves the block's output as it was."""
    g = torch.Generator().manual_seed(0)
    size = models.layer_shape(layers[fold.consumers[0]]).in_features
    s = (torch.rand(size, generator=g) + 0.5).to(want)
    delta = (torch.randn(size, generator=g) if fold.shift else torch.zeros(size)).to(want)
    weights = {name: models.get_weight(module) for name, module in layers.items()}
    got = call.with_weights(block, transformed(block, layers, weights, {fold: (s, delta)}), hidden)
    return torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().mean()))


Parameters = dict[str, Tensor]  # by name in the block
Grids = dict[str, tuple[Tensor, Tensor]]  # (scale, zero) by layer
Transforms = Mapping[Fold, tuple[Tensor, Tensor]]  # fold -> (s, delta)


def transformed(block: nn.Module, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor], transforms: Transforms) -> dict[str, Tensor]:
    """All parameters that the transforms change, and all weights of `layers`, by their names in the block, as the modules hold them.

    weights: [out, in] in float32, by layer.
    """
    rows = dict(weights)
    others: dict[str, Tensor] = {}
    for fold, (s, delta) in transforms.items():
        for name in fold.consumers:
            if fold.shift:
                others[f"{name}.bias"] = others.get(f"{name}.bias", block.get_submodule(name).bias) + rows[name] @ delta
            rows[name] = rows[name] * s
    for fold, (s, delta) in transforms.items():
        producer = block.get_submodule(fold.producer)
        if fold.producer in rows:
            rows[fold.producer] = rows[fold.producer] / s[:, None]
        else:
            others[f"{fold.producer}.weight"] = producer.weight / s
        if getattr(producer, "bias", None) is not None:
            others[f"{fold.producer}.bias"] = (others.get(f"{fold.producer}.bias", producer.bias) - delta) / s
    return {**{f"{name}.weight": models.held_as(layers[name], w) for name, w in rows.items()}, **others}


# --- training ---------------------------------------------------------------------------------------------------------


def reach(bits: int, grid: Grid, slicing: Slicing) -> float:
    """How wide a range may be, in ranges of the weights: until the levels read at `bits` lie as far apart as the smallest and the largest weight."""
    reads = levels(bits, grid, slicing)
    return max(grid.max_code / float(reads[-1] - reads[0]), 1.0)


class Clipping(nn.Module):
    """The range of each group of one layer, as shares of what its weights span, and the reads of narrow widths."""

    def __init__(self, start: NestedWeight, w: Float[Tensor, "out in"], widths: Sequence[int], narrowest: int) -> None:
        """start: its grid is where the shares begin, as far as a sigmoid goes. w: the weights that it was made for.

        widths: those with reads of their own. narrowest: of the targets.
        """
        super().__init__()
        self.rule, self.dtype = (start.grid, start.slicing), start.scale.dtype
        wg, scale, zero = w.reshape(*start.scale.shape, -1), start.scale.float(), zero_of(start)
        low, high = (-wg.amin(-1)).clamp(min=0), wg.amax(-1).clamp(min=0)
        if start.grid.symmetric:
            low = high = torch.maximum(low, high)
            zero = torch.full_like(scale, start.grid.max_code / 2)
        top = torch.tensor(START).sigmoid()
        shares = [(part * scale / edge).nan_to_num(1.0, 1.0) for part, edge in ((start.grid.max_code - zero, high), (zero, low))]
        # Ends of a grid may lie beyond the weights, by half a step from its rounded zero alone: what begins there is not cut.
        self.reach_high, self.reach_low = ((share / top).clamp(min=reach(narrowest, start.grid, start.slicing)) for share in shares)
        gamma, beta = ((share / most).clamp(1 - top, top).logit() for share, most in zip(shares, (self.reach_high, self.reach_low), strict=True))
        self.gamma, self.beta = nn.Parameter(gamma), nn.Parameter(beta)
        self.reads = Reads(start, widths)

    def grid(self, w: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(scale, zero) as they are stored."""
        grid = self.rule[0]
        wg = w.reshape(*self.gamma.shape, -1)
        lowest, highest = wg.min(-1).values, wg.max(-1).values  # not amin and amax, whose way back makes masks of all weights
        low, high = lowest.clamp(max=0) * (self.beta.sigmoid() * self.reach_low), highest.clamp(min=0) * (self.gamma.sigmoid() * self.reach_high)
        if grid.symmetric:
            scale = snapped(torch.maximum(high, -low) * (2 / grid.max_code), self.dtype)
            return scale, torch.full_like(scale, grid.center)
        scale = snapped((high - low) / grid.max_code, self.dtype)
        return scale, rounded(-low / scale, 0, grid.max_code)

    def read(self, w: Float[Tensor, "out in"], bits: int, grid: Sequence[Float[Tensor, "out groups"]]) -> Float[Tensor, "out in"]:
        """W_r of weights w on their `grid`."""
        own = self.reads.rounded(bits) if bits in self.reads.widths else ()
        return fake_read(w, *grid, bits, *self.rule, *own)

    def frozen(self, w: Float[Tensor, "out in"]) -> NestedWeight:
        """What `read` reads, in integers."""
        grid, slicing = self.rule
        scale, zero = (part.detach() for part in self.grid(w))
        codes = nearest_code(w.reshape(*scale.shape, -1) / scale[..., None] + zero[..., None], grid).reshape(w.shape)
        return NestedWeight(codes, scale.to(self.dtype), None if grid.symmetric else zero.to(torch.uint8), grid, slicing, self.reads.refits())


class Transform(nn.Module):
    """s = exp(a) and delta of one fold."""

    def __init__(self, size: int, shift: bool, device: torch.device) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(size, device=device))
        self.delta = nn.Parameter(torch.zeros(size, device=device), requires_grad=shift)

    def value(self) -> tuple[Tensor, Tensor]:
        return self.a.exp(), self.delta


@dataclass(frozen=True)
class _Shared:
    """What the reads of all widths are made of in one step: made once, its gradients summed before they go back through the making.

    made: rows of the layers, other parameters of the block, grids of the layers. leaves: the same, cut off.
    """

    trainer: Trainer
    clippings: Mapping[str, Clipping]
    made: tuple[Parameters, Parameters, Grids]
    leaves: tuple[Parameters, Parameters, Grids]

    @staticmethod
    def of(trainer: Trainer, clippings: Mapping[str, Clipping], rows: Parameters, others: Parameters) -> "_Shared":
        cut = lambda t: t.detach().requires_grad_(t.requires_grad)  # noqa: E731
        grids = {name: clipping.grid(rows[name]) for name, clipping in clippings.items()}
        ends = {name: (cut(scale), cut(zero)) for name, (scale, zero) in grids.items()}
        leaves = {name: cut(w) for name, w in rows.items()}, {name: cut(p) for name, p in others.items()}, ends
        return _Shared(trainer, clippings, (rows, others, grids), leaves)

    def at(self, bits: int) -> Parameters:
        """All parameters of the block that change, as they are read at a width."""
        rows, others, grids = self.leaves
        reads = {name: clipping.read(rows[name], bits, grids[name]) for name, clipping in self.clippings.items()}
        return {**{f"{name}.weight": w for name, w in self.trainer.weights_of(reads).items()}, **others}

    def backward(self) -> None:
        """From the gradients of the leaves to those of what is learned."""
        flat = lambda parts: [*parts[0].values(), *parts[1].values(), *(t for grid in parts[2].values() for t in grid)]  # noqa: E731
        pairs = [(made, leaf.grad) for made, leaf in zip(flat(self.made), flat(self.leaves), strict=True) if leaf.grad is not None]
        torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True)
class Learned:
    """weights: by layer name in the block. goals: what they stand for. others: parameters that a transform changed, by name in the block.

    change: as in refine.Refined.
    """

    weights: Mapping[str, NestedWeight]
    goals: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    change: Mapping[int, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Learner:
    """One block. weights: original ones [out, in] in float32, by layer name in the block. starts: their grids to begin with."""

    trainer: Trainer
    weights: Mapping[str, Float[Tensor, "_ in"]]
    starts: Mapping[str, NestedWeight]
    recipe: Recipe

    def learn(self, groups: Sequence[Sequence[str]]) -> Learned:
        """groups: layers that share their inputs. Deterministic for `recipe.seed`."""
        recipe, trainer = self.recipe, self.trainer
        hidden = trainer.streams[max(recipe.targets)][:1]
        folds = trainer.world.same(find_folds(trainer.block, trainer.call, hidden, trainer.layers, groups) if recipe.transform else [])
        before = held_out(trainer, self.starts, recipe)
        lam, notes = self._lam(before), list[str]()
        for rate in RATES:
            clippings, transforms = self._begin(folds)
            slower = f" at {rate:g} of the rates" if rate < 1 else ""
            if not self._train(clippings, transforms, lam, rate):
                notes.append(f"learned clipping{slower} diverged")
                continue
            rows, others, found = self._end(clippings, transforms)
            after = held_out(trainer, found, recipe, others)
            change = changed(before, after)
            told = words_of(change)
            if sum(lam[r] * after[r] for r in lam) <= sum(lam[r] * before[r] for r in lam):
                places = f", {len(folds)} transforms" if folds else ""
                words = f"clipping learned{slower}{places}; loss on sequences held out, of the loss before: {told}"
                return Learned(found, rows, others, change, (*notes, words))
            notes.append(f"learned clipping{slower} was worse on sequences held out ({told})")
        return Learned(self.starts, self.weights, {}, {}, (*notes, "the block keeps the grids that it started from"))

    def _begin(self, folds: Sequence[Fold]) -> tuple[dict[str, Clipping], dict[Fold, Transform]]:
        recipe, device = self.recipe, next(iter(self.weights.values())).device
        clippings = {
            name: Clipping(start, self.weights[name], recipe.layout.refit_widths, min(recipe.targets)) for name, start in self.starts.items()
        }
        return clippings, {fold: Transform(self.weights[fold.consumers[0]].shape[1], fold.shift, device) for fold in folds}

    @torch.no_grad()
    def _end(self, clippings: Mapping[str, Clipping], transforms: Mapping[Fold, Transform]) -> tuple[Parameters, Parameters, dict[str, NestedWeight]]:
        """(weights of the layers [out, in], other parameters of the block, the layers' integers)."""
        rows, others = self._parameters(transforms)
        return rows, others, {name: clipping.frozen(rows[name]) for name, clipping in clippings.items()}

    def _lam(self, before: Mapping[int, float]) -> dict[int, float]:
        """What each loss is multiplied by: normalized, its share of what the grids to begin with lose."""
        normalize = self.recipe.normalize
        return {r: lam / before[r] if normalize and before[r] > 0 else lam for r, lam in self.recipe.importance.items()}

    def _parameters(self, transforms: Mapping[Fold, Transform]) -> tuple[Parameters, Parameters]:
        """(weights of the layers [out, in], other parameters of the block) after the transforms."""
        block, layers = self.trainer.block, self.trainer.layers
        changed = transformed(block, layers, self.weights, {fold: transform.value() for fold, transform in transforms.items()})
        rows = {name: models.as_rows(module, changed.pop(f"{name}.weight")) for name, module in layers.items()}
        return rows, changed

    def _train(self, clippings: Mapping[str, Clipping], transforms: Mapping[Fold, Transform], lam: Mapping[int, float], rate: float) -> bool:
        """rate: share of the recipe's rates. False if a loss was not finite."""
        recipe, trainer = self.recipe, self.trainer
        samples, _ = split(len(trainer.goal))
        count = min(max(recipe.refine_tokens // (trainer.goal.shape[1] * trainer.world.size), 1), len(samples))
        steps = min(trainer.world.gather(-(-len(samples) // count)))
        groups = [
            {"params": [p for c in clippings.values() for p in (c.gamma, c.beta)], "lr": rate * recipe.clip_rate},
            {"params": [p for c in clippings.values() for p in c.reads.parameters()], "lr": rate * recipe.finetune_rate},
            {"params": [p for t in transforms.values() for p in t.parameters() if p.requires_grad], "lr": rate * recipe.transform_rate},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decayed(recipe.decay, step / (recipe.epochs * steps)))
        generator = torch.Generator().manual_seed(recipe.seed)
        for _ in range(recipe.epochs):
            order = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
            for step in range(steps):
                chosen = order[step * count : (step + 1) * count]
                finite = self._step(clippings, transforms, lam, chosen)
                if trainer.world.total(not finite):
                    return False
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    parameter.grad = trainer.world.sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                optimizer.step()
                decay.step()
                optimizer.zero_grad()
        return True

    def _step(self, clippings: Mapping[str, Clipping], transforms: Mapping[Fold, Transform], lam: Mapping[int, float], chosen: list[int]) -> bool:
        """Add the gradients of some sequences. False, with some of them, if a loss is not finite."""
        with torch.enable_grad():
            shared = _Shared.of(self.trainer, clippings, *self._parameters(transforms))
        parts = [chosen] if self.trainer.together else [[sample] for sample in chosen]
        if not all(self._backward(shared, lam, part) for part in parts):
            return False
        shared.backward()
        return True

    def _backward(self, reads: _Shared, lam: Mapping[int, float], part: list[int]) -> bool:
        """One width after another, so that one graph is held at a time, and the wide ones first, which may teach."""
        trainer, recipe = self.trainer, self.recipe
        made: dict[int, Tensor] = {}  # what teachers say of these sequences
        for bits, weight in sorted(lam.items(), reverse=True):
            teacher = recipe.teachers.get(bits)
            with torch.enable_grad(), torch.autocast(trainer.goal.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
                output = trainer.output(reads.at(bits), bits, part)
                loss = output.new_zeros(()) if teacher is not None and recipe.teachers_only else trainer.error(output, part)
                if teacher is not None:
                    if teacher not in made:
                        with torch.no_grad():
                            made[teacher] = trainer.output(reads.at(teacher), teacher, part)
                    loss = loss + trainer.error(output, part, made[teacher])
                loss = loss * weight
            if not loss < float("inf"):
                return False
            loss.backward()
            if bits in recipe.teachers.values():
                made[bits] = output.detach()
        return True
