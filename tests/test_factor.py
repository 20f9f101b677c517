"""Factors of damped Hessians against numpy's inverse and Cholesky, and Hessians that give trouble."""

import numpy as np
import pytest
import torch
from problems import hessian
from torch import Tensor

from matquant.factor import factorize, visiting_order

NATURAL = torch.arange(24)


def chol_of_inverse(h: Tensor, damping: float, order: Tensor) -> np.ndarray:
    """U = chol(H^-1), upper, of the damped H in visiting order."""
    dense = h.double().numpy() + damping * np.mean(np.diag(h.double().numpy())) * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(dense[np.ix_(order.numpy(), order.numpy())])).T


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_upper_is_the_cholesky_factor_of_the_inverse(shuffled: bool, damping: float) -> None:
    h = hessian(24, 1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)) if shuffled else NATURAL
    factor = factorize(h, damping, order)
    torch.testing.assert_close(factor.upper.double(), torch.tensor(chol_of_inverse(h, damping, order)), rtol=1e-4, atol=1e-5)
    assert torch.equal(factor.upper, factor.upper.triu()) and torch.equal(factor.order, order) and factor.notes == () and factor.sound
    torch.testing.assert_close(factor.damped, h + damping * torch.diagonal(h).mean() * torch.eye(24))


def test_solve_and_cost_are_in_the_weights_own_order() -> None:
    h, order = hessian(24, 2), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    factor = factorize(h, 0.05, order)
    right = torch.randn(24, 5)
    expected = np.linalg.solve(h.double().numpy() + 0.05 * torch.diagonal(h).double().mean().item() * np.eye(24), right.double().numpy())
    torch.testing.assert_close(factor.solve(right).double(), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    upper = chol_of_inverse(h, 0.05, order)
    for step, column in enumerate(order.tolist()):
        assert factor.cost_in_place()[column].item() == pytest.approx(1 / upper[step, step] ** 2, rel=1e-4)


def test_inputs_are_visited_by_descending_power_each_hessian_relative_to_its_mean() -> None:
    weak, strong = torch.diag(torch.tensor([1.0, 2.0, 9.0])), torch.diag(torch.tensor([5000.0, 6000.0, 1000.0]))
    assert visiting_order([weak, strong], act_order=True).tolist() == [2, 1, 0]  # 0.25 + 1.25, 0.5 + 1.5, 2.25 + 0.25
    assert visiting_order([strong], act_order=True).tolist() == [1, 0, 2]
    assert visiting_order([weak, strong], act_order=False).tolist() == [0, 1, 2]
    assert visiting_order([torch.eye(3)], act_order=True).tolist() == [0, 1, 2]  # ties stay in order
    assert visiting_order([weak, strong * float("nan")], act_order=True).tolist() == [0, 1, 2]
    assert visiting_order([torch.zeros(3, 3)], act_order=True).tolist() == [0, 1, 2]


# --- Hessians that give trouble ---------------------------------------------------------------------------------------


def test_dead_inputs_get_and_give_no_feedback() -> None:
    h = hessian(24, 4)
    h[5, :] = h[:, 5] = 0
    factor = factorize(h, 0.01, NATURAL)
    assert factor.notes == ("1 of 24 inputs are always 0: their weights are rounded to nearest",) and factor.sound
    assert factor.upper[5].count_nonzero() == factor.upper[:, 5].count_nonzero() == 1
    rest = [i for i in range(24) if i != 5]
    alive = factorize(h[rest][:, rest], 0.01, NATURAL[:23])
    torch.testing.assert_close(factor.upper[rest][:, rest], alive.upper, rtol=1e-4, atol=1e-5)


def test_no_input_at_all() -> None:
    factor = factorize(torch.zeros(4, 4), 0.01, NATURAL[:4])
    assert factor.notes == ("4 of 4 inputs are always 0: their weights are rounded to nearest",)
    assert torch.equal(factor.upper, torch.diag(torch.diagonal(factor.upper))) and factor.upper.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite(bad: float) -> None:
    h = hessian(24, 5)
    h[3, 4] = bad
    factor = factorize(h, 0.01, NATURAL)
    assert factor.notes == ("the Hessian is not finite: rounded to nearest",) and not factor.sound
    assert torch.equal(factor.upper, torch.eye(24)) and torch.equal(factor.damped, torch.eye(24))


def test_damping_is_raised_until_there_is_a_factor() -> None:
    h = hessian(24, 6)
    shifted = h - torch.eye(24) * (torch.linalg.eigvalsh(h)[0] + 0.05 * torch.diagonal(h).mean())  # smallest eigenvalue: -5 % of the mean
    factor = factorize(shifted, 0.01, NATURAL)
    assert factor.notes == ("damping raised to 0.1: the Hessian had no Cholesky factor below",) and factor.sound
    torch.testing.assert_close(factor.upper, torch.tensor(chol_of_inverse(shifted, 0.1, NATURAL)).float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(factor.damped, shifted + 0.1 * torch.diagonal(shifted).mean() * torch.eye(24))


def test_a_hopeless_hessian() -> None:
    h = torch.diag(torch.tensor([1.0] * 8)) - 50 * torch.ones(8, 8).fill_diagonal_(0)
    factor = factorize(h, 0.01, NATURAL[:8])
    assert torch.equal(factor.upper, torch.eye(8)) and not factor.sound
    assert factor.notes == ("no Cholesky factor up to damping 1: rounded to nearest",)
