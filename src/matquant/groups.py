"""Quantize one block: group after group of layers that share their input, in the order in which the block calls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant import activations, methods, models
from matquant.activations import Inputs
from matquant.factor import factorize_all
from matquant.objective import row_losses
from matquant.omniquant import Learner
from matquant.plan import Shape
from matquant.recipe import ORIGINAL, Recipe
from matquant.refine import Trainer, refine
from matquant.refit import refit
from matquant.repair import repair
from matquant.report import LayerReport
from matquant.residual import HIGH, fit_residual
from matquant.weight import NestedWeight, Refit
from matquant.world import ALONE, World, union

Results = dict[str, tuple[NestedWeight, LayerReport]]


@dataclass
class BlockState:
    """One block, and for every stream the weights that its layers have in it so far: the original ones until they are quantized.

    prefix: the block's name in the model. names: its layers to quantize, full names. streams: hidden states by width, and the
    original's, which go through the block first; empty if the recipe looks at no activations; of several processes, each has its share.
    copy_file: where to keep a copy of the original's inputs, if not in memory.
    """

    block: nn.Module
    prefix: str
    names: list[str]
    call: activations.Call | None
    streams: dict[int, Tensor]
    recipe: Recipe
    copy_file: Path | None = None
    world: World = ALONE
    layers: dict[str, nn.Module] = field(init=False)
    weights: dict[int, dict[str, Tensor]] = field(init=False)
    stages: list[list[list[str]]] = field(init=False)
    seen: activations.Seen = field(init=False, default=activations.Seen())  # moments of the original's inputs, if a width is calibrated on them
    original: Tensor | None = field(init=False, default=None)  # these inputs, of the sequences that every stream has, where wanted
    passed: bool = field(init=False, default=False)  # the original's stream went through the block
    others: dict[str, Tensor] = field(init=False, default_factory=dict[str, Tensor])  # parameters besides these weights that quantization changed

    def __post_init__(self) -> None:
        self.layers = {name: self.block.get_submodule(name.removeprefix(self.prefix + ".")) for name in self.names}
        held = {name: layer.weight.data for name, layer in self.layers.items()}
        self.weights = {width: dict(held) for width in (ORIGINAL, *self.recipe.stream_widths)}

    def put(self, name: str, weight: NestedWeight) -> None:
        """Let every stream read `name` at its own width from now on."""
        for width in self.recipe.stream_widths:
            self.weights[width][name] = models.held_as(self.layers[name], weight.read(width).dense())

    def quantize(self, tell: Callable[[LayerReport], None]) -> Results:
        """All layers, in the order of `names`."""
        self._start()
        results: Results = {}
        for stage in self.stages:
            inputs = self._inputs([members[0] for members in stage])
            own = [self._group(members, inputs.get(members[0])) for members in stage[self.world.rank :: self.world.size]]
            for name, (weight, report) in union(self.world.gather(union(own))).items():
                results[name] = weight, report
                self.put(name, weight)
                if not self._refined:
                    tell(report)
        if self._refined:
            results = self._learn(results) if self.recipe.method == "omniquant" else self._refine(results)
            for _, report in results.values():
                tell(report)
        return {name: results[name] for name in self.names}

    def _group(self, members: list[str], known: Inputs | None) -> Results:
        """Layers that share their inputs."""
        weights = {name: self._original(name) for name in members}
        found = quantize_group(weights, known or self._unknown(weights), self.recipe)
        if known is not None or self.call is None:
            return found
        words = "no token reached it: its inputs count as equally strong"
        return {name: (weight, replace(report, notes=(words, *report.notes))) for name, (weight, report) in found.items()}

    @property
    def _refined(self) -> bool:
        return self.recipe.method in ("block", "omniquant") and self.call is not None and bool(self.names)

    def _start(self) -> None:
        """Find the order of the layers, and send the original's stream through the block."""
        if self.call is None:
            self.stages = [[[name] for name in self.names]]
            return
        hidden, first = self.streams[ORIGINAL], min(map(len, self.streams.values()))
        activations.place(self.layers, self.weights[ORIGINAL])
        self.stages = self.world.same(activations.stages(self.block, self.call, hidden, self.layers))
        if self.recipe.asymmetric_calibration > 0 or self._refined:
            self.original = activations.like(hidden[:first], self.copy_file)
        leaders = [members[0] for stage in self.stages for members in stage] if ORIGINAL in self._used else []
        some = first if self.world.total(len(hidden) - first) else None
        self.seen = activations.pass_original(self.block, self.call, hidden, self.weights[ORIGINAL], self.layers, leaders, some, self.world)
        self.passed = True

    @property
    def _groups(self) -> list[list[str]]:
        """Layers that share their inputs, in the order in which they are called."""
        return [members for stage in self.stages for members in stage]

    def _local(self, name: str) -> str:
        """A layer's name in the block."""
        return name.removeprefix(self.prefix + ".")

    def _trainer(self) -> Trainer:
        """What trains all layers of the block together, against the original's outputs."""
        assert self.call is not None and self.original is not None
        recipe = self.recipe
        inputs_of = {**self.streams, ORIGINAL: self.original}
        widths = {*recipe.targets, *recipe.layout.refit_widths, *recipe.teachers.values()}
        streams = {r: inputs_of[recipe.stream_of(r)][: len(self.original)] for r in widths}
        layers = {self._local(name): layer for name, layer in self.layers.items()}
        goal, dtype = self.streams[ORIGINAL][: len(self.original)], getattr(torch, recipe.refine_dtype)
        together = self.call.takes_many(self.block, self.original)
        return Trainer(self.block, self.call, layers, streams, goal, together, dtype, recipe.token_power, self.world)

    def _learn(self, results: Results) -> Results:
        """Learn the ranges of all layers, and what their inputs' makers can take over (omniquant.py). Errors are of the weights that it ends with."""
        weights = {self._local(name): self._original(name) for name in results}
        starts = {self._local(name): weight for name, (weight, _) in results.items()}
        learner = Learner(self._trainer(), weights, starts, self.recipe)
        learned = learner.learn([[self._local(name) for name in members] for members in self._groups])
        self.others = dict(learned.others)
        found: Results = {}
        for name, (_, report) in results.items():
            weight, w = learned.weights[self._local(name)], learned.goals[self._local(name)]
            self.put(name, weight)
            errors = layer_errors(w, weight, self._unknown({name: w}), self.recipe)
            notes = (*report.notes, *learned.notes) if name == self.names[0] else report.notes
            found[name] = weight, replace(report, errors=errors, notes=notes)
        return found

    def _refine(self, results: Results) -> Results:
        """Train all layers together (refine.py), and measure them anew."""
        recipe, local, groups = self.recipe, {name: self._local(name) for name in self.names}, self._groups
        trainer = self._trainer()
        inputs = self._inputs([members[0] for members in groups])  # as GPTQ left them: training moves them little

        def below(weights: Mapping[str, NestedWeight], planes: int, recipe: Recipe) -> dict[str, NestedWeight]:
            found: dict[str, NestedWeight] = {}
            for members in groups:
                w = torch.cat([self._original(name) for name in members])
                stacked = _stack([weights[local[name]] for name in members])
                fitted = fit_below(stacked, w, inputs.get(members[0]) or self._unknown({"": w}), recipe, planes)
                ends = torch.tensor([0, *(len(weights[local[name]].codes) for name in members)]).cumsum(0).tolist()
                found |= {local[name]: _rows(fitted, slice(start, end)) for name, start, end in zip(members, ends, ends[1:], strict=False)}
            return self.world.same(found)

        weights = {local[name]: weight for name, (weight, _) in results.items()}
        refined = refine(trainer, weights, below, recipe)
        leader = {name: members[0] for members in groups for name in members}
        found: Results = {}
        for name, (_, report) in results.items():
            weight, w = refined.weights[local[name]], self._original(name)
            self.put(name, weight)
            errors = layer_errors(w, weight, inputs.get(leader[name]) or self._unknown({name: w}), recipe)
            notes = (*report.notes, *refined.notes) if name == self.names[0] else report.notes
            stages_of = {**report.stages, "block": {r: errors[r] for r in recipe.targets if r in errors}}
            found[name] = weight, replace(report, errors=errors, notes=notes, stages=stages_of)
        return found

    def advance(self) -> dict[int, float]:
        """Send every stream through the block. Returns the relative error of its output by width."""
        if self.call is None:
            return {}
        if not self.passed:
            activations.pass_original(self.block, self.call, self.streams[ORIGINAL], self.weights[ORIGINAL], self.layers)
        for name, value in self.others.items():
            self.block.get_parameter(name).data = value
        narrow = {width: hidden for width, hidden in self.streams.items() if width != ORIGINAL}
        return activations.propagate(self.block, self.call, narrow, self.weights, self.layers, self.streams[ORIGINAL], self.world)

    @property
    def _used(self) -> set[int]:
        """The streams that some width is calibrated on."""
        return {self.recipe.stream_of(r) for r in (*self.recipe.targets, *self.recipe.bits)}

    def _inputs(self, leaders: list[str]) -> dict[str, Inputs]:
        if self.call is None:
            return {}
        narrow = {width: hidden for width, hidden in self.streams.items() if width in self._used - {ORIGINAL}}
        original = self.original if self.recipe.asymmetric_calibration > 0 else None
        return activations.statistics(self.block, self.call, narrow, self.weights, self.layers, leaders, self.seen, original, self.world)

    def _original(self, name: str) -> Tensor:
        activations.place(self.layers, {name: self.weights[ORIGINAL][name]})
        return models.get_weight(self.layers[name])

    def _unknown(self, weights: Mapping[str, Tensor]) -> Inputs:
        w = next(iter(weights.values()))
        equal = torch.eye(w.shape[1], device=w.device)
        return Inputs(dict.fromkeys((ORIGINAL, *self.recipe.stream_widths), equal))


