"""Streams of activations: each width's own moments against hooks and sums in float64; in memory and in files; routed experts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from walks import Walk, Weights, every_stream

from matquant import activations
from matquant.activations import Inputs
from matquant.moments import RIDGE, as_of_all
from matquant.recipe import ORIGINAL

Tiny = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("quick_collect")
WIDTHS = (4, 2)


def quantized(held: dict[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Weights with an error, as if read at some width."""
    g = torch.Generator().manual_seed(seed)
    return {name: w + size * w.std() * torch.randn(w.shape, generator=g) for name, w in held.items()}


def drifted(walk: Walk, index: int) -> tuple[dict[int, Tensor], Weights]:
    """Streams that differ, and other weights of every layer in each."""
    g = torch.Generator().manual_seed(9)
    streams = {r: walk.hidden + size * torch.randn(walk.hidden.shape, generator=g) for r, size in ((ORIGINAL, 0.0), (4, 0.1), (2, 0.5))}
    held = walk.held(index)
    return streams, {ORIGINAL: held, 4: quantized(held, 0.1, 4), 2: quantized(held, 0.5, 2)}


def layer_inputs(walk: Walk, index: int, hidden: Tensor, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs of every layer in float64, one matrix over all tokens; the block's outputs) with these weights, slowly."""
    block, layers = walk.blocks[index], walk.of_block(index)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2).double()))
        for name, layer in layers.items()
    ]
    for name, layer in layers.items():
        layer.weight.data = weights[name].clone()
    with torch.no_grad():
        outputs = torch.cat([walk.calls[index](block, x[None]) for x in hidden])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}, outputs


