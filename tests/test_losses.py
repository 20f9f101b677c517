"""Losses in chunks against the same in one piece, with autograd's gradients."""

import pytest
import torch
from torch import Tensor

from matquant import losses
from matquant.losses import DIVERGENCES, Divergence, distance, next_token


def logits(seed: int) -> Tensor:
    return torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(params=[1, 3 * 11, 2**22], ids=["a row at a time", "3 rows at a time", "at once"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CACHED_ELEMENTS", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def slow_kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack([(a * (a / b).log()).sum() for a, b in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True)]).mean()


def slow(student: Tensor, teacher: Tensor, divergence: Divergence, t: float) -> Tensor:
    q, p = (student / t).softmax(-1), (teacher / t).softmax(-1)
    return {"kl": t**2 * slow_kl(p, q), "reverse-kl": t**2 * slow_kl(q, p), "mse": (student - teacher).square().mean()}[divergence]


def test_next_token() -> None:
    x, ids = logits(0).requires_grad_(), torch.tensor([[1, 2, 3, 4, 5], [0, 10, 0, 10, 0]])
    want = torch.stack([-x[b, i].log_softmax(-1)[ids[b, i + 1]] for b in range(2) for i in range(4)]).mean()
    got = next_token(x, ids)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(got * 7, x)[0], torch.autograd.grad(want * 7, x)[0], atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distance(divergence: Divergence, temperature: float) -> None:
    x, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    want, got = slow(x, teacher.detach(), divergence, temperature), distance(x, teacher, divergence, temperature)
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    assert torch.allclose(torch.autograd.grad(got * 7, x, retain_graph=True)[0], torch.autograd.grad(want * 7, x)[0], atol=1e-5)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(got, teacher)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_to_learn_from_oneself(divergence: Divergence) -> None:
    x = logits(0).requires_grad_()
    loss = distance(x, x, divergence, 1.0)
    assert loss.item() == pytest.approx(0, abs=1e-6) and torch.autograd.grad(loss, x)[0].abs().max() < 1e-6


def test_masked_tokens_count_nothing() -> None:
    x, y = logits(0), logits(1)
    x[..., 4] = y[..., 4] = -torch.inf
    x.requires_grad_()
    kept = [i for i in range(11) if i != 4]
    loss = distance(x, y, "kl", 1.0)
    assert loss.item() == pytest.approx(distance(x[..., kept], y[..., kept], "kl", 1.0).item(), rel=1e-5)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_half_precision_logits_are_summed_in_float32() -> None:
    x, y = logits(0).bfloat16(), logits(1).bfloat16()
    x.requires_grad_()
    loss = distance(x, y, "kl", 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(x.detach().float(), y.float(), "kl", 1.0).item(), rel=1e-4)
    assert torch.autograd.grad(loss, x)[0].dtype == torch.bfloat16
