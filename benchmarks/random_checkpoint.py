"""A checkpoint of a Llama shape with random codes, for measuring speed and memory: written tensor by tensor, quantized from nothing.

    python benchmarks/random_checkpoint.py OUT [--shape tinyllama | --shape HIDDEN,INNER,LAYERS,HEADS,KV_HEADS,VOCABULARY]
        [--tied] [--group-size 64] [--seed 0] [--dense]

Codes are uniform and scales such that every layer keeps the size of its inputs, so activations stay finite; reads of narrow widths are those of the codes
(refits that change nothing). --dense: an ordinary folder of bfloat16 weights of that shape as transformers draws them, for other engines. There is no tokenizer.
"""

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant.checkpoint import quantization_config, write
from matquant.checkpoint.format import suffixes
from matquant.plan import Shape
from matquant.recipe import Recipe

SHAPES = {"tinyllama": "2048,5632,22,32,4,32000", "smollm2-135m": "576,1536,30,9,3,49152"}
SHARD = 2**28  # bytes: what is held at once
POSITIONS = 4096


@dataclass(frozen=True)
class Llama:
    """Sizes of a model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def modules(self) -> dict[str, Shape]:
        narrow = self.hidden // self.heads * self.kv_heads
        own = {
            "self_attn.q_proj": Shape(self.hidden, self.hidden), "self_attn.k_proj": Shape(narrow, self.hidden), "self_attn.v_proj": Shape(narrow, self.hidden),
            "self_attn.o_proj": Shape(self.hidden, self.hidden), "mlp.gate_proj": Shape(self.inner, self.hidden), "mlp.up_proj": Shape(self.inner, self.hidden),
            "mlp.down_proj": Shape(self.hidden, self.inner),
        }  # fmt: skip
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in own.items()}

    @property
    def base(self) -> dict[str, tuple[int, ...]]:
        norms = [f"model.layers.{i}.{name}.weight" for i in range(self.layers) for name in ("input_layernorm", "post_attention_layernorm")]
        tables = ["model.embed_tokens.weight"] + ([] if self.tied else ["lm_head.weight"])
        return dict.fromkeys([*norms, "model.norm.weight"], (self.hidden,)) | dict.fromkeys(tables, (self.vocabulary, self.hidden))

    def config(self) -> dict[str, Any]:
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, max_position_embeddings=POSITIONS, tie_word_embeddings=self.tied, dtype="bfloat16",
        )  # fmt: skip
        return config.to_dict() | {"architectures": ["LlamaForCausalLM"]}


@dataclass(frozen=True)
class Tensors(Mapping[str, Tensor]):
    """All tensors of the checkpoint, each made when it is asked for."""

    model: Llama
    recipe: Recipe
    seed: int

    def __getitem__(self, name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "big")
        g = torch.Generator().manual_seed(seed)
        if name in self.model.base:
            shape = self.model.base[name]
            return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else (torch.randn(shape, generator=g) * 0.02).bfloat16()
        module = next(name[:at] for at in range(len(name)) if name[:at] in self.model.modules and name[at] == ".")
        shape, suffix, grid = self.model.modules[module], name[len(module) + 1 :], self.recipe.layout.grid
        affine = (shape.out, grid.groups(shape.in_features))
        if suffix == "scale":
            spread = (2**grid.bits - 1) / 12**0.5  # of uniform codes
            return torch.full(affine, 1 / (spread * shape.in_features**0.5), dtype=getattr(torch, self.recipe.scale_dtype))
        if suffix.startswith(("scale", "zero")):
            middle = 128 if suffix != "zero" else grid.center
            return torch.full(affine, int(middle), dtype=torch.uint8)
        planes = torch.randint(0, 256, (2, shape.out, -(-shape.in_features // 8)), generator=g, dtype=torch.uint8)
        if used := shape.in_features % 8:
            planes[..., -1] &= 2**used - 1
        return planes if suffix == "weight" else planes[0]

    def __iter__(self) -> Iterator[str]:
        yield from self.model.base
        for name in self.model.modules:
            yield from (f"{name}.{suffix}" for suffix in suffixes(self.recipe.layout))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def write_random(out: Path, model: Llama, group_size: int, seed: int) -> None:
    """Raises as matquant.checkpoint.write."""
    recipe = Recipe(group_size=group_size)
    config = model.config() | {"quantization_config": quantization_config(recipe, model.modules, ["lm_head"])}
    write(out, Tensors(model, recipe, seed), config, {}, max_shard_bytes=SHARD)


def write_dense(out: Path, model: Llama, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig.from_dict(model.config())).bfloat16().save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args(arguments)
    model = Llama(*map(int, SHAPES.get(given.shape, given.shape).split(",")), tied=given.tied)
    if given.dense:
        write_dense(given.out, model, given.seed)
    else:
        write_random(given.out, model, given.group_size, given.seed)
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
