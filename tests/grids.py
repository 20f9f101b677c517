"""Grids for tests: Grid itself has no defaults, and most tests care about one of its fields."""

from matquant.codes import Grid


def make_grid(bits: int = 8, group_size: int = 64, symmetric: bool = True, overlap: bool = False) -> Grid:
    return Grid(bits, group_size, symmetric, overlap)
