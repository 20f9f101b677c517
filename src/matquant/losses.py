"""Losses over a vocabulary, a few positions at a time: the gradient is made on the way forward, while the probabilities are there.

A float32 array of positions x vocabulary is the largest thing in the training of a small model; autograd would keep several for the way
back. Here one is kept, the gradient by the logits (the idea of https://arxiv.org/abs/2410.10989).

    truth         -log q[token]                                       the token that came next
    kl            sum_v p (log p - log q) T^2                         p, q: softmax of teacher's and student's logits over T
    reverse-kl    sum_v q (log q - log p) T^2
    mse           sum_v (student - teacher)^2 / vocabulary            of the logits

T^2 keeps the gradient's size as T grows (https://arxiv.org/abs/1503.02531). All are means over positions, in nats (mse: squared logits).
"""

from collections.abc import Callable
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matquant.recipe import Divergence

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
CHUNK_ELEMENTS = 2**22  # positions x vocabulary at a time: 16 MiB an array, of which half a dozen live at once

Loss = Callable[..., Tensor]  # (logits of some positions, what else is known of them) -> the sum over them


def next_token(logits: Float[Tensor, "batch length vocab"], ids: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean cross entropy of the tokens that came next; the last position of a sequence predicts none."""
    loss = lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction="sum")  # noqa: E731
    return _mean(logits[:, :-1], loss, ids[:, 1:].to(logits.device))


def distance(
    student: Float[Tensor, "batch length vocab"], teacher: Float[Tensor, "batch length vocab"], divergence: Divergence, temperature: float
) -> Float[Tensor, ""]:
    """Mean over all positions; the teacher gets no gradient."""
    table: dict[str, Loss] = {"kl": _kl, "reverse-kl": lambda x, y: _kl(y, x), "mse": lambda x, y: (x - y).square().mean(-1).sum()}
    scaled = lambda x, y: table[divergence](x / temperature, y / temperature) * temperature**2  # noqa: E731
    return _mean(student, table["mse"] if divergence == "mse" else scaled, teacher.detach())


def _kl(q: Tensor, p: Tensor) -> Tensor:
    """sum_v p (log p - log q) of logits. p = 0 counts 0, also where both are -inf, as for tokens that a model masks out."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum()


def _mean(logits: Tensor, loss: Loss, known: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return _InChunks.apply(rows, loss, known.reshape(len(rows), *known.shape[2:])) / len(rows)


class _InChunks(torch.autograd.Function):
    """The sum of `loss` over rows, whose gradient is made chunk by chunk with the value."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Loss, known: Tensor) -> Tensor:
        total, grad = torch.zeros((), device=rows.device), torch.empty_like(rows)
        size = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            x = rows[part].detach().float().requires_grad_()
            with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
                value = loss(x, known[part].float() if known.is_floating_point() else known[part])
            (grad[part],) = torch.autograd.grad(value, x)
            total += value.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None, None