def quantize_group(weights: Mapping[str, Float[Tensor, "_ in"]], inputs: Inputs, recipe: Recipe) -> Results:
    """Quantize layers that share their input, stacked by rows: rows do not interact, and one pass over columns serves all.

    weights: name -> float32 [out, in]. inputs: second moments of the shared input.
    """
    w = torch.cat(list(weights.values()))
    recipe = replace(recipe, overlap=False) if recipe.method == "block" else recipe  # its residual is fitted after the high nibble
    chosen = methods.load(recipe.method)(w, inputs, recipe)
    finite = all(h.isfinite().all() for h in inputs.h.values())
    notes = chosen.notes if finite or chosen.notes else ("the Hessian is not finite: its inputs count as equally strong",)
    usable = {stream: h if h.isfinite().all() else torch.eye(len(h), device=h.device) for stream, h in inputs.h.items()}
    h = {bits: usable[recipe.stream_of(bits)] for bits in recipe.bits}
    missing = tuple(bits for bits in recipe.layout.refit_widths if bits not in chosen.weight.refits)
    nested, _ = refit(chosen.weight, dict.fromkeys(missing, w), h, missing)
    loss = {bits: row_losses(w, nested.read(bits).dense(), h[bits]) for bits in recipe.bits}
    power = {stream: row_losses(w, torch.zeros_like(w), own) for stream, own in usable.items()}
    results: Results = {}
    start = 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        start += len(weight)
        relative = {stage: _relative(table, power, rows, recipe) for stage, table in {**chosen.stages, "": loss}.items()}
        errors = relative.pop("")
        results[name] = _rows(nested, rows), LayerReport(name, Shape(*weight.shape), errors, notes, relative)
    return results


