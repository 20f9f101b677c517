"""Walking a model block by block: exact for every architecture; stages, and the ways to call a block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from torch import Tensor, nn
from walks import CPU, F32, WINDOWS, Walk, every_stream

from matquant import activations, models
from matquant.errors import InputError
from matquant.recipe import ORIGINAL

Tiny = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("quick_collect")
LLAMA = [
    [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
    [["self_attn.o_proj"]],
    [["mlp.gate_proj", "mlp.up_proj"]],
    [["mlp.down_proj"]],
]
STAGES = dict.fromkeys(["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], LLAMA) | {
    "phi": [[["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"]], [["self_attn.dense"]], [["mlp.fc2"]]],
    "phi3": [[["self_attn.qkv_proj"]], [["self_attn.o_proj"]], [["mlp.gate_up_proj"]], [["mlp.down_proj"]]],
    "opt": [[["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]], [["self_attn.out_proj"]], [["fc1"]], [["fc2"]]],
    "gpt2": [[["attn.c_attn"]], [["attn.c_proj"]], [["mlp.c_fc"]], [["mlp.c_proj"]]],
    "mixtral": LLAMA[:2],
}  # fmt: skip


def dense_inputs(model: Any, blocks: nn.ModuleList, names: list[str], windows: Tensor) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """(layer -> its inputs in float64, one matrix a window; the last block's output for every window) of the model's own forward."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    last: list[Tensor] = []
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2).double()))
    blocks[-1].register_forward_hook(lambda _, args, out: last.append((out[0] if isinstance(out, tuple) else out)[0]))
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    return inputs, last


def spelled(stages: list[list[list[str]]], prefix: str) -> list[list[list[str]]]:
    """Without the prefix; the order within a group is the model's own affair."""
    return [[sorted(name.removeprefix(prefix) for name in group) for group in stage] for stage in stages]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_walk_is_the_models_own_forward(name: str, tiny: Tiny) -> None:
    """Without quantization in between, hidden states are those of the model to the bit, and so are the layers' inputs."""
    walk = Walk(tiny(name))
    assert len(walk.calls) == 2 and len(walk.hidden) == 3 and all("forward" not in vars(block) for block in walk.blocks)
    dense = models.load_dense("it", tiny(name), None, dtype=F32)
    inputs, last = dense_inputs(dense, models.find_blocks(dense)[1], list(walk.layers.quantized), WINDOWS)
    streams = {r: walk.hidden.clone() for r in (ORIGINAL, 2)}
    for index, block in enumerate(walk.blocks):
        layers, weights = walk.of_block(index), dict.fromkeys(streams, walk.held(index))
        stages = activations.stages(block, walk.calls[index], streams[ORIGINAL], layers)
        narrow, before = {2: streams[2]}, streams[ORIGINAL].clone()
        seen = activations.pass_original(block, walk.calls[index], streams[ORIGINAL], weights[ORIGINAL], layers, [g[0] for s in stages for g in s])
        expected = [[sorted(group) for group in stage] for stage in STAGES[name]]
        assert spelled(stages, f"{walk.prefix}.{index}.") == expected
        for stage in stages:
            leaders = [group[0] for group in stage]
            found = activations.statistics(block, walk.calls[index], narrow, weights, layers, leaders, seen, before)
            assert sorted(found) == sorted(leaders)
            for group in stage:
                for layer in group:
                    x = torch.cat(inputs[layer])
                    h = found[group[0]].h[ORIGINAL].double()
                    torch.testing.assert_close(h, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(x.square().mean()))
                    assert torch.equal(found[group[0]].h[2], found[group[0]].h[ORIGINAL])
                    assert not any(c.any() for c in found[group[0]].cross.values())
        assert activations.propagate(block, walk.calls[index], narrow, weights, layers, streams[ORIGINAL]) == {2: 0.0}
    assert all(torch.equal(a, b) for r in streams for a, b in zip(streams[r], last, strict=True))


