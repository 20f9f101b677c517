"""Block refinement: gradients against autograd, what stays fixed, what falls back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grids import make_grid
from torch import Tensor, nn

from matquant import refine
from matquant.activations import Call
from matquant.blocks import BlockRun, Silent
from matquant.models import find_layers, open_source
from matquant.recipe import Recipe
from matquant.refine import Latent, Trainer, split
from matquant.refit import refit
from matquant.weight import NestedWeight

RECIPE = Recipe(method="block", group_size=8, refine_steps=12, refine_batch=2, refine_rate=0.002)
WIDTHS = (4, 3, 2)


class Block(nn.Module):
    """Two linear layers and something curved between them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        for layer in (self.up, self.down):
            layer.weight.data = torch.randn(layer.weight.shape, generator=g) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def rounded(w: Tensor) -> NestedWeight:
    """To nearest, with refits of the low widths."""
    grid = make_grid(8, 8)
    scale = w.reshape(len(w), -1, 8).abs().amax(-1) / 127
    codes = (w.reshape(len(w), -1, 8) / scale[..., None] + 128).round().clamp(0, 255).reshape(w.shape).to(torch.uint8)
    h = torch.eye(w.shape[1])
    return refit(NestedWeight(codes, scale, None, grid, "floor"), dict.fromkeys(WIDTHS, w), dict.fromkeys(WIDTHS, h), WIDTHS)[0]


