"""NestedLinear against the dense weight that NestedWeight.read gives, and what a module must survive in torch."""

import copy

import pytest
import torch
from building import round_to_nearest

from matquant.codes import SLICINGS, planes_needed
from matquant.errors import InputError, MissingPlanesError, PlanError
from matquant.kernels import reference
from matquant.linear import NestedLinear
from matquant.plan import Layout, Shape
from matquant.recipe import Recipe
from matquant.weight import AffineWeight

ALL = (8, 7, 6, 5, 4, 3, 2)
RECIPES = {
    "floor": {},
    "round": {"slicing": "round"},
    "round-overflow": {"slicing": "round-overflow"},
    "overlap": {"overlap": True},
    "symmetric": {"symmetric": True},
    "symmetric-round": {"symmetric": True, "slicing": "round"},
    "whole-row": {"group_size": -1},
    "bfloat16": {"scale_dtype": "bfloat16", "symmetric": False},
    "float32": {"scale_dtype": "float32"},
    "no-refit": {"refit_bits": 0},
}


def recipe(**settings: object) -> Recipe:
    return Recipe(**{"bits": ALL, "group_size": 20} | settings)


def layer_of(layout: Layout, out: int = 12, columns: int = 60, bias: bool = True, seed: int = 0) -> NestedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = round_to_nearest(torch.randn(out, columns, generator=generator), layout)
    return NestedLinear.from_weight(weight, layout, torch.randn(out, generator=generator) if bias else None)


@pytest.mark.parametrize("name", RECIPES)
def test_forward_equals_a_dense_layer_at_every_width(name: str) -> None:
    layout = recipe(**RECIPES[name]).layout
    weight = round_to_nearest(torch.randn(12, 60, generator=torch.Generator().manual_seed(1)), layout)
    layer = NestedLinear.from_weight(weight, layout, torch.randn(12))
    x = torch.randn(2, 3, 60)
    for bits in ALL:
        layer.set_bits(bits)
        assert layer.bits == bits
        dense = weight.read(bits).dense()
        torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
        assert torch.equal(layer.weight_at(bits).dense(), dense)


