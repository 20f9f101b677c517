"""benchmarks/padded.py: a model with more channels computes the same."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/padded.py")


@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(9, 3, True), (4, 4, False), (6, 2, False)])
def test_a_padded_model_computes_the_same(heads: int, kv_heads: int, tied: bool, script: ModuleType) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=heads * 8, intermediate_size=88, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=96,
        max_position_embeddings=64, tie_word_embeddings=tied, rms_norm_eps=1e-3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    new = script.padded(model, 32)
    linears = [module for name, module in new.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    assert len(linears) == 14 and all(module.in_features % 32 == 0 for module in linears)
    text = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(new(text).logits, model(text).logits, atol=1e-5)
