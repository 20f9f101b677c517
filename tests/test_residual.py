"""The low planes alone, against a slow loop in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from grids import make_grid
from torch import Tensor

from matquant.codes import Grid
from matquant.factor import factorize, visiting_order
from matquant.residual import fit_residual
from matquant.weight import NestedWeight


def problem(seed: int, overlap: bool) -> tuple[Tensor, Tensor, NestedWeight, Grid]:
    """(weights, Hessian, a nested weight whose high nibbles lie up to two cells off, the grid to fit on)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 32, generator=g) @ (torch.randn(32, 32, generator=g) * 0.3 + torch.diag(torch.rand(32, generator=g) + 0.2))
    w = torch.randn(6, 32, generator=g) * 0.1
    grid = make_grid(8, 8)
    scale = w.reshape(6, 4, 8).abs().amax(-1) / 127
    q = (w.reshape(6, 4, 8) / scale[..., None] + 128).round().clamp(0, 255).reshape(6, 32)
    moved = (q / 16).floor() + torch.randint(-1, 2, q.shape, generator=g)
    codes = (moved.clamp(0, 15) * 16 + 3).to(torch.uint8)
    return w, x.T @ x / 300, NestedWeight(codes, scale, None, grid, "floor"), make_grid(8, 8, overlap=overlap)


def slow(w: Tensor, damped: Tensor, order: Tensor, weight: NestedWeight, grid: Grid) -> np.ndarray:
    """GPTQ by elimination, the code of each weight searched among the 16 of its high nibble."""
    inverse = np.linalg.inv(damped.double().numpy()[np.ix_(order, order)])
    running, codes = w.double().numpy().copy(), weight.codes.numpy().copy()
    for step, column in enumerate(order.tolist()):
        for row in range(len(running)):
            choices = np.arange(16) + (int(codes[row, column]) & 0xF0)
            candidates = NestedWeight(
                torch.tensor(choices, dtype=torch.uint8)[:, None].repeat(1, 32), weight.scale[row].repeat(16, 1), None, grid, "floor"
            )
            reads = candidates.read(8).dense().double().numpy()[:, column]
            best = int(np.argmin(np.abs(reads - running[row, column])))
            codes[row, column] = choices[best]
            error = (running[row, column] - reads[best]) / inverse[step, step]
            running[row, order.numpy()[step:]] -= error * inverse[step, step:]
        rest = inverse[step + 1 :, step + 1 :] - np.outer(inverse[step + 1 :, step], inverse[step, step + 1 :]) / inverse[step, step]
        inverse[step + 1 :, step + 1 :] = rest
    return codes


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_reference(seed: int, overlap: bool) -> None:
    w, h, weight, grid = problem(seed, overlap)
    factor = factorize(h, 0.01, visiting_order([h], act_order=True))
    fitted = fit_residual(weight, w, factor, grid, sweeps=0)
    assert (fitted.codes.numpy() != slow(w, factor.damped, factor.order, weight, grid)).sum() <= 1  # float32 against float64 near a tie
    assert fitted.grid == grid


@pytest.mark.parametrize("overlap", [False, True])
def test_high_planes_stay_and_sweeps_never_raise_the_loss(overlap: bool) -> None:
    w, h, weight, grid = problem(2, overlap)
    factor = factorize(h, 0.01, visiting_order([h], act_order=True))
    losses = []
    for sweeps in range(4):
        fitted = fit_residual(weight, w, factor, grid, sweeps)
        assert torch.equal(fitted.codes >> 4, weight.codes >> 4)
        for bits in (4, 3, 2):
            assert torch.equal(fitted.read(bits).dense(), weight.read(bits).dense())
        error = w - fitted.read(8).dense()
        losses.append(((error @ factor.damped) * error).sum().item())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[-1] < 0.99 * losses[0]


def test_overlap_wins_back_what_cells_do_not_reach() -> None:
    losses = {}
    for overlap in (False, True):
        w, h, weight, grid = problem(3, overlap)
        factor = factorize(h, 0.01, visiting_order([h], act_order=True))
        error = w - fit_residual(weight, w, factor, grid, sweeps=2).read(8).dense()
        losses[overlap] = ((error @ h) * error).sum().item()
    assert losses[True] < losses[False] / 2
