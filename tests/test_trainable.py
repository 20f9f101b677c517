"""Layers in training against the checkpoint that they will be."""

import pytest
import torch
from grids import make_grid
from torch import Tensor

from matquant.codes import SLICINGS, Slicing, fit_grid, nearest_code
from matquant.linear import NestedLinear
from matquant.plan import Layout
from matquant.trainable import TrainedLinear, TunedLinear, read_at
from matquant.weight import NestedWeight, Refit

RULES = [(8, s, slicing) for s in (True, False) for slicing in SLICINGS] + [(4, False, "floor")]


def start(parent: int, symmetric: bool, slicing: Slicing, dtype: torch.dtype = torch.float16) -> tuple[Tensor, NestedWeight]:
    g, grid = torch.Generator().manual_seed(0), make_grid(parent, 8, symmetric)
    w = torch.randn(6, 32, generator=g)
    s, z = fit_grid(w.reshape(6, 4, 8), grid, dtype)
    zeros = torch.full_like(s, grid.center) if z is None else z
    codes = nearest_code(w.reshape(6, 4, 8) / s[..., None] + zeros[..., None], grid).reshape(6, 32)
    refit = Refit(torch.randint(90, 160, (6, 4), generator=g).to(torch.uint8), torch.randint(100, 150, (6, 4), generator=g).to(torch.uint8))
    return w, NestedWeight(codes, s.to(dtype), None if z is None else z.to(torch.uint8), grid, slicing, {2: refit})


