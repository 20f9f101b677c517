"""Losses over a vocabulary, a few positions at a time: the gradient is made on the way forward, while the probabilities are there.

A float32 array of positions x vocabulary is the largest thing in the training of a small model; autograd would keep several for the way
back. Here one is kept, the gradient by the logits (the idea of https://arxiv.org/abs/2410.10989).

                                                    loss                                    gradient by the logits x
    truth         the token that came next          -log q[token]                           q - onehot(token)
    kl            p: teacher, q: student, over T    sum_v p (log p - log q) T^2             (q - p) T
    reverse-kl                                      sum_v q (log q - log p) T^2             q (log q - log p - its mean under q) T
    mse           of the logits                     sum_v (x - teacher)^2 / vocabulary      2 (x - teacher) / vocabulary

T^2 keeps the gradient's size as T grows (https://arxiv.org/abs/1503.02531). All are means over positions, in nats (mse: squared logits).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matquant.recipe import Divergence

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
CHUNK_ELEMENTS = 2**22  # positions x vocabulary at a time: 16 MiB an array, of which half a dozen live at once
CACHED_ELEMENTS = 2**18  # the same for a thread of a CPU, whose caches hold these

Loss = Callable[[Tensor, Any], tuple[Tensor, Tensor]]  # (float32 logits of some positions, what is known of them) -> (sum over them, gradient)


def next_token(logits: Float[Tensor, "batch length vocab"], ids: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean cross entropy of the tokens that came next; the last position of a sequence predicts none."""
    return _mean(logits, _truth, ids[:, 1:].to(logits.device))


def distance(
    student: Float[Tensor, "batch length vocab"], teacher: Float[Tensor, "batch length vocab"], divergence: Divergence, temperature: float
) -> Float[Tensor, ""]:
    """Mean over all positions; the teacher gets no gradient."""
    table: dict[Divergence, Loss] = {"kl": partial(_kl, t=temperature), "reverse-kl": partial(_reverse_kl, t=temperature), "mse": _mse}
    return _mean(student, table[divergence], teacher.detach())


# --- sums over positions, with gradients ----------------------------------------------------------------------------


def _truth(x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    log_q, token = x.log_softmax(-1), token[:, None]
    loss = -log_q.gather(-1, token).sum()
    return loss, log_q.exp_().scatter_add_(-1, token, torch.full_like(log_q[:, :1], -1.0))


def _kl(x: Tensor, teacher: Tensor, t: float) -> tuple[Tensor, Tensor]:
    log_q, log_p = (x / t).log_softmax(-1), (teacher.float() / t).log_softmax(-1)
    p = log_p.exp()
    return _divergence(p, log_p, log_q).sum() * t**2, log_q.exp_().sub_(p).mul_(t)


def _reverse_kl(x: Tensor, teacher: Tensor, t: float) -> tuple[Tensor, Tensor]:
    log_q, log_p = (x / t).log_softmax(-1), (teacher.float() / t).log_softmax(-1)
    q = log_q.exp()
    parts = _divergence(q, log_q, log_p)
    losses = parts.sum(-1, keepdim=True)
    return losses.sum() * t**2, parts.sub_(q.mul_(losses)).mul_(t)


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q). p = 0 counts 0, also where both are -inf, as for tokens that a model masks out."""
    return torch.where(log_p == -torch.inf, 0.0, p * (log_p - log_q))


def _mse(x: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    apart, vocabulary = x - teacher.float(), x.shape[-1]
    return apart.square().sum() / vocabulary, apart.mul_(2 / vocabulary)


# --- in chunks ------------------------------------------------------------------------------------------------------


def _mean(logits: Tensor, loss: Loss, known: Tensor) -> Tensor:
    """known: of the first positions of every sequence, those that count."""
    return _InChunks.apply(logits, loss, known) / (known.shape[0] * known.shape[1])


class _InChunks(torch.autograd.Function):
    """The sum of `loss` over the positions known, whose gradient is made chunk by chunk with the value."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Loss, known: Tensor) -> Tensor:
        total, grad, end = torch.zeros((), device=logits.device), torch.empty_like(logits), known.shape[1]
        elements = CACHED_ELEMENTS * torch.get_num_threads() if logits.device.type == "cpu" else CHUNK_ELEMENTS
        size = max(1, elements // logits.shape[-1])
        for sequence, of_sequence, to in zip(logits, known, grad, strict=True):
            for start in range(0, end, size):
                part = slice(start, min(start + size, end))
                with torch.autocast(logits.device.type, enabled=False):
                    value, to[part] = loss(sequence[part].float(), of_sequence[part])
                total += value
            to[end:] = 0
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None, None
