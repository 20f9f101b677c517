"""Learned clipping and transforms: the same function, the gradients of gamma and beta, and what a run does with them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grids import make_grid
from runs import RESUME, Crash, Tiny, crash_at, sums
from torch import Tensor
from walks import Walk

from matquant import activations, models
from matquant.checkpoint import verify
from matquant.codes import SLICINGS, Grid, Slicing, fit_grid, nearest_code, read_rule, slice_codes
from matquant.errors import RecipeError
from matquant.models import get_weight
from matquant.omniquant import START, Clipping, Fold, Learner, Transform, find_folds, reach, transformed
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Decay, Recipe
from matquant.refine import Trainer, split
from matquant.weight import NestedWeight

pytestmark = pytest.mark.usefixtures("no_plots")


# --- folds ------------------------------------------------------------------------------------------------------------

MLP = ("mlp.gate_proj", "mlp.up_proj")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [Fold("input_layernorm", QKV, False), Fold("post_attention_layernorm", MLP, False), Fold("mlp.up_proj", ("mlp.down_proj",), False)]
FOLDS = {
    "llama": LLAMA,
    "qwen2": LLAMA,  # q, k and v have biases, the norm has none
    "gemma2": [Fold("mlp.up_proj", ("mlp.down_proj",), False)],  # its norms multiply by 1 + weight
    "mixtral": [Fold("input_layernorm", QKV, False)],  # the router reads the other norm too
    "opt": [
        Fold("self_attn_layer_norm", QKV, True),
        Fold("self_attn.v_proj", ("self_attn.out_proj",), True),
        Fold("final_layer_norm", ("fc1",), True),
        Fold("fc1", ("fc2",), False),  # relu(x / s) = relu(x) / s
    ],
    "gpt2": [Fold("ln_1", ("attn.c_attn",), True), Fold("ln_2", ("mlp.c_fc",), True)],
    "phi": [Fold("input_layernorm", (*QKV, "mlp.fc1"), True)],
}


def folds_of(folder: Path, kind: str) -> tuple[Walk, dict[str, torch.nn.Module], list[Fold]]:
    walk = Walk(folder)
    layers = {name.removeprefix(f"{walk.prefix}.0."): module for name, module in walk.of_block(0).items()}
    stages = activations.stages(walk.blocks[0], walk.calls[0], walk.hidden, layers)
    return walk, layers, find_folds(walk.blocks[0], walk.calls[0], walk.hidden[:1], layers, [group for stage in stages for group in stage])


@pytest.mark.parametrize("kind", FOLDS)
def test_where_a_transform_can_be_folded(kind: str, tiny: Tiny) -> None:
    walk, layers, folds = folds_of(tiny(kind), kind)
    names = lambda folds: {(f.producer, frozenset(f.consumers), f.shift) for f in folds}  # noqa: E731
    assert names(folds) == names(FOLDS[kind])
    g = torch.Generator().manual_seed(1)
    sizes = {fold: models.layer_shape(layers[fold.consumers[0]]).in_features for fold in folds}
    drawn = {f: (torch.rand(n, generator=g) + 0.5, torch.randn(n, generator=g) * f.shift) for f, n in sizes.items()}
    weights = {name: get_weight(module) for name, module in layers.items()}
    changed = transformed(walk.blocks[0], layers, weights, drawn)  # all at once
    with torch.no_grad():
        want, got = walk.calls[0](walk.blocks[0], walk.hidden[:1]), walk.calls[0].with_weights(walk.blocks[0], changed, walk.hidden[:1])
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().mean()), rtol=1e-3)
    assert not torch.allclose(changed[f"{folds[0].consumers[0]}.weight"], layers[folds[0].consumers[0]].weight, atol=1e-2)


# --- clipping ---------------------------------------------------------------------------------------------------------


def on_grid(w: Tensor, grid: Grid, slicing: Slicing, shrink: float = 1.0) -> NestedWeight:
    """To nearest, on a grid that spans the weights of each group, times `shrink`."""
    wg = w.reshape(len(w), -1, grid.group_size)
    s, z = fit_grid(wg, grid, torch.float16, shrink)
    t = wg / s[..., None] + (grid.center if z is None else z[..., None])
    return NestedWeight(nearest_code(t, grid).reshape(w.shape), s.half(), None if z is None else z.to(torch.uint8), grid, slicing)


def start(parent: int, symmetric: bool, slicing: Slicing, shrink: float) -> tuple[Tensor, NestedWeight]:
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    return w, on_grid(w, make_grid(parent, 8, symmetric), slicing, shrink)


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_begins_at_the_grid_and_reads_as_its_integers(symmetric: bool, slicing: Slicing) -> None:
    w, weight = start(8, symmetric, slicing, 0.7)
    clipping = Clipping(weight, w, (2,), 2)
    for bits in (8, 4, 2):
        assert torch.allclose(clipping.read(w, bits, clipping.grid(w)), clipping.frozen(w).read(bits).dense(), atol=1e-6)
    begins_at(weight, clipping.grid(w))


@pytest.mark.parametrize(("parent", "narrowest"), [(8, 8), (8, 6), (8, 2), (2, 2)])
@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_of_whole_ranges_begins_at_them(symmetric: bool, slicing: Slicing, parent: int, narrowest: int) -> None:
    """A sigmoid of .982 alone would cut off 4 of 255 steps before anything was learned: 8 bits were up to ten times as wrong as on the grid."""
    w, weight = start(parent, symmetric, slicing, 1.0)
    clipping = Clipping(weight, w, (), narrowest)
    begins_at(weight, clipping.grid(w))
    if reach(narrowest, weight.grid, slicing) == 1.0:
        assert float(clipping.gamma.detach().max()) == pytest.approx(START, abs=1e-3)


def begins_at(weight: NestedWeight, grid: tuple[Tensor, Tensor]) -> None:
    """To the bit where a range has two ends; a sigmoid cannot make an end 0."""
    scale, zero = (part.detach() for part in grid)
    whole = torch.ones_like(scale).bool() if weight.zero is None else (weight.zero > 0) & (weight.zero < weight.grid.max_code)
    assert torch.equal(scale[whole], weight.scale.float()[whole]) and whole.float().mean() > 0.6
    assert torch.allclose(scale, weight.scale.float(), rtol=0.01)
    assert weight.zero is None or torch.equal(zero, weight.zero.float())


def test_how_wide_a_range_may_be() -> None:
    """2 of 8 bits: levels 64 apart, or 0 to 256 with an overflow, which no range needs to grow for."""
    wide = make_grid(8, 8, False)
    found = {(slicing, bits): reach(bits, wide, slicing) for slicing in SLICINGS for bits in (8, 3, 2)}
    spans = {2: 192, 3: 224, 8: 255}
    assert found == {(slicing, bits): 1.0 if slicing == "round-overflow" else 255 / spans[bits] for slicing, bits in found}
    assert reach(2, make_grid(2, 8, False), "floor") == 1.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_may_grow_until_narrow_levels_span_it(symmetric: bool) -> None:
    w, weight = start(8, symmetric, "round", 1.0)
    clipping = Clipping(weight, w, (), 2)
    assert torch.allclose(clipping.grid(w)[0], weight.scale.float(), rtol=0.01)  # begins where the weights end
    with torch.no_grad():
        for share in (clipping.gamma, clipping.beta):
            share.fill_(20.0)
    assert torch.allclose(clipping.grid(w)[0], weight.scale.float() * (255 / 192), rtol=0.01)


@pytest.mark.parametrize("shrink", [0.7, 1.0])  # weights beyond the range; within it, and above the last border of 2 bits
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("slicing", SLICINGS)
def test_gradients_of_gamma_and_beta_by_hand(slicing: Slicing, bits: int, shrink: float) -> None:
    """One group. dL/dgamma = dL/ds max sigma' / (2^c - 1) + dL/dz (the same through z = -low / s), and so on; weight by weight."""
    w, weight = start(8, False, slicing, shrink)
    w, weight = w[:1, :8], NestedWeight(weight.codes[:1, :8], weight.scale[:1, :1], weight.zero[:1, :1], make_grid(8, 8, False), slicing)  # pyright: ignore
    clipping = Clipping(weight, w, (), 2)
    (s,), (z,) = (part.detach()[0].tolist() for part in clipping.grid(w))
    step, shift = read_rule(bits, weight.grid, slicing)
    along = torch.arange(1, 9).float()
    ds = dz = 0.0
    for value, factor in zip(w[0].tolist(), along.tolist(), strict=True):
        t = math.floor(value / s + z + 0.5)
        inside, q = 0 <= t <= 255, min(max(t, 0), 255)
        p = int(slice_codes(torch.tensor([q], dtype=torch.uint8), bits, weight.grid, slicing))
        under = inside and not (slicing == "round" and bits < 8 and q + step / 2 >= 256)
        ds += factor * (step * p + shift - z - under * value / s)
        dz += factor * (s * under - s)
    sigma = lambda x: float(x.detach().sigmoid())  # noqa: E731
    low, high = float(w.min() * clipping.reach_low), float(w.max() * clipping.reach_high)
    for parameter, edge, sign in ((clipping.gamma, high, 1.0), (clipping.beta, low, -1.0)):
        slope = edge * sigma(parameter) * (1 - sigma(parameter))  # of this end of the range
        scale = sign * slope / 255
        now = low * sigma(clipping.beta)
        zero = now / s**2 * scale - (slope / s if parameter is clipping.beta else 0.0)
        (got,) = torch.autograd.grad((clipping.read(w, bits, clipping.grid(w))[0] * along).sum(), parameter)
        assert got.item() == pytest.approx(ds * scale + dz * zero, rel=2e-3, abs=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def omniquant(recipe: Recipe) -> Recipe:
    learning = {"num_samples": 24, "epochs": 2, "refine_tokens": 64, "clip_rate": 0.003, "transform_rate": 0.002}
    return replace(recipe, method="omniquant", parent_bits=8, bits=(8, 3, 2), targets={8: 0.01, 3: 1.0, 2: 1.0}, **learning)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_run_learns_and_says_what(kind: str, tiny: Tiny, omniquant: Recipe, tmp_path: Path) -> None:
    report = quantize(str(tiny(kind)), tmp_path / "out", omniquant, RunOptions())
    assert verify(tmp_path / "out") == []
    notes = [note for layer in report.layers for note in layer.notes]
    assert sum(note.startswith(("clipping learned", "the block keeps")) for note in notes) == 2  # after tries at lower rates or without
    assert any(note.startswith("clipping learned, ") and "transforms; loss on sequences held out" in note for note in notes)
    assert report.rows[1].kl is not None and report.rows[1].kl < 1e-4  # 8 bits: the transforms are folded on both sides
    tensors, before = (dict(models.SafetensorsFiles(sorted(folder.glob("*.safetensors")))) for folder in (tmp_path / "out", tiny(kind)))
    changed = {name for name in before if name in tensors and "norm" in name and not torch.equal(before[name], tensors[name])}
    assert changed and all(tensors[name].dtype == before[name].dtype for name in changed)


def test_interrupted_and_resumed(tiny: Tiny, omniquant: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(str(tiny("llama")), tmp_path / "whole", omniquant, RunOptions())
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(activations, "propagate", 2, patch)
        quantize(str(tiny("llama")), tmp_path / "cut", omniquant, RunOptions())
    quantize(str(tiny("llama")), tmp_path / "cut", omniquant, RESUME)
    assert sums(tmp_path / "cut") == sums(tmp_path / "whole")


@pytest.mark.parametrize(("decay", "shares"), [("cosine", (1.0, 0.75, 0.25)), ("constant", (1.0, 1.0, 1.0))])
def test_rates_fall_unless_told_otherwise(
    decay: Decay, shares: tuple[float, ...], tiny: Tiny, omniquant: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[float, ...]] = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:
            rates.append(tuple(group["lr"] for group in self.param_groups))
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    quantize(str(tiny("llama")), tmp_path / "out", replace(omniquant, decay=decay, epochs=3, refine_tokens=10**6), RunOptions())
    first = omniquant.clip_rate, omniquant.finetune_rate, omniquant.transform_rate
    assert rates[:3] == [pytest.approx([rate * share for rate in first]) for share in shares]  # of the first block; an epoch is a step here


TEACHERS: list[dict[int, int]] = [{2: 8}, {2: 6}, {4: 8, 2: 4}]  # 6 bits are no target


@pytest.mark.parametrize(("teachers", "alone"), [({}, False), *((t, alone) for t in TEACHERS for alone in (False, True))])
@pytest.mark.parametrize("transform", [False, True])
def test_gradients_of_a_step_by_hand(transform: bool, teachers: dict[int, int], alone: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a block, one loss of all widths: a teacher's output stands beside the original's, or in its place, and gets no gradient."""
    lam = {8: 0.1, 4: 0.5, 2: 1.0}
    recipe = Recipe(method="omniquant", group_size=16, targets=lam, teachers=teachers, teachers_only=alone, slicing="round", refit_bits=0)
    recipe = replace(recipe, normalize=False, transform=transform, epochs=1, refine_tokens=10**6)
    walk, layers, folds = folds_of(tiny("llama"), "llama")
    block, call = walk.blocks[0], walk.calls[0]
    noise = torch.randn(walk.hidden.shape, generator=torch.Generator().manual_seed(0)) * walk.hidden.std()
    streams = {r: walk.hidden + noise * 0.1 / r for r in (8, 6, 4, 2)}
    with torch.no_grad():
        goal = call(block, walk.hidden)
    weights = {name: get_weight(module) for name, module in layers.items()}
    starts = {name: on_grid(w, make_grid(8, 16, False), "round") for name, w in weights.items()}
    samples, _ = split(len(goal))

    clippings = {name: Clipping(start, weights[name], (), 2) for name, start in starts.items()}
    transforms = {f: Transform(models.layer_shape(layers[f.consumers[0]]).in_features, f.shift, torch.device("cpu")) for f in folds if transform}

    def output_at(r: int) -> Tensor:
        rows = transformed(block, layers, weights, {f: t.value() for f, t in transforms.items()})
        for name, clipping in clippings.items():
            w = rows[f"{name}.weight"]
            rows[f"{name}.weight"] = clipping.read(w, r, clipping.grid(w))
        return call.with_weights(block, rows, streams[r][samples])

    output = {r: output_at(r) for r in streams}
    power = lambda got: torch.maximum(got.detach().square().sum(-1), goal[samples].square().sum(-1))  # noqa: E731
    error = lambda got, want: ((got - want).square().sum(-1) / power(got)).sum()  # noqa: E731
    loss = torch.zeros(())
    for r in lam:
        if r in teachers:
            loss = loss + lam[r] * error(output[r], output[teachers[r]].detach())
        if r not in teachers or not alone:
            loss = loss + lam[r] * error(output[r], goal[samples])
    learned = [*(p for c in clippings.values() for p in (c.gamma, c.beta)), *(t.a for t in transforms.values())]
    want = torch.autograd.grad(loss, learned)

    got: list[Tensor] = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:
            got.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    Learner(Trainer(block, call, layers, streams, goal), weights, starts, recipe).learn([fold.consumers for fold in folds])
    for theirs, ours in zip(want, got[: len(want)], strict=True):  # of the first step
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_a_run_with_a_teacher_that_is_no_target(tiny: Tiny, omniquant: Recipe, tmp_path: Path) -> None:
    taught = replace(omniquant, teachers={2: 6}, targets={3: 1.0, 2: 1.0}, refit_bits=0)
    quantize(str(tiny("llama")), tmp_path / "out", taught, RunOptions())
    quantize(str(tiny("llama")), tmp_path / "plain", replace(taught, teachers={}), RunOptions())
    assert verify(tmp_path / "out") == [] and sums(tmp_path / "out") != sums(tmp_path / "plain")


def test_without_transforms_norms_stay(tiny: Tiny, omniquant: Recipe, tmp_path: Path) -> None:
    report = quantize(str(tiny("llama")), tmp_path / "out", replace(omniquant, transform=False), RunOptions())
    tensors, before = (dict(models.SafetensorsFiles(sorted(folder.glob("*.safetensors")))) for folder in (tmp_path / "out", tiny("llama")))
    assert all(torch.equal(before[name], tensors[name]) for name in before if "norm" in name)
    assert any(note.startswith("clipping learned; ") for layer in report.layers for note in layer.notes)


@pytest.mark.parametrize(
    ("rate", "tries"),
    [
        (3.0, ["learned clipping was worse", "learned clipping at 0.25 of the rates was worse", "learned clipping at 0.0625 of the rates was worse"]),
        (1e10, ["learned clipping diverged", "learned clipping at 0.25 of the rates diverged", "learned clipping at 0.0625 of the rates diverged"]),
    ],
)
def test_what_diverges_or_gets_worse_keeps_its_grids(rate: float, tries: list[str], tiny: Tiny, omniquant: Recipe, tmp_path: Path) -> None:
    start = quantize(str(tiny("llama")), tmp_path / "start", replace(omniquant, method="minmax", refit_bits=0), RunOptions())
    wild = replace(omniquant, transform_rate=rate, clip_rate=rate, refit_bits=0, finetune_rate=rate)
    report = quantize(str(tiny("llama")), tmp_path / "wild", wild, RunOptions())
    notes = [note for layer in report.layers for note in layer.notes]
    expected = [*tries, "the block keeps the grids that it started from"] * 2
    assert len(notes) == len(expected) and all(note.startswith(words) for note, words in zip(notes, expected, strict=True))
    assert [row.kl for row in report.rows] == [row.kl for row in start.rows]


def test_a_block_that_got_worse_is_learned_again_at_lower_rates(tiny: Tiny, omniquant: Recipe, tmp_path: Path) -> None:
    report = quantize(str(tiny("llama")), tmp_path / "out", replace(omniquant, transform_rate=0.008, clip_rate=0.008), RunOptions())
    notes = [note for layer in report.layers for note in layer.notes]
    assert notes[0].startswith("learned clipping was worse on sequences held out (")
    assert notes[1].startswith("clipping learned at 0.25 of the rates, 3 transforms; loss on sequences held out, of the loss before: ")


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(RecipeError, match="teachers has 2:0, but method omniquant learns from the original anyway; name a wider width"):
        Recipe(method="omniquant", teachers={2: 0})
    with pytest.raises(RecipeError, match="method omniquant trains no overlapping residuals; switch overlap off"):
        Recipe(method="omniquant", overlap=True)
