"""NestedWeight.read and AffineWeight.dense against loops in float64."""

import pytest
import torch
from grids import make_grid
from torch import Tensor

from matquant.codes import SLICINGS, Grid, Slicing, levels, planes_needed
from matquant.errors import MissingPlanesError, RecipeError
from matquant.packing import pack_planes, unpack_planes
from matquant.weight import AffineWeight, NestedWeight, Refit

OUT, IN, GROUP = 3, 16, 8


def nested(grid: Grid, slicing: Slicing, seed: int = 0, dtype: torch.dtype = torch.float16, refits: dict[int, Refit] | None = None) -> NestedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**grid.bits, (OUT, IN), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(OUT, grid.groups(IN), generator=generator) + 0.01).to(dtype)
    zero = None if grid.symmetric else torch.randint(0, 2**grid.bits, scale.shape, dtype=torch.uint8, generator=generator)
    return NestedWeight(codes, scale, zero, grid, slicing, refits or {})


def read_slowly(weight: NestedWeight, bits: int) -> Tensor:
    """s (level - z) one weight at a time."""
    table = levels(bits, weight.grid, weight.slicing).double().tolist()
    dense = torch.zeros(OUT, IN, dtype=torch.float64)
    size = IN // weight.scale.shape[1]
    for o in range(OUT):
        for i in range(IN):
            z = weight.grid.center if weight.zero is None else weight.zero[o, i // size].item()
            dense[o, i] = weight.scale[o, i // size].double() * (table[int(weight.codes[o, i])] - z)
    return dense


GRIDS = [make_grid(8, GROUP), make_grid(8, GROUP, symmetric=False), make_grid(4, GROUP), make_grid(5, -1, symmetric=False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("grid", [*GRIDS, make_grid(8, GROUP, overlap=True)], ids=repr)
def test_every_width_against_a_loop(grid: Grid, slicing: Slicing, dtype: torch.dtype) -> None:
    if grid.overlap:
        slicing = "floor"
    weight = nested(grid, slicing, dtype=dtype)
    for bits in range(2, grid.bits + 1):
        read = weight.read(bits)
        assert read.bits == bits and read.scale.dtype == read.offset.dtype == torch.float32
        torch.testing.assert_close(read.dense(torch.float64).double(), read_slowly(weight, bits), rtol=1e-6, atol=1e-5)


def test_dense_rounds_once() -> None:
    weight = AffineWeight(torch.tensor([[3]], dtype=torch.uint8), torch.tensor([[0.1]]), torch.tensor([[0.2]]), 2)
    assert weight.dense(torch.bfloat16).item() == torch.tensor(0.2 + 3 * 0.1).bfloat16().item()
    assert weight.dense().dtype == torch.float32


def test_a_refit_replaces_the_read_of_its_width_only() -> None:
    """k = 192 is m = 1.5; at 3 bits step is 32 and shift 15.5, so that w = s (1.5 (32 p - 112) + 127.5 - 100) = s (48 p - 140.5)."""
    refit = Refit(torch.full((OUT, 2), 192, dtype=torch.uint8), torch.full((OUT, 2), 100, dtype=torch.uint8))
    weight = nested(make_grid(8, GROUP), "floor", refits={3: refit})
    plain = nested(make_grid(8, GROUP), "floor")
    scale = weight.scale.float().repeat_interleave(GROUP, 1)
    torch.testing.assert_close(weight.read(3).dense(), scale * (48 * (weight.codes >> 5).float() - 140.5), rtol=1e-6, atol=1e-4)
    assert weight.read(3).codes.equal(plain.read(3).codes)
    assert weight.read(4).dense().equal(plain.read(4).dense())


@pytest.mark.parametrize("slicing", SLICINGS)
def test_a_partial_weight_reads_what_its_planes_allow(slicing: Slicing) -> None:
    full = nested(make_grid(8, GROUP), slicing)
    for held in range(2, 9):
        codes = unpack_planes(pack_planes(full.codes, 8)[:held], IN, 8)
        partial = NestedWeight(codes, full.scale, None, full.grid, slicing, planes=held)
        assert partial.packed().equal(full.packed()[:held])
        for bits in range(2, 9):
            if planes_needed(bits, 8, slicing) <= held:
                assert partial.read(bits).dense().equal(full.read(bits).dense())
            else:
                with pytest.raises(MissingPlanesError, match=rf"{bits} bits need planes 0-\d, but only 0-{held - 1} are here; get the missing"):
                    partial.read(bits)


def test_a_width_the_grid_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot read 6 bits from a 4-bit parent"):
        nested(make_grid(4, GROUP), "floor").read(6)


def test_invariants() -> None:
    codes = torch.zeros(OUT, IN, dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r"scale \(3, 1\), expected \(3, 2\)"):
        NestedWeight(codes, torch.ones(OUT, 1), None, make_grid(8, GROUP), "floor")
    with pytest.raises(AssertionError, match="zero is stored exactly when"):
        NestedWeight(codes, torch.ones(OUT, 2), None, make_grid(8, GROUP, symmetric=False), "floor")
    with pytest.raises(RecipeError, match="group_size 5 does not divide"):
        NestedWeight(codes, torch.ones(OUT, 2), None, make_grid(8, 5), "floor")
