"""Second moments of a layer's inputs, added up token by token: what GPTQ's Hessians are made of."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.world import World

PANEL = 256  # columns of a product at once
RIDGE = 1e-3  # of the map from the original's inputs to a stream's, as a share of their mean power


@dataclass
class Moments:
    """A running mean of x^T y over tokens. symmetric: y is x, and only panels from the diagonal to the right are computed: half the work."""

    total: Float[Tensor, "in in"]
    symmetric: bool
    tokens: int = 0

    def add(self, x: Float[Tensor, "tokens in"], y: Float[Tensor, "tokens in"]) -> None:
        self.tokens += len(x)
        if not self.symmetric:
            self.total.addmm_(x.T, y)
            return
        for start in range(0, x.shape[1], PANEL):
            self.total[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])

    @property
    def mean(self) -> Float[Tensor, "in in"]:
        total = self.total.triu() + self.total.triu(1).T if self.symmetric else self.total
        return total / max(self.tokens, 1)


def add(moments: dict[Any, Moments], key: Any, x: Float[Tensor, "tokens in"], y: Float[Tensor, "tokens in"]) -> None:
    """Count x^T y of some tokens in."""
    if key not in moments:
        moments[key] = Moments(x.new_zeros(x.shape[1], x.shape[1]), symmetric=x is y)
    moments[key].add(x, y)


def of_all(moments: dict[Any, Moments], world: World, device: torch.device) -> dict[Any, Moments]:
    """Moments over the tokens of all processes. Some layers may have seen none of this one's."""
    if world.size == 1:
        return moments
    known: dict[Any, Moments] = {}
    for part in world.gather({key: (len(own.total), own.symmetric, own.tokens) for key, own in moments.items()}):
        for key, (size, symmetric, tokens) in part.items():
            total = known[key].total if key in known else moments[key].total if key in moments else torch.zeros(size, size, device=device)
            known[key] = Moments(total, symmetric, tokens + (known[key].tokens if key in known else 0))
    for key in sorted(known, key=str):
        world.sum(known[key].total)
    return known


def as_of_all(
    h: Float[Tensor, "in in"], cross: Float[Tensor, "in in"], part: Float[Tensor, "in in"], whole: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """(H_r, C_r) of some sequences, corrected by what the original's H says of all of them.

    Inputs of a stream are nearly a linear map of the original's, x_r = A^T x + noise. So with D = H - H(these sequences):

        A = H(these)^-1 mean x x_r^T         H_r + A^T D A            C_r + (I - A^T) D A

    as in regression estimates of surveys. H_r stays positive semidefinite, because what A explains was in it. Where H(these) has no
    Cholesky factor, both stay as they are.
    """
    ridge = RIDGE * torch.diagonal(part).mean() * torch.eye(len(part), device=part.device)
    lower, failed = torch.linalg.cholesky_ex(part + ridge)
    if failed:
        return h, cross
    a = torch.cholesky_solve(h + cross, lower)
    moved = (whole - part) @ a
    seen = a.T @ moved
    return h + (seen + seen.T) / 2, cross + moved - seen
