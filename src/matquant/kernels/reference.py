"""The kernel that defines correct: dequantize the whole weight, then the ordinary matrix product. Slow, and runs everywhere."""

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.weight import AffineWeight


def linear(x: Float[Tensor, "*batch in"], weight: AffineWeight, bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*batch out"]:
    """x W_r^T + bias in the dtype of x. The weight is computed in float32 and rounded once to that dtype."""
    return torch.nn.functional.linear(x, weight.dense(x.dtype), bias)
