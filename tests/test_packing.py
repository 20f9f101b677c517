"""Planes against one bit at a time."""

import pytest
import torch
from grids import make_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matquant.codes import SLICINGS, Slicing, planes_needed, slice_codes
from matquant.packing import pack_planes, unpack_planes

relaxed = settings(deadline=None, max_examples=80)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pack_slowly(codes: list[list[int]], bits: int) -> list[list[list[int]]]:
    """The format's sentence, bit by bit: plane 0 is the most significant; the first input channel is the lowest bit of its byte."""
    width = -(-len(codes[0]) // 8) if codes else 0
    planes = [[[0] * width for _ in codes] for _ in range(bits)]
    for o, row in enumerate(codes):
        for i, q in enumerate(row):
            for plane in range(bits):
                planes[plane][o][i // 8] |= ((q >> (bits - 1 - plane)) & 1) << (i % 8)
    return planes


shapes = st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(2, 8))


@given(shapes, st.integers(0, 999))
@relaxed
def test_planes_round_trip_for_any_shape(shape: tuple[int, int, int], seed: int) -> None:
    rows, columns, bits = shape
    codes = random_codes(rows, columns, bits, seed)
    planes = pack_planes(codes, bits)
    assert tuple(planes.shape) == (bits, rows, -(-columns // 8)) and planes.dtype == torch.uint8
    assert unpack_planes(planes, columns, bits).equal(codes)


@pytest.mark.parametrize(("rows", "columns", "bits"), [(3, 17, 8), (1, 8, 2), (2, 1, 5), (4, 64, 8)])
def test_packing_against_one_bit_at_a_time(rows: int, columns: int, bits: int) -> None:
    codes = random_codes(rows, columns, bits)
    assert pack_planes(codes, bits).tolist() == pack_slowly(codes.tolist(), bits)


def test_padding_bits_are_zero() -> None:
    planes = pack_planes(torch.full((2, 11), 255, dtype=torch.uint8), 8)
    assert planes[:, :, 1].eq(0b111).all()


@given(shapes, st.data())
@relaxed
def test_missing_planes_read_as_zero_bits(shape: tuple[int, int, int], data: st.DataObject) -> None:
    rows, columns, bits = shape
    held = data.draw(st.integers(1, bits))
    codes = random_codes(rows, columns, bits)
    left = bits - held
    assert unpack_planes(pack_planes(codes, bits)[:held], columns, bits).equal((codes >> left) << left)


@given(st.sampled_from(SLICINGS), st.integers(2, 8), st.data())
@relaxed
def test_a_slice_needs_its_planes_and_no_more(slicing: Slicing, parent: int, data: st.DataObject) -> None:
    """floor r planes, round r + 1: the rest may be anything."""
    bits = data.draw(st.integers(2, parent))
    grid = make_grid(parent)
    need = planes_needed(bits, parent, slicing)
    planes = pack_planes(random_codes(3, 21, parent), parent)
    noisy = planes.clone()
    noisy[need:] = torch.randint(0, 256, noisy[need:].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted = slice_codes(unpack_planes(planes, 21, parent), bits, grid, slicing)
    assert slice_codes(unpack_planes(noisy, 21, parent), bits, grid, slicing).equal(wanted)
    assert slice_codes(unpack_planes(planes[:need], 21, parent), bits, grid, slicing).equal(wanted)


def test_inputs_stay_as_they_are_and_may_be_strided() -> None:
    codes = random_codes(6, 48, 8)
    kept = codes.clone()
    assert unpack_planes(pack_planes(codes.T, 8), 6, 8).equal(codes.T)
    assert codes.equal(kept)
    strided = pack_planes(random_codes(6, 96, 8), 8)[:, ::2]
    assert unpack_planes(strided, 96, 8).equal(unpack_planes(strided.contiguous(), 96, 8))
