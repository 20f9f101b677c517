"""The same Llama shapes as random_checkpoint.py as a GGUF file of random float16 weights, for llama.cpp's llama-quantize and llama-bench.

    python benchmarks/random_gguf.py OUT.gguf [--shape tinyllama | --shape HIDDEN,INNER,LAYERS,HEADS,KV_HEADS,VOCABULARY] [--tied] [--seed 0]

There is no tokenizer; only speed can be measured.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
from random_checkpoint import POSITIONS, SHAPES, Llama

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_random(out: Path, model: Llama, seed: int) -> None:
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)  # tensors go to disk one by one
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_rope_dimension_count(model.hidden // model.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def weight(name: str, out_features: int, in_features: int) -> None:
        values = draw.standard_normal((out_features, in_features), dtype=np.float32) / np.float32(in_features**0.5)
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    weight("token_embd", model.vocabulary, model.hidden)
    writer.add_tensor("output_norm.weight", np.ones(model.hidden, np.float32))
    if not model.tied:
        weight("output", model.vocabulary, model.hidden)
    for module, shape in model.modules.items():
        _, _, index, name = module.split(".", 3)
        weight(f"blk.{index}.{NAMES[name]}", shape.out, shape.in_features)
    for index in range(model.layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{norm}.weight", np.ones(model.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    model = Llama(*map(int, SHAPES.get(given.shape, given.shape).split(",")), tied=given.tied)
    write_random(given.out, model, given.seed)
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
