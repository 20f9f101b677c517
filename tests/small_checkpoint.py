"""A checkpoint small enough to damage in hundreds of ways: two modules of odd shapes, two base tensors, about 9 KB."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant.checkpoint import Checkpoint, module_tensors, quantization_config, write
from matquant.plan import BitPlan, Shape
from matquant.recipe import Recipe
from matquant.weight import NestedWeight, Refit

SHAPES = {"model.layers.0.mlp.down_proj": Shape(5, 24), "model.layers.0.self_attn.q_proj": Shape(6, 12)}
RECIPE = Recipe(group_size=4, symmetric=True)
FILES = {"README.md": b"# small\n", "tokenizer.json": b"{}\n"}


def nested(shape: Shape, recipe: Recipe, seed: int) -> NestedWeight:
    """Random codes, scales, zeros and refits as the recipe stores them."""
    chance = torch.Generator().manual_seed(seed)
    layout, dtype = recipe.layout, getattr(torch, recipe.scale_dtype)
    grid = layout.grid
    affine = (shape.out, grid.groups(shape.in_features))

    def bytes_from(low: int, high: int = 255) -> Tensor:
        return torch.randint(low, high + 1, affine, generator=chance, dtype=torch.uint8)

    return NestedWeight(
        codes=torch.randint(0, grid.max_code + 1, (shape.out, shape.in_features), generator=chance, dtype=torch.uint8),
        scale=(torch.rand(affine, generator=chance) + 0.01).to(dtype),
        zero=None if grid.symmetric else bytes_from(0, grid.max_code),
        grid=grid,
        slicing=layout.slicing,
        refits={r: Refit(bytes_from(1), bytes_from(0)) for r in layout.refit_widths},
        planes=grid.bits,
    )


def base_tensors() -> dict[str, Tensor]:
    return {"model.embed_tokens.weight": torch.randn(7, 3, generator=torch.Generator().manual_seed(9)), "model.norm.weight": torch.ones(3)}


def content(recipe: Recipe = RECIPE, shapes: Mapping[str, Shape] = SHAPES) -> tuple[dict[str, NestedWeight], dict[str, Tensor], dict[str, Any]]:
    """(weights, all tensors, config.json)."""
    weights = {name: nested(shape, recipe, seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors = base_tensors()
    for name, weight in weights.items():
        tensors |= module_tensors(name, weight)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization_config(recipe, shapes, ["lm_head"])}
    return weights, tensors, config


def save(folder: Path, recipe: Recipe = RECIPE, max_shard_bytes: int = 2**31) -> dict[str, NestedWeight]:
    weights, tensors, config = content(recipe)
    plan = BitPlan(min(recipe.bits), {next(iter(SHAPES)): max(recipe.bits)})
    write(folder, tensors, config, FILES | {"plans/mixed.json": plan.to_json().encode()}, max_shard_bytes)
    return weights


def same(a: NestedWeight, b: NestedWeight, bits: int) -> bool:
    x, y = a.read(bits), b.read(bits)
    return torch.equal(x.codes, y.codes) and torch.equal(x.scale, y.scale) and torch.equal(x.offset, y.offset)


def reads_right(checkpoint: Checkpoint, weights: Mapping[str, NestedWeight]) -> bool:
    """Read everything that is here and compare it, at every width, with what was written; errors are the caller's."""
    base, found = base_tensors(), {name: checkpoint.read(name) for name in checkpoint.modules}
    return all(torch.equal(tensor, base[name]) for name, tensor in checkpoint.base.items()) and all(
        same(weight, weights[name], bits) for name, weight in found.items() for bits in checkpoint.widths
    )


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def reseal(folder: Path) -> None:
    """Write MANIFEST.json anew, by the words of docs/FORMAT.md alone: whoever damages a file on purpose can do that too."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "MANIFEST.json":
            raw = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps({"digest": digest, "files": files, "version": 1}, indent=1, sort_keys=True) + "\n")