def test_the_reference_kernel_is_scale_times_code_plus_offset() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (3, 6), generator=generator, dtype=torch.uint8)
    scale, offset = torch.rand(3, 2, generator=generator), torch.rand(3, 2, generator=generator)
    x, bias = torch.randn(5, 6, generator=generator), torch.randn(3, generator=generator)
    y = reference.linear(x, AffineWeight(codes, scale, offset, 4), bias)
    for n in range(5):
        for o in range(3):
            slow = sum(float(x[n, i]) * (float(scale[o, i // 3]) * int(codes[o, i]) + float(offset[o, i // 3])) for i in range(6)) + float(bias[o])
            assert abs(float(y[n, o]) - slow) < 1e-5


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("planes", range(2, 9))
def test_a_layer_with_leading_planes_reads_the_widths_they_allow(slicing: str, planes: int) -> None:
    layout = recipe(slicing=slicing).layout
    full = layer_of(layout)
    part = NestedLinear(Shape(12, 60), layout, planes, full.bias) if planes_needed(2, 8, slicing) <= planes else None
    if part is None:  # round needs three planes for 2 bits
        return
    part.load_state_dict({name: tensor for name, tensor in full.state_dict().items() if name in part.state_dict()})
    assert part.widths == tuple(r for r in ALL if planes_needed(r, 8, slicing) <= planes)
    assert part.bits == max(part.widths)
    assert set(part.refits) == {r for r in (5, 4, 3, 2) if r in part.widths}
    for bits in ALL:
        if bits in part.widths:
            assert torch.equal(part.weight_at(bits).dense(), full.weight_at(bits).dense())
            continue
        with pytest.raises(MissingPlanesError, match=rf"{bits} bits need planes 0-\d, but only 0-{planes - 1} were loaded; .*keep={bits}"):
            part.set_bits(bits)


def test_widths_that_are_not_offered_are_refused() -> None:
    layer = layer_of(Recipe(bits=(8, 4), targets={8: 1.0}, group_size=20).layout)
    with pytest.raises(PlanError, match="6 bits are not offered by this checkpoint; choose from 8, 4"):
        layer.set_bits(6)
    with pytest.raises(PlanError, match="choose from 8, 4"):
        layer.weight_at(2)
    assert layer.bits == 8


@pytest.mark.parametrize("parent", [2, 3, 4, 8])
def test_narrow_parents(parent: int) -> None:
    layout = Recipe(parent_bits=parent, bits=(parent, 2) if parent > 2 else (2,), targets={parent: 1.0}, group_size=20).layout
    layer = layer_of(layout)
    assert [name for name in layer.state_dict() if "plane" in name] == [f"plane_{k}" for k in range(2, parent)]
    assert torch.equal(layer.nested().codes, round_to_nearest(torch.randn(12, 60, generator=torch.Generator().manual_seed(0)), layout).codes)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16)])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_casting_the_model_leaves_scales_alone(cast, scale_dtype: str) -> None:
    layer = layer_of(recipe(scale_dtype=scale_dtype, symmetric=False).layout)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    dense = layer.weight_at(2).dense()
    model = cast(torch.nn.Sequential(layer, torch.nn.Linear(12, 3)))
    for name, tensor in before.items():
        assert model[0].state_dict()[name].dtype == tensor.dtype and torch.equal(model[0].state_dict()[name], tensor), name
    assert torch.equal(layer.weight_at(2).dense(), dense)
    assert model[0].bias.dtype == model[1].weight.dtype
    assert model(torch.randn(2, 60, dtype=model[1].weight.dtype)).dtype == model[1].weight.dtype


def test_input_cast_to_the_dtype_of_the_planes_is_refused() -> None:
    layer = layer_of(recipe().layout)
    unchecked = NestedLinear.forward.__wrapped__ if hasattr(NestedLinear.forward, "__wrapped__") else NestedLinear.forward
    with pytest.raises(InputError, match=r"got torch.uint8 input; it needs floats"):
        unchecked(layer, torch.ones(2, 60).to(layer.weight.dtype))


def test_devices_move() -> None:
    layer = layer_of(recipe().layout).to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.scale.dtype == torch.float16 and layer.weight.dtype == torch.uint8


def test_nothing_quantized_is_a_parameter_or_trains() -> None:
    layer = layer_of(recipe(symmetric=False).layout)
    assert dict(layer.named_parameters()).keys() == {"bias"}
    assert not any(tensor.requires_grad for tensor in layer.state_dict(keep_vars=True).values())
    x = torch.randn(2, 60, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight_at(8).dense().sum(0).expand(2, -1))


def test_modules_are_built_with_their_own_dtypes_whatever_the_default() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = NestedLinear(Shape(12, 60), recipe().layout)
    finally:
        torch.set_default_dtype(default)
    assert layer.scale.dtype == torch.float16 and layer.scale_2.dtype == layer.zero_2.dtype == torch.uint8


def test_state_dict_and_copy() -> None:
    layer = layer_of(recipe(symmetric=False).layout)
    assert list(layer.state_dict()) == [
        *("bias", "weight", "plane_2", "plane_3", "plane_4", "plane_5", "plane_6", "plane_7"),
        *("scale", "zero", "scale_5", "zero_5", "scale_4", "zero_4", "scale_3", "zero_3", "scale_2", "zero_2"),
    ]
    layer.set_bits(3)
    other = copy.deepcopy(layer)
    assert other.bits == 3 and torch.equal(other.weight_at(3).dense(), layer.weight_at(3).dense())


def test_repr_says_what_it_reads() -> None:
    layer = layer_of(recipe(slicing="round").layout, bias=False)
    layer.set_bits(4)
    assert repr(layer) == "NestedLinear(in_features=60, out_features=12, bias=False, bits=4 of 8, planes=8, group_size=20, slicing=round)"
