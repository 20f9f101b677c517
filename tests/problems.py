"""Layers to quantize: weights, and second moments of inputs that are strongly correlated and of very different power."""

from collections.abc import Mapping

import torch
from torch import Tensor

from matquant.activations import Inputs
from matquant.factor import Factor, factorize_all
from matquant.objective import Objective, build
from matquant.recipe import Recipe


def hessian(columns: int, seed: int, rank: int = 400) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) * 0.4 + torch.diag(torch.rand(columns, generator=g) * 2 + 0.1)
    x = torch.randn(rank, columns, generator=g) @ mix
    return x.T @ x / len(x)


def problem(out: int = 12, columns: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weights, one Hessian)."""
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.1, hessian(columns, seed)


def streams_of(recipe: Recipe) -> set[int]:
    return {recipe.stream_of(r) for r in (*recipe.targets, *recipe.bits, recipe.parent_bits)}


def same_for_all(h: Tensor, recipe: Recipe) -> Inputs:
    """Inputs that do not differ between streams."""
    return Inputs(dict.fromkeys(streams_of(recipe), h))


def one_each(columns: int, recipe: Recipe, seed: int = 0) -> Inputs:
    """Inputs of every stream on their own."""
    return Inputs({stream: hessian(columns, 100 * seed + stream) for stream in streams_of(recipe)})


def prepared(w: Tensor, inputs: Inputs, recipe: Recipe) -> tuple[Objective, Mapping[int, Factor]]:
    """(objective, factor of every stream) as the methods make them."""
    factors = factorize_all(inputs.h, recipe.damping, recipe.act_order)
    return build(w, inputs, factors, recipe), factors


def damped(h: Tensor, recipe: Recipe) -> Tensor:
    """H + damping x mean diagonal, in float64."""
    return h.double() + recipe.damping * torch.diagonal(h).double().mean() * torch.eye(len(h), dtype=torch.float64)


def slow_loss(goal: Tensor, read: Tensor, h: Tensor) -> Tensor:
    """e H e^T of every row, in float64."""
    e = (goal - read).double()
    return torch.einsum("oi,ij,oj->o", e, h.double(), e)