def fit_below(weight: NestedWeight, w: Float[Tensor, "out in"], inputs: Inputs, recipe: Recipe, planes: int) -> NestedWeight:
    """`weight` with the planes below the first `planes` fitted to `w` anew, for all wider targets; below the high nibble with overlap
    if the recipe says so."""
    if planes < HIGH:
        return repair(weight, w, inputs, recipe, planes)
    used = {recipe.stream_of(r): inputs.h[recipe.stream_of(r)] for r in (*recipe.targets, *recipe.bits, recipe.parent_bits) if r > HIGH}
    factors = factorize_all(used, recipe.damping, recipe.act_order)
    on_grid = replace(weight, grid=recipe.grid, refits={r: fit for r, fit in weight.refits.items() if r <= HIGH})
    fitted, _ = fit_residual(on_grid, w, inputs, factors, recipe, planes)
    wide = tuple(r for r in recipe.layout.refit_widths if r > HIGH)
    return refit(fitted, dict.fromkeys(wide, w), {r: factors[recipe.stream_of(r)].damped for r in wide}, wide)[0]


def layer_errors(w: Float[Tensor, "out in"], weight: NestedWeight, inputs: Inputs, recipe: Recipe) -> dict[int, float | None]:
    """Relative output error of one layer at every width offered."""
    power = {stream: row_losses(w, torch.zeros_like(w), h) for stream, h in inputs.h.items()}
    loss = {bits: row_losses(w, weight.read(bits).dense(), inputs.h[recipe.stream_of(bits)]) for bits in recipe.bits}
    return _relative(loss, power, slice(None), recipe)


def _relative(loss: Mapping[int, Tensor], power: Mapping[int, Tensor], rows: slice, recipe: Recipe) -> dict[int, float | None]:
    """Losses of some rows, as a share of what reading zero would lose; None for 0 / 0."""
    whole = {bits: power[recipe.stream_of(bits)][rows].sum().item() for bits in loss}
    return {bits: loss[bits][rows].sum().item() / whole[bits] if whole[bits] > 0 else None for bits in loss}


def _stack(weights: list[NestedWeight]) -> NestedWeight:
    """Layers with one grid and the same refits as one: their rows below each other."""
    first = weights[0]
    refits = {r: Refit(torch.cat([w.refits[r].scale for w in weights]), torch.cat([w.refits[r].zero for w in weights])) for r in first.refits}
    zero = None if first.zero is None else torch.cat([w.zero for w in weights if w.zero is not None])
    return replace(first, codes=torch.cat([w.codes for w in weights]), scale=torch.cat([w.scale for w in weights]), zero=zero, refits=refits)


def _rows(weight: NestedWeight, rows: slice) -> NestedWeight:
    refits = {bits: Refit(fit.scale[rows], fit.zero[rows]) for bits, fit in weight.refits.items()}
    zero = None if weight.zero is None else weight.zero[rows]
    return replace(weight, codes=weight.codes[rows], scale=weight.scale[rows], zero=zero, refits=refits)
