"""Fake quantization by Triton kernels against the same by torch."""

import pytest
import torch
from grids import make_grid
from test_fake import CASES, problem
from torch import Tensor
from triton_mode import DEVICE

from matquant.codes import Slicing
from matquant.fake import fake_read
from matquant.kernels.gpu import fake


def by_torch(leaves: list[Tensor], weights: Tensor, bits: int, grid: object, slicing: Slicing) -> tuple[Tensor, ...]:
    """(the read, its gradients), on the CPU."""
    w, s, z, *own = (x.detach().cpu().requires_grad_() for x in leaves)
    read = fake_read(w, s, z, bits, grid, slicing, *own)  # pyright: ignore
    return read, *torch.autograd.grad((read * weights).sum(), [w, s, z, *own])


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("parent", "bits", "slicing"), CASES)
def test_reads_and_gradients_are_those_of_torch(parent: int, bits: int, slicing: Slicing, refit: bool) -> None:
    grid = make_grid(parent, 8, symmetric=False)
    leaves = [x.to(DEVICE) for x in problem(grid)[: 5 if refit else 3]]
    w, s, z, m, u = [*leaves, None, None][:5]
    assert w is not None and s is not None and z is not None
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    read, *want = by_torch(leaves, weights, bits, grid, slicing)
    assert torch.equal(fake.read(w, s, z, m, u, bits, grid, slicing).cpu(), read)
    got = fake.gradients(w, s, z, m, u, weights.to(DEVICE), bits, grid, slicing)
    assert got[3:] == (None, None) or refit
    for a, b in zip(got, want, strict=False):
        assert a is not None and torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(("rows", "columns", "size"), [(3, 96, 96), (5, 2304, 2304), (70, 192, 64)])
def test_groups_of_any_length(rows: int, columns: int, size: int) -> None:
    """Padded ones, longer than a program's share, and more than one program has."""
    grid, g = make_grid(8, size, symmetric=False), torch.Generator().manual_seed(0)
    w, shape = torch.randn(rows, columns, generator=g), (rows, columns // size)
    s, z = 0.01 + 0.02 * torch.rand(shape, generator=g), torch.randint(0, 256, shape, generator=g).float()
    weights = torch.randn(rows, columns, generator=g)
    read, *want = by_torch([w, s, z], weights, 4, grid, "round")
    w, s, z = (x.to(DEVICE) for x in (w, s, z))
    assert torch.equal(fake.read(w, s, z, None, None, 4, grid, "round").cpu(), read)
    got = fake.gradients(w, s, z, None, None, weights.to(DEVICE), 4, grid, "round")
    for a, b in zip(got, want, strict=False):
        assert a is not None and torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
