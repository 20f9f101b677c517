"""MinMax: every weight takes its nearest code. The base algorithm of MatQuant (https://arxiv.org/abs/2502.06786, section 2.1).

The grid spans each group's largest weight, or, with `clip_search`, the range that costs least over the targets. H enters only
through its diagonal, in that search.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.activations import Inputs
from matquant.clip import search_grid
from matquant.codes import fit_grid, nearest_code
from matquant.factor import factorize_all
from matquant.methods import Chosen
from matquant.objective import build
from matquant.recipe import Recipe
from matquant.weight import NestedWeight


def quantize(w: Float[Tensor, "out in"], inputs: Inputs, recipe: Recipe) -> Chosen:
    """Round `w` (float32) to the nearest codes of `recipe.grid`."""
    grid, dtype = recipe.grid, getattr(torch, recipe.scale_dtype)
    wg = w.reshape(w.shape[0], grid.groups(w.shape[1]), -1)
    if recipe.clip_search:
        objective = build(w, inputs, factorize_all(inputs.h, recipe.damping, act_order=False), recipe)
        scale, zero = search_grid(w, *objective.by_target(inputs, recipe), recipe)
    else:
        scale, zero = fit_grid(wg, grid, dtype)
    t = wg / scale[..., None] + (grid.center if zero is None else zero[..., None])
    codes = nearest_code(t, grid).reshape(w.shape)
    return Chosen(NestedWeight(codes, scale.to(dtype), None if zero is None else zero.to(torch.uint8), grid, recipe.slicing))
