"""Grids for tests: Grid itself has no defaults, and most tests care about one of its fields."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from matquant.codes import SLICINGS, Grid, Slicing


def make_grid(bits: int = 8, group_size: int = 64, symmetric: bool = True, overlap: bool = False) -> Grid:
    return Grid(bits, group_size, symmetric, overlap)


def all_codes(grid: Grid) -> Tensor:
    return torch.arange(2**grid.bits, dtype=torch.uint8)


@st.composite
def rules(draw: st.DrawFn, min_parent: int = 2) -> tuple[Grid, Slicing]:
    overlap = draw(st.booleans())
    if overlap:
        return make_grid(8, overlap=True), "floor"
    return make_grid(draw(st.integers(min_parent, 8))), draw(st.sampled_from(SLICINGS))