def step(layer: torch.nn.Module, bits: int) -> None:
    """One large step, for what each parameter is, down the gradient of something."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    layer.bits = bits  # pyright: ignore
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for parameter, grad in zip(parameters, torch.autograd.grad(layer(x).square().sum(), parameters, allow_unused=True), strict=True):
        if grad is not None:
            parameter.data -= 0.05 * (1 + float(parameter.detach().abs().max())) * grad / grad.abs().max().clamp(min=1e-9)


@pytest.mark.parametrize(("parent", "symmetric", "slicing"), RULES)
def test_a_tuned_layer_is_what_its_refits_read(parent: int, symmetric: bool, slicing: Slicing) -> None:
    _, weight = start(parent, symmetric, slicing)
    layer = TunedLinear(weight, (3, 2))
    widths = [r for r in (8, 6, 4, 3, 2) if r <= parent]
    for bits in widths:
        assert torch.allclose(layer.weight_at(bits), weight.read(bits).dense(), atol=1e-6)
    for bits in (3, 2):
        step(layer, bits)
    refits = layer.reads.refits()
    now = NestedWeight(weight.codes, weight.scale, weight.zero, weight.grid, slicing, refits)
    assert set(refits) == {3, 2} and not torch.equal(refits[2].scale, weight.refits[2].scale)
    for bits in widths:
        assert torch.allclose(layer.weight_at(bits), now.read(bits).dense(), atol=1e-6)


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize(("parent", "symmetric", "slicing"), RULES)
def test_a_trained_layer_is_what_its_integers_read(parent: int, symmetric: bool, slicing: Slicing, learn_scales: bool) -> None:
    w, weight = start(parent, symmetric, slicing)
    layer = TrainedLinear(w.clone(), weight, (2,), 2, learn_scales)
    widths = [r for r in (8, 6, 4, 3, 2) if r <= parent]
    for bits in widths:
        assert torch.allclose(layer.weight_at(bits), weight.read(bits).dense(), atol=1e-6)
    for bits in (parent, 2):
        step(layer, bits)
    frozen = layer.frozen()
    assert not torch.equal(frozen.codes, weight.codes) and frozen.scale.dtype == torch.float16
    assert (
        torch.equal(frozen.scale, weight.scale) is not learn_scales
        and torch.equal(frozen.refits[2].scale, weight.refits[2].scale) is not learn_scales
    )
    for bits in widths:
        assert torch.allclose(layer.weight_at(bits), frozen.read(bits).dense(), atol=1e-6)
    if not symmetric and learn_scales:
        assert frozen.zero is not None and weight.zero is not None and not torch.equal(frozen.zero, weight.zero)


def test_gradients_reach_what_is_trained_and_nothing_else() -> None:
    w, weight = start(8, False, "floor")
    x = torch.randn(3, 32)
    trained, alone, tuned = TrainedLinear(w, weight, (2,), 2, True), TrainedLinear(w, weight, (2,), 2, False), TunedLinear(weight, (2,))
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {"weight", "ratio", "zero", "reads.reach.2", "reads.v.2"}
    assert {n for n, p in alone.named_parameters() if p.requires_grad} == {"weight"}
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {"reads.reach.2", "reads.v.2"}
    for bits, expected in ((2, {"weight", "ratio", "reads.reach.2", "reads.v.2"}), (4, {"weight", "ratio", "zero"})):
        trained.zero_grad()
        read_at({"": trained}, bits)
        trained(x).square().sum().backward()
        assert {n for n, p in trained.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} - {"zero"} == expected - {"zero"}


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_step_of_the_optimizer_moves_codes_as_far_at_every_width(bits: int) -> None:
    """Scale and zero alike: by `rate` steps of the width, in the mean over the codes."""
    _, weight = start(8, False, "floor")
    layer, rate = TunedLinear(weight, (bits,)), 0.25
    layer.bits = bits
    before = [part.detach() for part in layer.reads.rounded(bits)]
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    sum(part.sum() for part in layer.reads.rounded(bits)).backward()
    optimizer.step()
    m, u = ((was - now.detach()) for was, now in zip(before, layer.reads.rounded(bits), strict=True))
    places = torch.arange(2**bits) - (2**bits - 1) / 2
    assert m.amax() * places.abs().mean() == pytest.approx(rate, abs=0.05)  # as bytes, in steps of 1/128
    assert u.amax() / 2 ** (8 - bits) == pytest.approx(rate, abs=0.1)


@pytest.mark.parametrize("narrowest", [8, 4, 2])
def test_a_zero_moves_by_steps_of_the_narrowest_width(narrowest: int) -> None:
    w, weight = start(8, False, "round")
    assert weight.zero is not None
    layer, rate = TrainedLinear(w, weight, (), narrowest, True), 0.5
    optimizer = torch.optim.Adam([layer.zero], lr=rate)
    layer.zero.sum().backward()
    optimizer.step()
    zero = layer.frozen().zero
    assert zero is not None
    assert torch.allclose(weight.zero.float() - zero.float(), torch.full(zero.shape, rate * 2.0 ** (8 - narrowest)), atol=0.5)


def test_widths_by_name() -> None:
    _, weight = start(8, False, "floor")
    layers = {"a": TunedLinear(weight, (2,)), "b": TunedLinear(weight, (2,))}
    read_at(layers, {"a": 2, "b": 8})
    x = torch.randn(3, 32)
    assert torch.allclose(layers["a"](x), x @ weight.read(2).dense().T, atol=1e-5)
    assert torch.allclose(layers["b"](x), x @ weight.read(8).dense().T, atol=1e-5)


def test_the_same_outputs_as_the_layer_of_the_checkpoint() -> None:
    _, weight = start(8, False, "floor")
    nested = NestedLinear.from_weight(weight, Layout(weight.grid, "floor", (8, 2), (2,), "float16"))
    tuned, x = TunedLinear(weight, (2,)), torch.randn(2, 3, 32)
    for bits in (8, 2):
        nested.set_bits(bits)
        read_at({"": tuned}, bits)
        assert torch.allclose(tuned(x), nested(x), atol=1e-5)


def test_computes_in_what_it_is_given() -> None:
    w, weight = start(8, False, "floor", torch.float32)
    for layer in (TunedLinear(weight, (2,)), TrainedLinear(w, weight, (2,), 2, True)):
        layer.bits = 2
        assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(3, 32))
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), [p for p in layer.parameters() if p.requires_grad], allow_unused=True)
        assert all(g is None or g.dtype == torch.float32 for g in grads)
