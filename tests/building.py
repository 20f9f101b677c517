"""Checkpoints by hand: every linear layer of the decoder blocks rounded to nearest, no calibration and no pipeline."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from matquant import checkpoint
from matquant.codes import fit_grid, nearest_code, slice_codes, snap_refit
from matquant.plan import Layout, Shape
from matquant.recipe import Recipe
from matquant.weight import NestedWeight, Refit

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def refit(grouped: Tensor, p: Tensor, parent: Tensor, bits: int, layout: Layout) -> Refit:
    """Least squares of w ~ scale p + offset for every group ([out, groups, size] both), in the two bytes that are stored."""
    mean_p, mean_w = p.mean(-1, keepdim=True), grouped.mean(-1, keepdim=True)
    spread = ((p - mean_p) ** 2).sum(-1)
    scale = ((p - mean_p) * (grouped - mean_w)).sum(-1) / spread.clamp(min=1e-12)
    offset = mean_w[..., 0] - scale * mean_p[..., 0]
    return Refit(*snap_refit(scale, offset, parent, bits, layout.grid, layout.slicing))


def round_to_nearest(weight: Tensor, layout: Layout) -> NestedWeight:
    """A NestedWeight of a float weight [out, in]."""
    dtype = getattr(torch, layout.scale_dtype)
    out, columns = weight.shape
    grouped = weight.float().reshape(out, layout.grid.groups(columns), -1)
    scale, zero = fit_grid(grouped, layout.grid, dtype)
    z = torch.full_like(scale, layout.grid.center) if zero is None else zero
    codes = nearest_code(grouped / scale[..., None] + z[..., None], layout.grid).reshape(out, columns)
    refits = {}
    for r in layout.refit_widths:
        p = slice_codes(codes, r, layout.grid, layout.slicing).reshape(grouped.shape).float()
        refits[r] = refit(grouped, p, scale, r, layout)
    zeros = None if zero is None else zero.to(torch.uint8)
    return NestedWeight(codes, scale.to(dtype), zeros, layout.grid, layout.slicing, refits, layout.grid.bits)


def quantizable(folder: Path) -> dict[str, bool]:
    """Name of every linear layer inside a decoder block -> whether it stores its weight [in, out] (GPT-2's Conv1D)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    return {name: isinstance(module, Conv1D) for name, module in found.items() if re.search(r"\.\d+\.", name)}


def build_checkpoint(model_folder: Path, out: Path, recipe: Recipe, also: tuple[str, ...] = ()) -> dict[str, NestedWeight]:
    """Write a checkpoint of the model in `model_folder` (one safetensors file) to `out`; `also` names further linear layers to quantize."""
    base = load_file(model_folder / "model.safetensors")
    weights, tensors = {}, {}
    for name, transposed in {**quantizable(model_folder), **dict.fromkeys(also, False)}.items():
        weight = base.pop(f"{name}.weight")
        weights[name] = round_to_nearest(weight.T if transposed else weight, recipe.layout)
        tensors |= checkpoint.module_tensors(name, weights[name])
    shapes = {name: Shape(*weight.codes.shape) for name, weight in weights.items()}
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = checkpoint.quantization_config(recipe, shapes, ["lm_head"])
    files = {name: (model_folder / name).read_bytes() for name in TOKENIZER if (model_folder / name).is_file()}
    checkpoint.write(out, base | tensors, config, files)
    return weights
