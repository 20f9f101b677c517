"""Units of layers from what a model computes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from torch import nn

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.plan import BitPlan, Shape
from matquant.search import units
from matquant.search.units import Unit, as_plan, by_module, examine, separate

Rounded = Callable[[str], Path]

EXPECTED = {  # the units of a block, in any order
    "llama": {"q_proj/k_proj/v_proj", "o_proj", "gate_proj/up_proj", "down_proj"},
    "phi": {"q_proj/k_proj/v_proj", "dense", "fc1", "fc2"},  # attention and MLP take the same tensor, and are no unit
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "opt": {"q_proj/k_proj/v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "mixtral": {"q_proj/k_proj/v_proj", "o_proj"},
}


def parts(label: str) -> frozenset[str]:
    return frozenset(label.split("/"))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_units_of_every_architecture(kind: str, rounded: Rounded) -> None:
    checkpoint = Checkpoint.open(rounded(kind))
    found = examine(checkpoint)
    want = {parts(label) for label in EXPECTED.get(kind, EXPECTED["llama"])}
    for block in (0, 1):
        assert {parts(unit.label) for unit in found.units if unit.block == block} == want
    assert sorted(name for unit in found.units for name in unit.layers) == sorted(checkpoint.modules)
    assert [unit.block for unit in found.units] == sorted(unit.block for unit in found.units)
    all_heads = {"gpt2": 128, "opt": 128}  # keys and values of four heads of 16 numbers; the others keep two
    assert [numbers for numbers, _ in found.cache] == [all_heads.get(kind, 64)] * 2
    windows = {"mistral": [32, 32], "gemma2": [32, None], "gemma3": [32, None]}
    assert [window for _, window in found.cache] == windows.get(kind, [None, None])
    assert found.head == 258 * 64


class Experts(nn.Module):
    """A mixture whose router is data dependent and whose experts are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = int(self.router(x).sum((0, 1)).argmax())
        expert = self.experts[best]
        return expert["down"](expert["up"](x))


class Model(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Experts()}) for _ in range(2))
        self.broken = broken

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        if self.broken:
            raise ValueError("no such thing")
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return SimpleNamespace(past_key_values=None)

    def get_output_embeddings(self) -> None:
        return None


def test_the_experts_of_a_block_are_one_unit_even_those_that_no_token_reached(rounded: Rounded, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layers.{b}.mlp.experts.{e}.{part}" for b in (1, 0) for e in range(3) for part in ("up", "down")]
    modules = dict.fromkeys([*names, "layers.0.mlp.router"], Shape(8, 8))
    checkpoint = replace(Checkpoint.open(rounded("llama")), modules=modules, folder=Path("somewhere"))
    with torch.device("meta"):
        model = Model()
    monkeypatch.setattr(units, "_skeleton", lambda _: model)
    found = examine(checkpoint)
    assert [(unit.block, len(unit.layers), unit.label) for unit in found.units] == [(0, 6, "up/down"), (0, 1, "router"), (1, 6, "up/down")]
    assert found.cache == () and found.head == 0
    model.broken = True
    with pytest.raises(InputError, match=r"somewhere cannot be tried out \(ValueError: no such thing\); plan single layers"):
        examine(checkpoint)


def test_a_config_that_builds_nothing_is_refused(own: Path) -> None:
    checkpoint = Checkpoint.open(own)
    (own / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(InputError, match=r"own cannot be built from its config\.json .*; fetch it again"):
        examine(checkpoint)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}]),
        ("gpt2", [{"c_attn", "c_proj"}, {"c_fc", "c_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}]),
    ],
)
def test_parts_of_a_block_as_units(kind: str, parts: list[set[str]], rounded: Rounded) -> None:
    found = by_module(examine(Checkpoint.open(rounded(kind))).units)
    for block in (0, 1):
        of_block = [{name.rpartition(".")[2] for name in unit.layers} for unit in found if unit.block == block]
        assert sorted(map(sorted, of_block)) == sorted(map(sorted, parts))
    assert by_module([Unit(("lm_head",), -1), Unit(("h.0.moe.experts.1.up", "h.0.moe.experts.0.up"), 0), Unit(("h.0.moe.gate",), 0)]) == (
        Unit(("lm_head",), -1),
        Unit(("h.0.moe.experts.1.up", "h.0.moe.experts.0.up", "h.0.moe.gate"), 0),
    )


def test_separate_layers_and_plans(rounded: Rounded) -> None:
    checkpoint = Checkpoint.open(rounded("llama"))
    alone = separate(checkpoint)
    assert [unit.layers for unit in alone if unit.block == 1] == [(name,) for name in checkpoint.modules if ".1." in name]
    pair = [Unit(("a.0.q", "a.0.k"), 0), Unit(("a.0.o",), 0), Unit(("a.1.o",), 1)]
    plan = as_plan(pair, [4, 2, 4])
    assert plan == BitPlan(4, {"a.0.o": 2})
    assert as_plan(pair, [3, 3, 3]) == BitPlan(3)
