"""The same model with more channels, so that groups of a given size divide them: a Llama-shaped model's widths are padded with zeros.

    python benchmarks/padded.py MODEL OUT --group-size 128

SmolLM2-135M has 576 channels and 9 heads of 64; padded for groups of 128 it has 640 and 12, and computes the same: what was added makes zeros
out of zeros. A norm divides by the mean square of more channels, which its weights and its epsilon make up for. So the last group of a row
holds what was left of it and zeros, as engines whose last group may be shorter have it.
"""

import argparse
import math

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM


def padded(model: LlamaForCausalLM, size: int) -> MistralForCausalLM:
    """A model that computes what `model` does, all inputs of its linear layers multiples of `size`. The same architecture by another name: the
    one of Llama insists on channels that its heads divide."""
    old = model.config
    per_head = old.num_attention_heads // old.num_key_value_heads
    heads = up_to(old.num_key_value_heads, size // math.gcd(size, per_head * old.head_dim))
    share = old.hidden_size / up_to(old.hidden_size, size)
    kept = ("vocab_size", "num_hidden_layers", "hidden_act", "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "head_dim")
    config = MistralConfig(
        **{name: getattr(old, name) for name in (*kept, "bos_token_id", "eos_token_id", "pad_token_id")},
        hidden_size=up_to(old.hidden_size, size),
        intermediate_size=up_to(old.intermediate_size, size),
        num_key_value_heads=heads,
        num_attention_heads=heads * per_head,
        rms_norm_eps=old.rms_norm_eps * share,
        sliding_window=None,
    )
    new = MistralForCausalLM(config).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            value = own[name] * math.sqrt(share) if parameter.ndim == 1 else own[name]
            parameter.zero_()[tuple(slice(0, n) for n in value.shape)] = value
    return new


def up_to(count: int, step: int) -> int:
    """The first multiple of `step` that is not below `count`."""
    return -(-count // step) * step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a Llama-shaped model")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    if model.config.attention_bias or model.config.mlp_bias:
        parser.error(f"{options.model} has biases; only models without are padded here")
    new = padded(model, options.group_size)
    text = torch.arange(64)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        gap = (new(text).logits - model(text).logits).abs().max().item()
    new.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(f"{options.out}: {new.config.hidden_size} channels, {new.config.num_attention_heads} heads; logits differ by {gap:.2g} at most")


if __name__ == "__main__":
    main()
