"""x @ W_r^T on a GPU as torch operators, so that torch.compile and CUDA graphs see one node: matquant::tiled_linear and matquant::tiled_dense.

    y = linear(x, weight, bits)     # weight: layout.TiledWeight; the width is an argument of every product

The operators take the arrays of the width alone; what lies below it is never handed to them. `available` says whether they can run: Triton's
interpreter (TRITON_INTERPRET=1, set before Triton is imported) runs them on a CPU, for tests.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.codes import Grid
from matquant.errors import InputError, ResourceError
from matquant.kernels.gpu.layout import TiledWeight, blocking, reading
from matquant.kernels.gpu.table import Config, choose

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def interpreted() -> bool:
    """Whether Triton runs in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device | str) -> bool:
    """Whether the kernels run on a device: Triton is installed, and it is a GPU, or Triton is interpreted."""
    return find_spec("triton") is not None and (torch.device(device).type == "cuda" or interpreted())


def check(device: torch.device | str) -> None:
    """Raise ResourceError unless `available`."""
    if not available(device):
        raise ResourceError(f"GPU kernels need a CUDA or ROCm device and Triton (pip install 'matquant[gpu]'), and this is {device}")


@torch.library.custom_op("matquant::tiled_linear", mutates_args=())
def tiled_linear(
    x: Tensor, planes: Sequence[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, bias: Tensor | None, bits: int, parent_bits: int,
    overlap: bool,
) -> Tensor:  # fmt: skip
    """[tokens, in] -> [tokens, out]."""
    out, in_features = len(scale), x.shape[1]
    config = choose(x.device, x.dtype, bits, len(x), out, in_features, in_features // scale.shape[1])
    return run(x, planes, scale, fit, zero, bias, bits, Grid(parent_bits, -1, False, overlap), config)


@tiled_linear.register_fake
def _(
    x: Tensor, planes: Sequence[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, bias: Tensor | None, bits: int, parent_bits: int,
    overlap: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], scale.shape[0])


def run(
    x: Tensor, planes: Sequence[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, bias: Tensor | None, bits: int, grid: Grid,
    config: Config,
) -> Tensor:  # fmt: skip
    """The product by a given configuration."""
    from matquant.kernels.gpu import launch

    if not len(x):
        return x.new_empty(0, len(scale))
    found = blocking(x.shape[1], x.shape[1] // scale.shape[1])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return launch.product(x.contiguous(), list(planes), scale, fit, zero, bias, reading(bits, grid, fit is not None), found, config)


@torch.library.custom_op("matquant::tiled_dense", mutates_args=())
def tiled_dense(
    planes: Sequence[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, in_features: int, bits: int, parent_bits: int, overlap: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight at a width, [out, in]."""
    from matquant.kernels.gpu import launch

    w = torch.empty(len(scale), in_features, dtype=dtype, device=scale.device)
    of = reading(bits, Grid(parent_bits, -1, False, overlap), fit is not None)
    with torch.cuda.device_of(w):
        launch.dense(w, 0, list(planes), scale, fit, zero, of, blocking(in_features, in_features // scale.shape[1]))
    return w


@tiled_dense.register_fake
def _(
    planes: Sequence[Tensor], scale: Tensor, fit: Tensor | None, zero: Tensor | None, in_features: int, bits: int, parent_bits: int, overlap: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return scale.new_empty(scale.shape[0], in_features, dtype=dtype)


def linear(
    x: Float[Tensor, "*batch in"], weight: TiledWeight, bits: int, bias: Float[Tensor, " out"] | None = None, config: Config | None = None
) -> Float[Tensor, "*batch out"]:
    """x W_r^T + bias in the dtype of x. config: in place of the table's.

    Raises InputError for a dtype that is no float of 16 or 32 bits, MissingPlanesError for planes that are evicted or were never here,
    RecipeError for a width that the grid lacks.
    """
    if x.dtype not in DTYPES:
        raise InputError(f"GPU kernels take float16, bfloat16 or float32, not {x.dtype}")
    rows = x.reshape(-1, x.shape[-1])
    fit, zero = weight.fit(bits)
    planes, grid = weight.read(bits), weight.grid
    if config is None:
        y = tiled_linear(rows, planes, weight.scale, fit, zero, bias, bits, grid.bits, grid.overlap)
    else:
        y = run(rows, planes, weight.scale, fit, zero, bias, bits, grid, config)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def dense(weight: TiledWeight, bits: int, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The weight at `bits`. Raises as `linear`."""
    fit, zero = weight.fit(bits)
    grid = weight.grid
    return tiled_dense(weight.read(bits), weight.scale, fit, zero, weight.shape[1], bits, grid.bits, grid.overlap, dtype)