def test_sliding_windows_are_walked_with_their_masks(tiny: Tiny) -> None:
    """A window of 32 tokens hides the first 8 of 40 from the last: the walk above would pass without masks if they did nothing."""
    walk = Walk(tiny("gemma3"), WINDOWS[:1])
    calls, hidden, blocks = walk.calls, walk.hidden, walk.blocks
    unmasked = activations.Call(calls[0].args, calls[0].kwargs | {"attention_mask": None}, calls[0].named)
    with torch.inference_mode():
        assert not torch.equal(calls[0](blocks[0], hidden), unmasked(blocks[0], hidden))


class Block(nn.Module):
    """Called by name, returns a tuple; its second layer shares the first one's input, its third is reached by some windows only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, *, scale: float) -> tuple[Tensor, None]:
        out = (self.a(hidden_states) + self.b(hidden_states)) * scale
        return (self.rare(out) if hidden_states.detach()[0, 0, 0].item() > 5 else out), None


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        x = ids[..., None].expand(-1, -1, 4).float()
        for scale, block in enumerate(self.blocks, 1):
            x = block(hidden_states=x, scale=float(scale))[0]
        return x


def test_other_ways_to_call_a_block() -> None:
    torch.manual_seed(0)
    toy, windows = Toy(), torch.tensor([[1, 2, 3], [9, 2, 3]])
    calls, hidden = activations.record(toy, toy.blocks, windows, CPU)
    assert [call.kwargs for call in calls] == [{"scale": 1.0}, {"scale": 2.0}] and all(call.named for call in calls)
    layers = dict(toy.blocks[0].named_children())
    assert activations.stages(toy.blocks[0], calls[0], hidden, layers) == [[["a", "b"]], [["rare"]]]
    held = {ORIGINAL: {name: layer.weight.data for name, layer in layers.items()}}
    find = lambda x: every_stream(toy.blocks[0], calls[0], {ORIGINAL: x.clone()}, held, layers, ["a", "rare"])[0]  # noqa: E731
    both = find(hidden)
    x = hidden.flatten(0, 1)
    torch.testing.assert_close(both["a"].h[ORIGINAL], x.T @ x / 6)
    out = (toy.blocks[0].a(hidden[1]) + toy.blocks[0].b(hidden[1])).detach()
    torch.testing.assert_close(both["rare"].h[ORIGINAL], out.T @ out / 3)  # the tokens that reach it
    assert list(find(hidden[:1])) == ["a"]
    assert activations.stages(toy.blocks[0], calls[0], hidden[:1], layers) == [[["a", "b"]], [["rare"]]]  # last, for want of tokens
    for call, block in zip(calls, toy.blocks, strict=True):
        names = dict(block.named_children())
        activations.pass_original(block, call, hidden, {name: layer.weight.data for name, layer in names.items()}, names)
    assert all(torch.equal(x, toy(w[None], False)[0]) for x, w in zip(hidden, windows, strict=True))


def test_a_model_that_does_not_call_its_blocks() -> None:
    toy = Toy()
    toy.forward = lambda ids, use_cache: ids  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"never called its decoder blocks; its architecture cannot be walked block by block"):
        activations.record(toy, toy.blocks, torch.zeros(1, 3, dtype=torch.long), CPU)
    assert all("forward" not in vars(block) for block in toy.blocks)


class Positioned(nn.Module):
    """What is passed besides the hidden state decides how many sequences one call may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x) + (
            shift if shift.dim() == 1 else shift.repeat_interleave(len(x) // len(shift), 0) * torch.arange(len(x))[:, None, None]
        )


@pytest.mark.parametrize(
    ("shift", "many"),
    [
        (torch.ones(4), True),
        (torch.ones(3, 1, 1), False),  # does not fit two
        (torch.ones(1, 5, 4), False),  # fits, with another result
    ],
)
def test_several_sequences_pass_at_once_where_that_changes_nothing(shift: Tensor, many: bool) -> None:
    call = activations.Call((shift,), {}, named=False)
    assert call.takes_many(Positioned(), torch.randn(4, 5, 4)) == many
    assert not call.takes_many(Positioned(), torch.randn(1, 5, 4)), "there is one only"


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2"])
def test_blocks_of_real_models_take_several_sequences(name: str, tiny: Tiny) -> None:
    walk = Walk(tiny(name))
    assert walk.calls[0].takes_many(walk.blocks[0], walk.hidden)
