"""A real GGUF file, written here with gguf-py: quantized from it, read back, and compared with what transformers makes of it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_byte_tokenizer
from safetensors.torch import load_file

import matquant
from matquant import models, pipeline
from matquant.recipe import Recipe

gguf = pytest.importorskip("gguf", reason="needs gguf-py (pip install 'matquant[gguf]')")
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.gguf: the tiny Llama, matrices as Q8_0, the rest as float32."""
    source, out = tiny("llama"), tmp_path_factory.mktemp("gguf")
    config = json.loads((source / "config.json").read_text())
    save_byte_tokenizer(out)
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    for file in out.iterdir():
        file.unlink()  # the GGUF file carries its own
    writer = gguf.GGUFWriter(out / "tiny.gguf", "llama")
    writer.add_block_count(2), writer.add_context_length(128), writer.add_embedding_length(64), writer.add_feed_forward_length(96)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(config["rms_norm_eps"]), writer.add_rope_dimension_count(16)
    writer.add_vocab_size(258), writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("default")
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens = [*tokens[:255], "ab", "<s>", "</s>"]  # gguf-py writes no empty list, so there is one merge
    writer.add_token_list(tokens), writer.add_token_types([1] * 256 + [3, 3]), writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256), writer.add_eos_token_id(257)
    for name, tensor in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        parts = stem.split(".")
        key = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}" if "layers" in parts else NAMES[stem]
        if key.endswith(("attn_q", "attn_k")):  # llama.cpp keeps the two halves of a rotary pair side by side
            heads = 4 if key.endswith("attn_q") else 2
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if tensor.ndim == 2:
            writer.add_tensor(
                f"{key}.weight", gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(f"{key}.weight", tensor.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return out


@pytest.mark.parametrize(("rotate", "head_bits"), [(False, 0), (True, 0), (False, 8)])
def test_a_gguf_model_is_quantized_and_its_other_tensors_stored_in_16_bits(folder: Path, rotate: bool, head_bits: int, tmp_path: Path) -> None:
    recipe = Recipe(group_size=32, num_samples=4, seq_len=64, eval_samples=2, rotate=rotate, head_bits=head_bits)
    report = pipeline.quantize(str(folder), tmp_path / "out", recipe, pipeline.RunOptions(gguf_file="tiny.gguf"))
    assert [row.label for row in report.rows] == ["16", "8", "6", "4", "3", "2"]
    base = load_file(next((tmp_path / "out").glob("model-base*")))
    assert base["model.norm.weight"].dtype == torch.float16
    assert base["model.embed_tokens.weight"].dtype == (torch.uint8 if head_bits else torch.float16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    original = models.load_dense(str(folder), folder, "tiny.gguf", dtype=torch.float32)
    nested = matquant.from_pretrained(tmp_path / "out", bits=8, dtype=torch.float32)
    ids = torch.arange(0, 256, 8)[None]
    with torch.inference_mode():
        difference = (original(ids).logits - nested(ids).logits).abs().max()
    assert difference < 0.05 * original(ids).logits.abs().max()