def setting(seed: int = 0) -> tuple[Trainer, dict[str, NestedWeight]]:
    block = Block(seed)
    x = torch.randn(24, 10, 16, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        goal = block(x)
    streams = {r: x + 0.02 * (6 - min(r, 6)) * torch.randn(x.shape, generator=torch.Generator().manual_seed(r)) for r in (8, *WIDTHS)}
    layers = {"up": block.up, "down": block.down}
    return Trainer(block, Call((), {}, named=False), layers, streams, goal), {name: rounded(layer.weight.data) for name, layer in layers.items()}


def unchanged(weights: dict[str, NestedWeight]) -> dict[str, NestedWeight]:
    return dict(weights)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_latent_reads_as_the_weight_it_came_from_and_freezes_to_it(bits: int) -> None:
    _, weights = setting()
    for weight in weights.values():
        latent = Latent.of(weight, WIDTHS)
        torch.testing.assert_close(latent.read(bits), weight.read(bits).dense(), rtol=1e-5, atol=1e-7)
        frozen = latent.frozen()
        assert torch.equal(frozen.codes, weight.codes)
        assert torch.equal(frozen.refits[bits].scale, weight.refits[bits].scale) and torch.equal(frozen.refits[bits].zero, weight.refits[bits].zero)


@pytest.mark.parametrize("bits", WIDTHS)
def test_gradients_are_autograds_with_the_floor_passed_through(bits: int) -> None:
    _, weights = setting()
    latent = Latent.of(weights["up"], WIDTHS)
    y, m, u = (t.clone().requires_grad_() for t in (latent.y, latent.m[bits], latent.u[bits]))
    s = latent.start.scale[..., None]
    through = y / 2 ** (4 - bits)
    p = (through + (through.floor() - through).detach()).reshape(*s.shape[:2], -1)  # floor's value, the identity's gradient
    step, shift = 2.0 ** (8 - bits), (2 ** (8 - bits) - 1) / 2
    w = s * (m[..., None] * (step * p + shift - 127.5) + 127.5 - u[..., None])
    dw = torch.randn(latent.y.shape, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad((w.reshape(dw.shape) * dw).sum(), (y, m, u))
    for ours, theirs in zip(latent.gradients(dw, bits), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_of_every_width_on_sequences_it_has_not_seen() -> None:
    trainer, weights = setting()
    recipe = replace(RECIPE, refine_steps=60)
    refined = refine.refine(trainer, weights, unchanged, replace(recipe, targets={4: 0.25, 3: 0.5, 2: 1.0}), seed=0)
    assert not refined.kept and all(value < 0.97 for value in refined.change.values()), refined
    assert set(refined.change) == set(WIDTHS) and refined.note.startswith("block refined; loss on sequences held out")


def test_codes_move_no_further_than_their_reach() -> None:
    trainer, weights = setting()
    trained = refine.train(trainer, weights, WIDTHS, replace(RECIPE, refine_rate=0.9, refine_steps=20), seed=0)
    assert trained is not None
    far = 0
    for name, weight in trained.items():
        moved = (weight.codes >> 4).int() - (weights[name].codes >> 4).int()
        assert moved.abs().max() <= refine.REACH + 1
        far += int((moved != 0).sum())
        assert torch.equal(weight.scale, weights[name].scale)
    assert far


def test_equal_seeds_give_equal_codes() -> None:
    runs = []
    for seed in (0, 0, 1):
        trainer, weights = setting()
        trained = refine.train(trainer, weights, WIDTHS, RECIPE, seed)
        assert trained is not None
        runs.append(torch.cat([w.codes.flatten() for w in trained.values()] + [w.refits[2].scale.flatten() for w in trained.values()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_block_that_diverges_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, weights = setting()
    original = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, reads, bits, sample: original(self, reads, bits, sample) * float("nan"))
    refined = refine.refine(trainer, weights, unchanged, RECIPE, seed=0)
    assert refined.kept == "its loss was not finite"
    assert all(refined.weights[name] is weight for name, weight in weights.items())


def test_a_block_that_gets_worse_at_one_width_keeps_what_it_had() -> None:
    trainer, weights = setting()

    def spoil(trained: dict[str, NestedWeight]) -> dict[str, NestedWeight]:
        return {name: replace(weight, codes=weight.codes & 0xF0) for name, weight in trained.items()}  # 8 bits lose their low planes

    refined = refine.refine(trainer, weights, spoil, RECIPE, seed=0)
    assert "worse on sequences held out at 8 bits" in refined.kept and "3 bits" not in refined.kept.split("(")[0]
    assert all(refined.weights[name] is weight for name, weight in weights.items())


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 17, 64])
def test_split_holds_some_out_and_trains_on_the_rest(samples: int) -> None:
    train, held = split(samples)
    assert train and held and max(len(train), len(held)) <= samples
    assert samples == 1 or not set(train) & set(held)
    assert samples == 1 or sorted(train + held) == list(range(samples))


@pytest.mark.parametrize("name,overlap", [("llama", False), ("llama", True), ("gpt2", False), ("gemma3", False)])
def test_a_model_end_to_end_says_what_became_of_each_block(name: str, tiny: Callable[[str], Path], tmp_path: Path, overlap: bool) -> None:
    source = open_source(str(tiny(name)))
    recipe = replace(RECIPE, overlap=overlap, refine_steps=4, num_samples=6, seq_len=16)
    layers = find_layers(source.model, recipe)
    run = BlockRun(source, layers, recipe, tmp_path, torch.device("cpu"), torch.float32, Silent())
    run.quantize(torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0)))
    for file in run.files:
        names = [report.name for report in run.reports() if report.name.startswith(f"{layers.blocks}.{int(file.stem)}.")]
        first = next(report for report in run.reports() if report.name == names[0])
        assert any(note.startswith(("block refined", "block refinement changed nothing")) for note in first.notes), first.notes
        assert list(first.stages)[-1] == "block"
    for layer in layers.quantized:
        weight = run.weight(layer)
        assert weight.grid.overlap == overlap
        assert weight.read(8).dense().isfinite().all()
    json.dumps([dict(output) for output in run.outputs()])


@pytest.mark.parametrize("wrong", [{"parent_bits": 6, "bits": (4,), "targets": {4: 1.0}}, {"slicing": "round"}, {"refit_bits": 6}])
def test_what_block_refinement_cannot_do_is_refused(wrong: dict[str, object]) -> None:
    from matquant.errors import RecipeError

    with pytest.raises(RecipeError, match="method block needs parent_bits 8, slicing floor"):
        Recipe(**{"method": "block", **wrong})
