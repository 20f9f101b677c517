"""Which plan is meant, and that no more of a checkpoint is read than it needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import matquant
from matquant.checkpoint import Checkpoint, add_files
from matquant.engine import Engine
from matquant.errors import InputError, MissingPlanesError, PlanError
from matquant.linear import NestedLinear
from matquant.plan import BitPlan
from matquant.search import plans, sensitivity
from matquant.search.plans import resolve
from matquant.search.sensitivity import Sensitivity, Setting, identity
from matquant.search.units import examine

Rounded = Callable[[str], Path]
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
MIXED = BitPlan(3, {DOWN: 2, QUERY: 4})
IDS = (torch.arange(12) * 31 + 7) % 250


@pytest.fixture
def planned(own: Path) -> Path:
    """A checkpoint with a plan and made-up sensitivities: the later a unit, the more it loses."""
    checkpoint = Checkpoint.open(own)
    units = examine(checkpoint).units
    kl = tuple({r: (1 + i) * 4.0**-r for r in (6, 4, 3, 2)} for i in range(len(units)))
    found = Sensitivity(Setting(identity(checkpoint), "none", "none", ((1, 2),)), units, 0.0, kl, {8: 0.0, 2: 5.0})
    add_files(own, {"plans/careful.json": MIXED.to_json().encode(), sensitivity.FILE: found.to_json().encode()})
    return own


def test_widths_and_plans_are_themselves(rounded: Rounded) -> None:
    for wanted in (None, 4, MIXED):
        assert resolve(rounded("llama"), wanted) is wanted


def test_names_files_and_numbers(planned: Path, tmp_path: Path) -> None:
    assert resolve(planned, "careful") == MIXED
    file = tmp_path / "other.json"
    file.write_text(BitPlan(6).to_json())
    assert resolve(planned, str(file)) == BitPlan(6)
    checkpoint = Checkpoint.open(planned)
    for wanted in ("4.5", 4.5):
        plan = resolve(planned, wanted)
        assert isinstance(plan, BitPlan) and 4.3 < plan.mean_bits(checkpoint.modules, checkpoint.layout) <= 4.5
        assert plan.about["predicted_kl"] > 0
        for unit in examine(checkpoint).units:  # fused layers agree
            assert len({plan.bits(name) for name in unit.layers}) == 1
    add_files(planned, {"plans/4.5.json": BitPlan(2).to_json().encode()})
    assert resolve(planned, 4.5) == BitPlan(2)  # the stored one


def test_a_number_is_the_best_plan_of_its_size(planned: Path) -> None:
    """Of 300 random choices within the budget none is better by the sensitivities."""
    checkpoint = Checkpoint.open(planned)
    measured = sensitivity.load(planned / sensitivity.FILE, checkpoint)
    assert measured is not None
    losses, widths = measured.losses(checkpoint.widths), checkpoint.widths
    loss = lambda plan: sum(losses[i, widths.index(plan.bits(unit.layers[0]))] for i, unit in enumerate(measured.units))  # noqa: E731
    plan = resolve(planned, "4.2")
    assert isinstance(plan, BitPlan)
    chance = np.random.default_rng(0)
    for _ in range(300):
        other = plans.as_plan(measured.units, [int(r) for r in chance.choice(widths, len(measured.units))])
        if other.mean_bits(checkpoint.modules, checkpoint.layout) <= 4.2:
            assert loss(plan) <= loss(other)


def test_refusals(planned: Path, rounded: Rounded) -> None:
    with pytest.raises(
        PlanError, match=r"no plan 'carefull': it is no file, no number, and the plans of .*choose from careful \(did you mean careful\?\)"
    ):
        resolve(planned, "carefull")
    with pytest.raises(PlanError, match=r"no plan 'x': .* holds no plans; make one with matquant plan"):
        resolve(rounded("llama"), "x")
    with pytest.raises(PlanError, match=r"holds no plan '3\.7' and no sensitivities to find one by; run matquant plan .* --budget 3\.7"):
        resolve(rounded("llama"), "3.7")
    with pytest.raises(PlanError, match=r"no plan meets 2\.5 bits a weight .*; the smallest budget that one meets is 3 bits a weight"):
        resolve(planned, 2.5)
    (planned / "plans" / "careful.json").write_text('{\n "default": 3,\n "layers": {\n  "model.layers.0.mlp.up_proj": 33\n }\n}')
    with pytest.raises(PlanError, match=r"careful\.json, line 4: 'model\.layers\.0\.mlp\.up_proj' has bits 33; allowed: whole numbers from 2 to 8"):
        resolve(planned, "careful")
    (planned / "plans" / "careful.json").write_bytes(b"\xff")
    with pytest.raises(PlanError, match=r"cannot read the plan plans/careful\.json"):
        resolve(planned, "careful")


# --- loading --------------------------------------------------------------------------------------------------------


def layers_of(model: Any) -> dict[str, NestedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def test_every_layer_holds_its_own_planes(planned: Path) -> None:
    layers = layers_of(matquant.from_pretrained(planned, "careful"))
    assert {name: (layer.bits, layer.planes) for name, layer in layers.items()} == {name: (MIXED.bits(name),) * 2 for name in layers}
    kept = matquant.from_pretrained(planned, "careful", keep=6)
    assert {layer.planes for layer in layers_of(kept).values()} == {6}
    matquant.set_bits(kept, 6)


def test_a_plan_computes_what_its_layers_compute(planned: Path) -> None:
    """Logits of from_pretrained and of the engine, at a name, against a model that holds everything and is switched."""
    whole = matquant.from_pretrained(planned, keep=8).eval()
    matquant.set_bits(whole, MIXED)
    with torch.inference_mode():
        want = whole(IDS[None]).logits[0]
        torch.testing.assert_close(matquant.from_pretrained(planned, "careful").eval()(IDS[None]).logits[0], want)
    got = Engine.open(planned, "careful", exact=True).logits(IDS)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))  # its head is rounded to 8 bits
    number = Engine.open(planned, 4.5)
    assert {number.plan.bits(name) for name in number.kept} > {4}


def test_a_model_of_many_widths_is_no_checkpoint(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model holds 2 to 4 planes a layer, which is no checkpoint; load it with keep=8 to save it"):
        matquant.from_pretrained(planned, "careful").save_pretrained(tmp_path / "again")
    matquant.from_pretrained(planned, "careful", keep=4).save_pretrained(tmp_path / "again")


def test_files_of_planes_that_no_layer_needs_may_be_missing(planned: Path) -> None:
    """Planes 4 to 7 are deleted: whoever opened, hashed or read them would fail."""
    for k in range(4, 8):
        for file in planned.glob(f"model-plane{k}-*"):
            file.unlink()
    layers = layers_of(matquant.from_pretrained(planned, "careful"))
    assert layers[QUERY].planes == 4
    assert Engine.open(planned, "careful").logits(IDS).isfinite().all()
    with pytest.raises(MissingPlanesError):
        matquant.from_pretrained(planned, BitPlan(3, {DOWN: 6}))


def test_the_engine_reads_of_every_layer_the_planes_of_its_width(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: set[str] = set()
    whole = Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", lambda checkpoint, name, *some: tensors.add(name) or whole(checkpoint, name, *some))
    engine = Engine.open(planned, "careful")
    read = {name for name in tensors if ".plane." in name}
    wanted = {f"{name}.plane.{k}" for name in engine.checkpoint.modules for k in range(2, MIXED.bits(name))}
    assert read == wanted  # tensors, not only files: no plane 2 of a layer at 2 bits, no plane 3 but of the one at 4
    weights = [weight for block in engine.stepper.blocks for weight in block.weights.values()]
    held = sum(weight.nbytes for weight in weights)
    narrow = sum(w.nbytes for block in Engine.open(planned, 2).stepper.blocks for w in block.weights.values())
    wide = sum(w.nbytes for block in Engine.open(planned, 4).stepper.blocks for w in block.weights.values())
    assert narrow < held < wide


def test_transformers_opens_the_files_of_the_widest_layer(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_utils

    opened: set[str] = set()
    monkeypatch.setattr(
        transformers.modeling_utils, "safe_open", lambda file, *a, **k: opened.add(Path(file).name.split("-")[1]) or safe_open(file, *a, **k)
    )
    model = matquant.from_pretrained(planned, "careful")
    assert opened == {"base", "plane2", "plane3"}
    held = sum(buffer.nbytes for layer in layers_of(model).values() for buffer in layer.buffers())
    assert held < sum(buffer.nbytes for layer in layers_of(matquant.from_pretrained(planned, 4)).values() for buffer in layer.buffers())


def test_the_hub_sends_tables_first_and_then_the_planes_of_the_plan(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[list[str]] = []

    def fetch(repo: str, **kwargs: Any) -> str:
        calls.append(kwargs["ignore_patterns"])
        return str(planned)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    matquant.from_pretrained("owner/name", "careful")
    assert calls == [[f"model-plane{k}-*" for k in range(3, 8)], [f"model-plane{k}-*" for k in range(5, 8)]]


def test_verify_checks_plans_and_takes_sensitivities_for_a_file_like_others(planned: Path) -> None:
    from matquant.checkpoint import verify

    assert verify(planned) == []
    add_files(planned, {"plans/bad.json": json.dumps({"default": 3, "layers": {"no.such": 2}}).encode()})
    (problem,) = verify(planned)
    assert "plans/bad.json" in problem and "line 1: the plan names layer 'no.such'" in problem
