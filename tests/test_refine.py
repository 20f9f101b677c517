"""Block refinement: gradients against autograd, what stays fixed, what falls back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grids import make_grid
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from matquant import refine
from matquant.activations import Call
from matquant.blocks import BlockRun, Silent
from matquant.latent import Latent
from matquant.models import find_layers, open_source
from matquant.recipe import Recipe
from matquant.refine import Trainer, split
from matquant.refit import refit
from matquant.weight import NestedWeight

RECIPE = Recipe(method="block", group_size=8, refine_steps=12, refine_tokens=20)
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


def setting(seed: int = 0, dtype: str = "float32") -> tuple[Trainer, dict[str, NestedWeight]]:
    block = Block(seed)
    x = torch.randn(24, 10, 16, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        goal = block(x)
    streams = {r: x + 0.02 * (6 - min(r, 6)) * torch.randn(x.shape, generator=torch.Generator().manual_seed(r)) for r in (8, 6, *WIDTHS)}
    layers = {"up": block.up, "down": block.down}
    return Trainer(block, Call((), {}, named=False), layers, streams, goal, dtype=getattr(torch, dtype)), {
        name: rounded(layer.weight.data) for name, layer in layers.items()
    }


def unchanged(weights: Mapping[str, NestedWeight], planes: int, _: Recipe) -> dict[str, NestedWeight]:
    assert 2 <= planes <= 4
    return dict(weights)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_latent_reads_and_freezes_as_the_stored_weight_does(bits: int) -> None:
    _, weights = setting()
    for weight in weights.values():
        latent = Latent.of(weight, (bits,), 0, 8.0)
        torch.testing.assert_close(latent.read(bits), weight.read(bits).dense(), rtol=1e-5, atol=1e-7)
        latent.y = (latent.y + torch.linspace(-9, 9, latent.y.numel()).reshape(latent.y.shape)).clamp(latent.low, latent.high)
        frozen = latent.frozen(bits)
        torch.testing.assert_close(latent.read(bits), frozen.read(bits).dense(), rtol=1e-5, atol=1e-7)
        unmoved = frozen.codes >> (8 - bits) == weight.codes >> (8 - bits)
        assert (~unmoved).any() and torch.equal(frozen.codes[unmoved], weight.codes[unmoved])
        assert (frozen.codes.int() - weight.codes.int()).abs().max() <= 8


@pytest.mark.parametrize("bits", WIDTHS)
def test_gradients_are_autograds_with_the_floor_passed_through(bits: int) -> None:
    _, weights = setting()
    latent = Latent.of(weights["up"], WIDTHS, 0, 8.0)
    y, m, u = (t.clone().requires_grad_() for t in (latent.y, latent.m[bits], latent.u[bits]))
    s = latent.start.scale[..., None]
    through = y / 2 ** (8 - bits)
    p = (through + (through.floor() - through).detach()).reshape(*s.shape[:2], -1)  # floor's value, the identity's gradient
    step, shift = 2.0 ** (8 - bits), (2 ** (8 - bits) - 1) / 2
    w = s * (m[..., None] * (step * p + shift - 127.5) + 127.5 - u[..., None])
    dw = torch.randn(latent.y.shape, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad((w.reshape(dw.shape) * dw).sum(), (y, m, u))
    for ours, theirs in zip(latent.gradients(dw, bits), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_frozen_planes_bound_a_latent() -> None:
    weight = setting()[1]["up"]
    latent = Latent.of(weight, (3,), 2, 100.0)
    for far in (-1000.0, 1000.0):
        latent.y += far
        latent.bound()
        assert torch.equal(latent.frozen(3).codes >> 6, weight.codes >> 6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_low_width_gets_better_on_sequences_it_has_not_seen(dtype: str) -> None:
    trainer, weights = setting(dtype=dtype)
    refined = refine.refine(trainer, weights, unchanged, replace(RECIPE, refine_steps=60, targets={4: 0.25, 3: 0.5, 2: 1.0}))
    assert all(value < 0.97 for value in refined.change.values()), refined
    assert set(refined.change) == set(WIDTHS) and refined.notes[-1].startswith("block refined with reach 0.7; loss on sequences held out")
    for name, weight in refined.weights.items():
        assert torch.equal(weight.scale, weights[name].scale) and weight.grid == weights[name].grid
    assert any(not torch.equal(weight.codes, weights[name].codes) for name, weight in refined.weights.items())


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
def test_errors_count_over_a_power_of_the_tokens_power(exponent: float) -> None:
    trainer, weights = setting()
    reads = {f"{name}.weight": weight.read(2).dense() for name, weight in weights.items()}
    output = torch.cat([trainer.call.with_weights(trainer.block, reads, x[None]) for x in trainer.streams[2]])
    expected = sum(
        float((y - goal).double().square().sum() / max(goal.double().square().sum(), y.double().square().sum()) ** exponent)
        for ys, goals in zip(output, trainer.goal, strict=True)
        for y, goal in zip(ys, goals, strict=True)
    )
    assert replace(trainer, power=exponent).held(weights, 2, list(range(len(output)))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("louder", ["goal", "output"])
def test_the_loss_counts_every_token_alike(louder: str) -> None:
    """One that should have a huge norm and has not, or has and should not, is wrong by itself, once, and hides no other."""
    trainer, weights = setting()
    reads = {f"{name}.weight": weight.read(2).dense() for name, weight in weights.items()}
    samples = list(range(len(trainer.goal)))
    output, goal = trainer.output(reads, 2, samples), trainer.goal.clone()
    power = torch.maximum(output.double().square().sum(-1), goal.double().square().sum(-1))
    quotients = (output - goal).double().square().sum(-1) / power
    assert trainer.held(weights, 2, samples) == pytest.approx(quotients.sum().item(), rel=1e-3)
    (goal if louder == "goal" else output)[:, 0] *= 1e3
    loss = replace(trainer, goal=goal).error(output, samples)
    assert loss.item() == pytest.approx(quotients[:, 1:].sum().item() + len(samples), rel=0.05)


def test_what_errors_count_over_gets_no_gradient() -> None:
    trainer, _ = setting()
    output = (trainer.goal[:2] * 3).requires_grad_()
    (got,) = torch.autograd.grad(trainer.error(output, [0, 1]), output)
    torch.testing.assert_close(got, 2 * (output - trainer.goal[:2]) / output.square().sum(-1, keepdim=True))


def test_one_sequence_at_a_time_trains_as_several_do() -> None:
    trainer, weights = setting()
    latents = {name: Latent.of(weight, (2,), 0, 1.5) for name, weight in weights.items()}
    both = [replace(trainer, together=together).step(latents, 2, [1, 2, 3]) for together in (True, False)]
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-5)
    for name in latents:
        for one, other in zip(both[0][1][name], both[1][1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_layers_that_hold_their_weights_transposed_train_as_others_do() -> None:
    """GPT-2's: gradients come transposed, and torch's fused Adam does not look how they lie."""
    trainer, weights = setting()
    block = Block()
    for name in ("up", "down"):
        linear = getattr(block, name)
        turned = Conv1D(*linear.weight.shape)
        turned.weight.data = linear.weight.data.T.contiguous()
        setattr(block, name, turned)
    other = replace(trainer, block=block, layers={"up": block.up, "down": block.down})
    recipe = replace(RECIPE, targets={4: 0.25, 3: 0.5, 2: 1.0})
    ours, theirs = (refine.refine(each, weights, unchanged, recipe).weights for each in (trainer, other))
    for name, weight in ours.items():
        assert not torch.equal(weight.codes, weights[name].codes)
        assert (weight.codes == theirs[name].codes).float().mean() > 0.98


def test_codes_move_no_further_than_their_reach() -> None:
    trainer, weights = setting()
    recipe = replace(RECIPE, targets={4: 1.0, 3: 1.0, 2: 1.0})
    attempt = refine._Attempt(trainer, unchanged, recipe, 1.5, dict.fromkeys(WIDTHS, 1.0))
    for bits, reach in ((4, 1.5), (3, 3), (2, 6)):
        found = attempt.run(weights, (bits,), ())
        assert found is not None
        moved = torch.cat([(found[name].codes.int() - weights[name].codes.int()).abs().flatten() for name in weights])
        assert 0 < moved.max() <= reach + 0.5  # from the middle of a code


def test_equal_seeds_give_equal_codes() -> None:
    runs = []
    for seed in (0, 0, 1):
        trainer, weights = setting()
        refined = refine.refine(trainer, weights, unchanged, replace(RECIPE, seed=seed))
        runs.append(
            torch.cat([w.codes.flatten() for w in refined.weights.values()] + [w.refits[2].scale.flatten() for w in refined.weights.values()])
        )
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_block_that_diverges_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, weights = setting()
    original = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, reads, bits, sample: original(self, reads, bits, sample) * float("nan"))
    refined = refine.refine(trainer, weights, unchanged, RECIPE)
    assert [note.partition(" with ")[2] for note in refined.notes[:-1]] == ["reach 0.7 diverged", "reach 0.35 diverged", "reach 0 diverged"]
    assert refined.notes[-1] == "block not refined" and not refined.change
    assert all(refined.weights[name] is weight for name, weight in weights.items())


def test_a_block_that_gets_worse_at_one_width_keeps_its_codes() -> None:
    trainer, weights = setting()

    def spoil(trained: Mapping[str, NestedWeight], planes: int, _: Recipe) -> dict[str, NestedWeight]:
        return {name: replace(weight, codes=weight.codes & 0xF0) for name, weight in trained.items()}  # 8 bits lose their low planes

    refined = refine.refine(trainer, weights, spoil, RECIPE)
    assert len(refined.notes) == 3 and all("worse on sequences held out: 8 bits" in note for note in refined.notes[:2])
    assert refined.notes[2].startswith("only reads of the block refined")
    assert all(torch.equal(refined.weights[name].codes, weight.codes) for name, weight in weights.items())
    assert all(refined.change[r] < 1 for r in WIDTHS) and refined.change[8] == 1


def test_a_wide_width_that_came_off_badly_counts_more_in_the_next_fit() -> None:
    trainer, weights = setting()
    asked: list[Mapping[int, float]] = []

    def low(trained: Mapping[str, NestedWeight], planes: int, recipe: Recipe) -> dict[str, NestedWeight]:
        if planes < 4:
            return dict(trained)
        asked.append(recipe.targets)
        lost = recipe.targets[6] < 0.12  # of 6 bits, until it counts
        return {name: replace(weight, codes=weight.codes ^ (0x08 if lost else 0)) for name, weight in weights.items()}

    recipe = replace(RECIPE, targets={8: 1e-9, 6: 0.05, 2: 1.0})
    before = {8: float("inf"), 6: trainer.held(weights, 6, split(24)[1]), 2: 1.0}
    attempt = refine._Attempt(trainer, low, recipe, 1.0, before)
    found = attempt.low_nibble(dict(weights))
    assert all(torch.equal(found[name].codes, weight.codes) for name, weight in weights.items())
    assert asked == [{8: 1e-9, 6: lam, 2: 1.0} for lam in (0.05, 0.1, 0.1 * 2**0.5)]
    asked.clear()
    attempt = refine._Attempt(trainer, low, recipe, 1.0, dict.fromkeys(before, 0.0))
    attempt.low_nibble(dict(weights))
    assert len(asked) == 1  # where both lose, neither can win


def test_reads_that_do_no_better_on_sequences_held_out_stay() -> None:
    trainer, weights = setting()
    _, held = split(len(trainer.goal))
    misled = replace(trainer, goal=-3 * trainer.goal.flip(2))  # training is drawn to another goal ...
    misled.goal[held] = trainer.goal[held]  # ... than the one that counts
    refined = refine.refine(misled, weights, unchanged, RECIPE)
    assert all(value <= 1 for value in refined.change.values())
    assert any("worse on sequences held out" in note for note in refined.notes)


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 17, 64])
def test_split_holds_some_out_and_trains_on_the_rest(samples: int) -> None:
    train, held = split(samples)
    assert train and held and max(len(train), len(held)) <= samples
    assert samples == 1 or not set(train) & set(held)
    assert samples == 1 or sorted(train + held) == list(range(samples))


@pytest.mark.parametrize("name,overlap", [("llama", False), ("llama", True), ("gpt2", False), ("gemma3", False)])
def test_a_model_end_to_end_says_what_became_of_each_block(name: str, tiny: Callable[[str], Path], tmp_path: Path, overlap: bool) -> None:
    source = open_source(str(tiny(name)))
    recipe = replace(RECIPE, overlap=overlap, refine_steps=4, num_samples=6, seq_len=16, bits=(8, 6, 5, 4, 3, 2), refit_bits=6)
    layers = find_layers(source.model, recipe)
    run = BlockRun(source, layers, recipe, tmp_path, torch.device("cpu"), torch.float32, Silent())
    run.quantize(torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0)))
    for file in run.files:
        names = [report.name for report in run.reports() if report.name.startswith(f"{layers.blocks}.{int(file.stem)}.")]
        first = next(report for report in run.reports() if report.name == names[0])
        assert any(note.startswith(("block refined", "only reads of the block", "block not refined")) for note in first.notes), first.notes
        assert list(first.stages)[-1] == "block"
    for layer in layers.quantized:
        weight = run.weight(layer)
        assert weight.grid.overlap == overlap
        assert weight.read(8).dense().isfinite().all() and set(weight.refits) == {6, 5, 4, 3, 2}
    json.dumps([dict(output) for output in run.outputs()])


@pytest.mark.parametrize("wrong", [{"parent_bits": 6, "bits": (4,), "targets": {4: 1.0}}, {"slicing": "round"}])
def test_what_block_refinement_cannot_do_is_refused(wrong: dict[str, object]) -> None:
    from matquant.errors import RecipeError

    with pytest.raises(RecipeError, match="method block needs parent_bits 8 and slicing floor"):
        Recipe(**{"method": "block", **wrong})
