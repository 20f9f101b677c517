"""A block's layers, group after group: each stream its own activations, shared inputs stacked, order within the block."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import one_each, same_for_all, slow_loss
from torch import Tensor

from matquant import activations, groups, models
from matquant.activations import Inputs
from matquant.blocks import BlockRun, Silent
from matquant.groups import quantize_group
from matquant.recipe import ORIGINAL, Recipe

pytestmark = pytest.mark.usefixtures("quick_collect")

CPU = torch.device("cpu")
RECIPE = Recipe(group_size=32, bits=(4, 2), targets={4: 2.0, 2: 1.0}, parent_bits=4, clip_search=False, asymmetric_calibration=0.0)
TOKENS = (torch.arange(2 * 40).reshape(2, 40) * 31 + 7) % 250
Tiny = Callable[[str], Path]


def run_of(model: Path, folder: Path, recipe: Recipe) -> BlockRun:
    source = models.open_source(str(model))
    folder.mkdir(exist_ok=True)
    return BlockRun(source, models.find_layers(source.model, recipe), recipe, folder, CPU, torch.float32, Silent())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Inputs]]:
    """What statistics found, call by call."""
    calls: list[dict[str, Inputs]] = []
    original = activations.statistics

    def spy(*args: object) -> dict[str, Inputs]:
        calls.append(original(*args))
        return calls[-1]

    monkeypatch.setattr(activations, "statistics", spy)
    return calls


def inputs_of(folder: Path, weights: dict[str, Tensor], wanted: str) -> Tensor:
    """Inputs of one layer in the dense model with some weights replaced, one row a token, in float64."""
    dense = models.load_dense("it", folder, None, dtype=torch.float32)
    for name, weight in weights.items():
        layer = dense.get_submodule(name)
        layer.weight.data = models.held_as(layer, weight)
    rows: list[Tensor] = []
    dense.get_submodule(wanted).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for window in TOKENS:
            dense(window[None])
    return torch.cat(rows)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_stream_meets_its_own_drift(name: str, tiny: Tiny, tmp_path: Path, seen: list[dict[str, Inputs]]) -> None:
    """H_r of every stage of both blocks: the whole model with all layers before read at r bits, and this stage's as they were."""
    recipe = replace(RECIPE, parent_bits=8, bits=(8, 4, 2), targets={8: 0.1, 4: 1.0, 2: 1.0}, group_size=16)
    run = run_of(tiny(name), tmp_path / "blocks", recipe)
    run.quantize(TOKENS)
    assert len(seen) == 8 and all(set(inputs.h) == {ORIGINAL, 4, 2} for found in seen for inputs in found.values())
    done: list[str] = []
    for found in seen:
        ((leader, inputs),) = found.items()
        for stream, h in inputs.h.items():
            read = {} if stream == ORIGINAL else {name: run.weight(name).read(stream).dense() for name in done}
            x = inputs_of(tiny(name), read, leader)
            torch.testing.assert_close(h.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4 * float(x.square().mean()))
        index = list(run.layers.quantized).index(leader)
        stage = list(run.layers.quantized)[index:]
        group = {"q_proj": 3, "gate_proj": 2}.get(leader.rpartition(".")[2], 1)
        done += stage[:group]
    last, first = seen[4], seen[0]
    (h,), (start,) = (inputs.h for inputs in last.values()), (inputs.h for inputs in first.values())
    assert torch.equal(start[4], start[2]) and torch.equal(start[4], start[ORIGINAL]), "nothing is quantized yet"
    drift = {r: float((h[r] - h[ORIGINAL]).norm() / h[ORIGINAL].norm()) for r in (4, 2)}
    assert 1e-4 < drift[4] < drift[2]


def test_one_shared_stream(tiny: Tiny, tmp_path: Path, seen: list[dict[str, Inputs]]) -> None:
    """All widths on the activations of 4 bits, as if one H had been given for each."""
    recipe = replace(RECIPE, streams=(4,), asymmetric_calibration=0.0)
    run = run_of(tiny("llama"), tmp_path / "blocks", recipe)
    run.quantize(TOKENS)
    assert all(set(inputs.h) == {4} and not inputs.cross for found in seen for inputs in found.values())
    assert all(set(output) == {4} for output in run.outputs())
    own = run_of(tiny("llama"), tmp_path / "own", replace(RECIPE, asymmetric_calibration=0.0))
    own.quantize(TOKENS)
    assert all(set(output) == {4, 2} for output in own.outputs())
    same = lambda name: torch.equal(run.weight(name).codes, own.weight(name).codes)  # noqa: E731
    assert same("model.layers.0.self_attn.q_proj") and not same("model.layers.1.self_attn.q_proj")


def test_cross_moments_only_where_asked_for(tiny: Tiny, tmp_path: Path, seen: list[dict[str, Inputs]]) -> None:
    for share in (0.0, 1.0):
        seen.clear()
        run_of(tiny("llama"), tmp_path / str(share), replace(RECIPE, asymmetric_calibration=share)).quantize(TOKENS)
        assert all(set(inputs.cross) == ({4, 2} if share else set()) for found in seen for inputs in found.values())
        if share:
            first, *rest = (inputs.cross for found in seen for inputs in found.values())
            assert not any(c.any() for c in first.values()) and all(c.any() for cross in rest for c in cross.values())


