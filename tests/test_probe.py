"""A probe against evaluate, which loads what it measures and runs all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from torch import nn

import matquant
from matquant import evaluate, models
from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.plan import BitPlan
from matquant.search.probe import Probe
from matquant.search.units import examine

Rounded = Callable[[str], Path]
IDS = (torch.arange(5 * 24).reshape(5, 24) * 31 + 7) % 250


def opened(folder: Path, ids: torch.Tensor = IDS, reference: Any = None) -> Probe:
    checkpoint = Checkpoint.open(folder)
    return Probe(checkpoint, examine(checkpoint).units, ids, reference)


def as_plan(probe: Probe, widths: dict[int, int]) -> BitPlan:
    return BitPlan(8, {name: bits for unit, bits in widths.items() for name in probe.units[unit].layers})


def of_evaluate(folder: Path, plan: BitPlan, reference: Any) -> float:
    found = evaluate.evaluate(folder, [plan], IDS, reference)[1].kl
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_kl_is_that_of_evaluate(kind: str, rounded: Rounded) -> None:
    """Units of the first block, of the last, of both; the reference is the checkpoint's own widest read."""
    folder = rounded(kind)
    probe, reference = opened(folder), matquant.from_pretrained(folder, 8).eval()
    last = len(probe.units) - 1
    assert set(probe.first) == {0, 1}
    for widths in ({0: 2}, {last: 2}, {0: 3, last: 2}):
        want = of_evaluate(folder, as_plan(probe, widths), reference)
        assert float(probe.kl(widths).mean()) == pytest.approx(want, rel=1e-3, abs=2e-7)
    assert float(probe.kl({}).abs().max()) < 1e-6


def test_an_original_as_the_reference(rounded: Rounded, tiny: Rounded) -> None:
    original = models.load_dense(str(tiny("llama")), tiny("llama"), None, dtype=torch.float32)
    probe = opened(rounded("llama"), reference=original)
    for widths in ({}, {5: 2}):
        want = of_evaluate(rounded("llama"), as_plan(probe, widths), original)
        assert float(probe.kl(widths).mean()) == pytest.approx(want, rel=1e-3, abs=2e-7)


def test_only_blocks_from_the_first_change_on_are_run(rounded: Rounded, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    runs: list[object] = []
    whole = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: runs.append(self) or whole(self, *args, **kwargs))
    probe = opened(rounded("llama"))
    in_last = next(i for i, unit in enumerate(probe.units) if unit.block == 1)
    runs.clear()
    probe.kl({in_last: 2})
    assert runs == [probe.blocks[1]]
    runs.clear()
    probe.kl({0: 2, in_last: 3})
    assert runs == probe.blocks


def test_a_new_base_is_started_from(rounded: Rounded) -> None:
    probe = opened(rounded("llama"))
    everything = dict.fromkeys(range(len(probe.units)), 3)
    fresh = probe.kl(everything | {6: 8})
    probe.rebase(everything)
    torch.testing.assert_close(probe.kl({6: 8}), fresh, rtol=1e-4, atol=1e-7)
    assert float(probe.kl({}).mean()) == pytest.approx(probe.kl_of_plan(BitPlan(3)), rel=1e-5)
    probe.rebase({i: 8 for i in everything})
    assert float(probe.kl({}).abs().max()) < 1e-6


def test_parts_of_a_text(rounded: Rounded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matquant.search.probe.BATCH_TOKENS", 48)
    probe = opened(rounded("llama"))
    assert [len(text) for text in probe.texts] == [2, 2, 1] and probe.samples == 5
    whole = probe.kl({1: 2})
    assert len(whole) == 5
    for samples, got in ((1, 2), (2, 2), (3, 4), (5, 5)):
        assert torch.equal(probe.kl({1: 2}, samples), whole[:got])


def test_reads_that_are_not_kept_are_made_again(rounded: Rounded, monkeypatch: pytest.MonkeyPatch) -> None:
    want = opened(rounded("llama")).kl({0: 2, 7: 3})
    monkeypatch.setattr("matquant.search.probe.KEPT_BYTES", 0)
    probe = opened(rounded("llama"))
    for _ in range(2):
        assert torch.equal(probe.kl({0: 2, 7: 3}), want)


def test_blocks_that_hand_on_more_than_hidden_states_are_all_run(rounded: Rounded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose second block looks at something that the first left behind."""
    from transformers.models.llama import modeling_llama

    whole = modeling_llama.LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 0:
            out = whole(self, hidden_states, *args, **kwargs)
            modeling_llama.left_behind = out - hidden_states
            return out
        seen, modeling_llama.left_behind = modeling_llama.left_behind, 0.0
        return whole(self, hidden_states + 3 * seen, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "left_behind", 0.0, raising=False)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    folder = rounded("llama")
    probe = opened(folder)
    assert set(probe.first) == {0}
    want = of_evaluate(folder, as_plan(probe, {7: 2}), matquant.from_pretrained(folder, 8).eval())
    assert float(probe.kl({7: 2}).mean()) == pytest.approx(want, rel=1e-3, abs=2e-7)


def test_refusals(rounded: Rounded, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rounded("llama")
    with pytest.raises(InputError, match="0 sequences of 24 tokens predict nothing; give at least one of 2 tokens"):
        opened(folder, IDS[:0])
    with pytest.raises(InputError, match="sequences of 200 tokens, but the model has 128 positions"):
        opened(folder, torch.zeros(1, 200, dtype=torch.long))
    probe = opened(folder)
    with torch.no_grad():
        probe.model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="the model's logits are not finite at these widths; try --dtype float32"):
        probe.kl({})

    class Broken(nn.Module):
        config = probe.model.config
        device = torch.device("cpu")

        def get_input_embeddings(self) -> nn.Embedding:
            return nn.Embedding(258, 2)

        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": torch.full((*ids.shape, 258), float("nan"))})

    with pytest.raises(InputError, match="the reference's logits are not finite; try --dtype float32"):
        opened(folder, reference=Broken())
    monkeypatch.setattr(models, "find_blocks", lambda model: ("twice", [*model.model.layers, nn.Identity()]))
    with pytest.raises(InputError, match="does not call each of its decoder blocks once"):
        opened(folder)
