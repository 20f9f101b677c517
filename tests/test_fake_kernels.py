"""Fake quantization by kernels, in C++ on a CPU and in Triton on a GPU, against the same by torch."""

from types import ModuleType

import pytest
import torch
from grids import make_grid
from test_fake import CASES, problem
from torch import Tensor
from triton_mode import DEVICE

from matquant.codes import Grid, Slicing
from matquant.fake import gradients_reference, read_reference
from matquant.kernels import fake as native
from matquant.kernels.gpu import fake as on_gpu

KERNELS = [pytest.param(native, "cpu", id="native"), pytest.param(on_gpu, DEVICE, id="triton")]


def check(kernels: ModuleType, device: str, leaves: list[Tensor], g: Tensor, bits: int, grid: Grid, slicing: Slicing, close: float) -> None:
    """leaves: w, s, z and, of a refit, m and u. Reads are equal to the bit, gradients are sums."""
    own: list[Tensor | None] = [*leaves, None, None][:5]
    there = [None if x is None else x.to(device) for x in own]
    assert torch.equal(kernels.read(*there, bits, grid, slicing).cpu(), read_reference(*own, bits, grid, slicing))
    want = gradients_reference(*own, g, bits, grid, slicing)
    for of_weight in (True, False):
        got = kernels.gradients(*there, g.to(device), bits, grid, slicing, of_weight)
        assert [x is None for x in got] == [not of_weight, False, False, len(leaves) == 3, len(leaves) == 3]
        for a, b in zip(got, want, strict=True):
            assert a is None or torch.allclose(a.cpu(), b, rtol=close, atol=close * float(b.abs().max()))


@pytest.mark.parametrize(("kernels", "device"), KERNELS)
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("parent", "bits", "slicing"), CASES)
def test_reads_and_gradients_are_those_of_torch(parent: int, bits: int, slicing: Slicing, refit: bool, kernels: ModuleType, device: str) -> None:
    grid = make_grid(parent, 8, symmetric=False)
    g = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    check(kernels, device, problem(grid)[: 5 if refit else 3], g, bits, grid, slicing, 1e-5)


@pytest.mark.parametrize(("kernels", "device"), KERNELS)
@pytest.mark.parametrize(("rows", "columns", "size"), [(3, 96, 96), (5, 2304, 2304), (70, 192, 64), (9, 35, 7), (1, 1, 1)])
def test_groups_of_any_length(rows: int, columns: int, size: int, kernels: ModuleType, device: str) -> None:
    """Padded ones, longer than a program's share, and more than one program, or thread, has; tensors that are not contiguous."""
    grid, random = make_grid(8, size, symmetric=False), torch.Generator().manual_seed(0)
    w, shape = torch.randn(columns, rows, generator=random).T, (rows, columns // size)
    s, z = 0.01 + 0.02 * torch.rand(shape, generator=random), torch.randint(0, 256, shape, generator=random).float()
    check(kernels, device, [w, s, z], torch.randn(columns, rows, generator=random).T, 4, grid, "round", 1e-4)


def test_native_gives_the_same_bits_for_any_number_of_threads() -> None:
    grid, random = make_grid(8, 64, symmetric=False), torch.Generator().manual_seed(0)
    w, g = (torch.randn(700, 1024, generator=random) for _ in range(2))
    s, z = 0.01 + 0.02 * torch.rand(700, 16, generator=random), torch.randint(0, 256, (700, 16), generator=random).float()
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append([native.read(w, s, z, None, None, 3, grid, "floor"), *native.gradients(w, s, z, None, None, g, 3, grid, "floor")[:3]])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_native_takes_what_is_no_number() -> None:
    """Its code is 0, as that of the lowest weights is; nothing is read or written out of place."""
    grid = make_grid(8, 4, symmetric=False)
    w = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e30]])
    read = native.read(w, torch.full((1, 1), 0.5), torch.full((1, 1), 3.0), None, None, 8, grid, "floor")
    assert read.tolist() == [[-1.5, 126.0, -1.5, 126.0]]