def test_outputs_are_the_errors_of_the_whole_block(tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(tiny("llama"), tmp_path / "blocks", RECIPE)
    run.quantize(TOKENS)
    dense = models.load_dense("it", tiny("llama"), None, dtype=torch.float32)
    hidden: dict[int, list[Tensor]] = {}
    for stream in (ORIGINAL, 4, 2):
        for name in run.layers.quantized if stream else []:
            layer = dense.get_submodule(name)
            layer.weight.data = models.held_as(layer, run.weight(name).read(stream).dense())
        states: list[list[Tensor]] = [[], []]
        hooks = [block.register_forward_hook(lambda _, args, out, i=i: states[i].append(out)) for i, block in enumerate(dense.model.layers)]  # noqa: B023
        with torch.no_grad():
            for window in TOKENS:
                dense(window[None])
        for hook in hooks:
            hook.remove()
        hidden[stream] = [torch.cat([state[0] if isinstance(state, tuple) else state for state in each]).double() for each in states]
    for index, output in enumerate(run.outputs()):
        y = hidden[ORIGINAL][index]
        expected = {r: float((hidden[r][index] - y).square().sum() / y.square().sum()) for r in (4, 2)}
        assert output == {r: pytest.approx(error, rel=1e-3) for r, error in expected.items()}


# --- groups of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stacked_layers_are_quantized_as_each_alone(method: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    recipe = replace(RECIPE, method=method, symmetric=symmetric, clip_search=True)
    weights = {"a": torch.randn(5, 64), "b": torch.randn(1, 64), "c": torch.randn(9, 64) * 3}
    x = {stream: torch.randn(200, 64) * torch.rand(64) for stream in (ORIGINAL, 4, 2)}
    inputs = Inputs({stream: own.T @ own / 200 for stream, own in x.items()})
    together = quantize_group(weights, inputs, recipe)
    assert list(together) == list(weights)
    for name, w in weights.items():
        alone, report = quantize_group({name: w}, inputs, recipe)[name]
        mine, own = together[name]
        assert torch.equal(mine.codes, alone.codes) and mine.codes.shape == w.shape
        for bits in recipe.bits:
            torch.testing.assert_close(mine.read(bits).dense(), alone.read(bits).dense(), rtol=2e-3, atol=1e-5)
            outputs = x[bits].double() @ torch.stack([mine.read(bits).dense() - w, w]).double().transpose(1, 2)
            error = float(outputs[0].square().sum() / outputs[1].square().sum())
            assert own.errors[bits] == pytest.approx(error, rel=1e-3) and report.errors[bits] == pytest.approx(error, rel=1e-2)
        assert list(own.stages) == (["gptq", "refit", "sweeps"] if method == "gptq" else [])
        for bits in own.stages.get("sweeps", {}):  # H damped there, and the damping is a hundredth
            assert own.stages["sweeps"][bits] == pytest.approx(own.errors[bits], rel=0.2)


def test_a_method_that_fits_no_reads_is_refitted_afterwards() -> None:
    recipe = replace(RECIPE, method="minmax")
    w = torch.randn(6, 64)
    inputs = one_each(64, recipe)
    weight, report = quantize_group({"a": w}, inputs, recipe)["a"]
    plain, before = quantize_group({"a": w}, inputs, replace(recipe, refit_bits=0))["a"]
    assert sorted(weight.refits) == [2, 4] and not plain.refits and torch.equal(weight.codes, plain.codes)
    assert report.errors[2] < before.errors[2]
    for bits in (4, 2):
        h = inputs.h[bits]
        share = slow_loss(w, weight.read(bits).dense(), h).sum() / slow_loss(w, torch.zeros_like(w), h).sum()
        assert report.errors[bits] == pytest.approx(float(share), rel=1e-3)


def test_layers_of_zeros() -> None:
    weight, report = quantize_group({"a": torch.zeros(3, 32)}, same_for_all(torch.eye(32), RECIPE), RECIPE)["a"]
    assert report.errors == {4: None, 2: None} and bool(weight.scale.isfinite().all()) and bool((weight.scale > 0).all())
    assert all(error is None for stage in report.stages.values() for error in stage.values())


def test_layers_that_share_an_input_are_quantized_together_and_told_in_order(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    original = groups.quantize_group

    def spy(weights: dict[str, Tensor], inputs: Inputs, recipe: Recipe) -> object:
        asked.append([name.rpartition(".")[2] for name in weights])
        return original(weights, inputs, recipe)

    monkeypatch.setattr(groups, "quantize_group", spy)
    run = run_of(tiny("llama"), tmp_path / "blocks", RECIPE)
    run.quantize(TOKENS)
    assert asked == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [report.name for report in run.reports()] == list(run.layers.quantized)