@pytest.mark.parametrize("panel", [256, 12])
def test_moments_of_every_stream_are_those_of_its_own_inputs_and_weights(tiny: Tiny, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """H_r = X_r^T X_r / n and C_r = (X - X_r)^T X_r / n, explicitly, for the layers of every stage."""
    monkeypatch.setattr("matquant.moments.PANEL", panel)
    walk = Walk(tiny("llama"))
    streams, weights = drifted(walk, 1)
    slow = {r: layer_inputs(walk, 1, streams[r], weights[r])[0] for r in streams}
    layers = walk.of_block(1)
    for stage in activations.stages(walk.blocks[1], walk.calls[1], streams[ORIGINAL], layers):
        leader = stage[0][0]
        own = {r: x.clone() for r, x in streams.items()}
        found = every_stream(walk.blocks[1], walk.calls[1], own, weights, layers, [leader])[0][leader]
        assert set(found.h) == {ORIGINAL, 4, 2} and set(found.cross) == {4, 2}
        for r, h in found.h.items():
            x = slow[r][leader]
            torch.testing.assert_close(h.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(x.square().mean()))
        for r, c in found.cross.items():
            x = slow[r][leader]
            torch.testing.assert_close(c.double(), (slow[ORIGINAL][leader] - x).T @ x / len(x), rtol=1e-3, atol=1e-4 * float(x.square().mean()))
            assert (found.h[r] - found.h[ORIGINAL]).abs().max() > 0.01 * found.h[r].abs().max(), "the streams do not differ"


def test_moments_of_fewer_sequences_are_corrected_by_what_the_original_says_of_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of twelve sequences: the formulas in float64, at every layer that leads; and the whole's moments come nearer."""
    walk = Walk(tiny("llama"), torch.randint(250, (12, 64), generator=torch.Generator().manual_seed(3)))
    _, weights = drifted(walk, 1)
    g = torch.Generator().manual_seed(4)
    streams = {
        r: walk.hidden + size * walk.hidden.std() * torch.randn(walk.hidden.shape, generator=g) for r, size in ((ORIGINAL, 0), (4, 0.1), (2, 0.5))
    }
    slow = {r: layer_inputs(walk, 1, streams[r], weights[r])[0] for r in streams}
    layers = walk.of_block(1)
    leaders = [group[0] for stage in activations.stages(walk.blocks[1], walk.calls[1], streams[ORIGINAL], layers) for group in stage]
    own, original = {r: streams[r][:6] for r in WIDTHS}, streams[ORIGINAL][:6].clone()
    seen = activations.pass_original(walk.blocks[1], walk.calls[1], streams[ORIGINAL], weights[ORIGINAL], layers, leaders, first=6)
    alone = activations.statistics(walk.blocks[1], walk.calls[1], own, weights, layers, leaders, activations.Seen(), original)
    found = activations.statistics(walk.blocks[1], walk.calls[1], own, weights, layers, leaders, seen, original)
    nearer: list[bool] = []
    for name in leaders:
        x, tokens = slow[ORIGINAL][name], 6 * 64
        part, whole = (y.T @ y / len(y) for y in (x[:tokens], x))
        torch.testing.assert_close(seen.part[name].double(), part, rtol=1e-4, atol=1e-5 * float(part.abs().max()))
        assert torch.equal(found[name].h[ORIGINAL], seen.whole[name])
        for r in WIDTHS:
            y = slow[r][name]
            z = y[:tokens]
            a = torch.linalg.solve(part + RIDGE * part.diagonal().mean() * torch.eye(len(part)), x[:tokens].T @ z / tokens)
            h = z.T @ z / tokens + a.T @ (whole - part) @ a
            cross = (x[:tokens] - z).T @ z / tokens + (torch.eye(len(a)) - a.T) @ (whole - part) @ a
            close = {"rtol": 1e-2, "atol": 1e-3 * float(h.abs().max())}
            torch.testing.assert_close(found[name].h[r].double(), h, **close)
            torch.testing.assert_close(found[name].cross[r].double(), cross, **close)
            assert torch.linalg.eigvalsh(found[name].h[r].double()).min() > -1e-4 * h.diagonal().mean()
            wanted = y.T @ y / len(y)
            nearer.append(bool((found[name].h[r] - wanted).norm() < (alone[name].h[r] - wanted).norm()))
    assert len(nearer) == 8 and sum(nearer) >= 6
    monkeypatch.setattr(activations, "ENOUGH", 7)  # 384 tokens are too few for 64 channels
    few = activations.statistics(walk.blocks[1], walk.calls[1], own, weights, layers, leaders, seen, original)
    assert all(
        torch.equal(few[name].h[r], alone[name].h[r]) and torch.equal(few[name].cross[r], alone[name].cross[r]) for name in leaders for r in WIDTHS
    )


def test_moments_stay_where_the_originals_cannot_be_factored() -> None:
    h, cross, part = torch.eye(3), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    assert as_of_all(h, cross, part, torch.eye(3)) == (h, cross)


def test_later_layers_see_what_passed_the_quantized_ones_before_them(tiny: Tiny) -> None:
    """The same stream; only q, k, v replaced: o's inputs change, q's do not."""
    walk = Walk(tiny("llama"))
    held, layers = walk.held(0), walk.of_block(0)
    o, q = (f"model.layers.0.self_attn.{part}_proj" for part in "oq")
    changed = held | {name: w for name, w in quantized(held, 0.5, 1).items() if name.endswith(("q_proj", "k_proj", "v_proj"))}

    def moments(weights: dict[str, Tensor]) -> dict[str, Inputs]:
        streams = {2: walk.hidden.clone()}
        return activations.statistics(walk.blocks[0], walk.calls[0], streams, {2: weights}, layers, [q, o], activations.Seen())

    before, after = moments(held), moments(changed)
    assert torch.equal(before[q].h[2], after[q].h[2])
    expected = layer_inputs(walk, 0, walk.hidden, changed)[0][o]
    torch.testing.assert_close(after[o].h[2].double(), expected.T @ expected / len(expected), rtol=1e-4, atol=1e-6)
    assert (after[o].h[2] - before[o].h[2]).abs().max() > 0.1 * before[o].h[2].abs().max()


def test_without_the_original_there_is_no_cross_moment(tiny: Tiny) -> None:
    walk = Walk(tiny("llama"))
    streams, weights = drifted(walk, 0)
    layers = walk.of_block(0)
    leader = next(iter(layers))
    narrow = {r: streams[r] for r in WIDTHS}
    seen = activations.pass_original(walk.blocks[0], walk.calls[0], streams[ORIGINAL], weights[ORIGINAL], layers, [leader])
    for known, widths in ((activations.Seen(), WIDTHS), (seen, (ORIGINAL, *WIDTHS))):
        found = activations.statistics(walk.blocks[0], walk.calls[0], narrow, weights, layers, [leader], known)[leader]
        assert tuple(found.h) == widths and found.cross == {}


def test_without_a_stream_of_its_own_every_width_has_the_originals_moments(tiny: Tiny) -> None:
    walk = Walk(tiny("llama"))
    layers = walk.of_block(0)
    leaders = [name for name in layers if name.endswith(("o_proj", "down_proj"))]
    seen = activations.pass_original(walk.blocks[0], walk.calls[0], walk.hidden, walk.held(0), layers, leaders)
    found = activations.statistics(walk.blocks[0], walk.calls[0], {}, {}, layers, leaders, seen)
    assert list(found) == leaders and all(list(found[name].h) == [ORIGINAL] and found[name].h[ORIGINAL] is seen.whole[name] for name in leaders)


@pytest.mark.parametrize("fewer", [0, 1])
def test_streams_move_on_with_their_own_weights_and_tell_their_errors(tiny: Tiny, fewer: int) -> None:
    walk = Walk(tiny("llama"))
    streams, weights = drifted(walk, 0)
    streams = {r: x if r == ORIGINAL else x[: len(x) - fewer].clone() for r, x in streams.items()}
    outputs = {r: layer_inputs(walk, 0, streams[r], weights[r])[1] for r in streams}
    errors = every_stream(walk.blocks[0], walk.calls[0], streams, weights, walk.of_block(0), [])[1]
    for r in streams:
        torch.testing.assert_close(streams[r], outputs[r])
    for r, error in errors.items():
        y = outputs[ORIGINAL][: len(outputs[r])].double()
        assert error == pytest.approx(float((outputs[r].double() - y).square().sum() / y.square().sum()), rel=1e-5)
    assert tuple(errors) == WIDTHS and 0 < errors[4] < errors[2]
    zeros = torch.zeros_like(streams[ORIGINAL])
    assert activations.propagate(walk.blocks[1], walk.calls[1], {2: streams[2]}, {2: walk.held(1)}, walk.of_block(1), zeros) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streams_in_a_file_are_those_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    hidden = torch.randn(3, 5, 7).to(dtype).transpose(0, 0)
    mapped, plain = activations.like(hidden, tmp_path / "stream.bin"), activations.like(hidden, None)
    assert torch.equal(mapped, hidden) and torch.equal(plain, hidden) and mapped.dtype == dtype and mapped.shape == hidden.shape
    assert (tmp_path / "stream.bin").stat().st_size == hidden.numel() * hidden.element_size()
    mapped[1] = 7
    plain[2] = 9
    assert not (hidden[1] == 7).all() and not (hidden[2] == 9).all(), "copies, not views"
    again = torch.from_file(str(tmp_path / "stream.bin"), shared=True, size=hidden.numel(), dtype=dtype).view(3, 5, 7)
    assert torch.equal(again, mapped), "what is written goes to the file"
    other = activations.like(hidden, tmp_path / "stream.bin")
    assert torch.equal(other, hidden)


def test_streams_walk_the_same_from_files(tiny: Tiny, tmp_path: Path) -> None:
    walk = Walk(tiny("llama"))
    streams, weights = drifted(walk, 0)
    layers = walk.of_block(0)
    leader = "model.layers.0.mlp.down_proj"
    results = []
    for place in (None, tmp_path):
        own = {r: activations.like(x, place and place / f"{r}.bin") for r, x in streams.items()}
        found, errors = every_stream(walk.blocks[0], walk.calls[0], own, weights, layers, [leader])
        results.append((found[leader], errors, own))
    (one, errors, hidden), (two, others, mapped) = results
    assert errors == others and all(torch.equal(hidden[r], mapped[r]) for r in hidden)
    assert all(torch.equal(one.h[r], two.h[r]) for r in one.h) and all(torch.equal(one.cross[r], two.cross[r]) for r in one.cross)


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    """Writing to a mapped page that finds no place on disk would kill the process."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        activations.like(torch.zeros(3, 500, 700), Path("/dev/full"))


class Routed(nn.Module):
    """Tokens above 0 go to one expert, the others to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for chosen, expert in zip((x[..., 0] > 0, x[..., 0] <= 0), self.experts, strict=False):
            if chosen.any():
                out[chosen] = expert["up"](x[chosen])
        return out


def test_experts_are_one_stage_and_one_that_a_stream_does_not_reach_takes_the_moments_of_another() -> None:
    torch.manual_seed(0)
    block, call = Routed(), activations.Call((), {}, named=False)
    layers = {f"experts.{i}.up": expert["up"] for i, expert in enumerate(block.experts)}
    names = list(layers)
    hidden = torch.randn(2, 6, 4)
    assert activations.stages(block, call, hidden, layers) == [[[names[0]], [names[1]]], [[names[2]]]]
    held = {name: layer.weight.data for name, layer in layers.items()}
    above = hidden.clone()
    above[..., 0] = above[..., 0].abs() + 0.1
    streams = {ORIGINAL: hidden, 4: hidden + 0.0, 2: above}
    found, _ = every_stream(block, call, {r: x.clone() for r, x in streams.items()}, dict.fromkeys(streams, held), layers, names)
    assert list(found) == names[:2]
    tokens = hidden.flatten(0, 1)
    low = tokens[tokens[:, 0] <= 0]
    torch.testing.assert_close(found[names[1]].h[4], low.T @ low / len(low))
    assert torch.equal(found[names[1]].h[2], found[names[1]].h[ORIGINAL])  # nothing of 2 bits came there
    torch.testing.assert_close(found[names[0]].h[2], above.flatten(0, 1).T @ above.flatten(0, 1) / 12)
    assert found[names[0]].cross == {}, "a router's choice is not paired"


def test_what_a_router_sends_to_an_expert_is_not_paired_with_what_it_sent_before() -> None:
    """As many tokens in both streams, but others: their differences would mean nothing."""
    torch.manual_seed(0)
    block, call = Routed(), activations.Call((), {}, named=False)
    layers = {f"experts.{i}.up": expert["up"] for i, expert in enumerate(block.experts)}
    names = list(layers)[:2]
    hidden = torch.randn(1, 6, 4)
    hidden[0, :, 0] = torch.tensor([1.0, 1, 1, -1, -1, -1])
    flipped = hidden.clone()
    flipped[..., 0] *= -1
    held = {name: layer.weight.data for name, layer in layers.items()}
    streams = {ORIGINAL: hidden, 2: flipped}
    found, _ = every_stream(block, call, streams, dict.fromkeys(streams, held), layers, names)
    assert all(set(found[name].h) == {ORIGINAL, 2} and found[name].cross == {} for name in names)
