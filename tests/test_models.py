"""Opening any causal LM: what is found in it, what is refused, and that blocks come and go as copies."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from matquant import models
from matquant.errors import InputError, ResourceError
from matquant.plan import Shape
from matquant.recipe import Recipe

CPU, F32 = torch.device("cpu"), torch.float32
Tiny = Callable[[str], Path]
Edited = Callable[..., Path]
EXPERTS = [f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_open_source(name: str, tiny: Tiny) -> None:
    source = models.open_source(str(tiny(name)))
    dense = models.load_dense("it", tiny(name), None)
    assert type(source.model) is type(dense)
    own = models.own_tensors(source.model)
    assert own.keys() == models.own_tensors(dense).keys()
    if name == "mixtral":  # its experts are stored one by one and fused when loaded
        assert source.note.startswith("loaded whole: the files hold model.layers.0.mlp.")
    else:
        assert source.note == "" and all(tensor.is_meta for tensor in source.model.parameters())
    for tensor_name, tensor in models.own_tensors(dense).items():
        assert torch.equal(source.tensors[tensor_name], tensor) and own[tensor_name].dtype == tensor.dtype
    for buffer_name, buffer in dense.named_buffers():
        assert torch.equal(source.model.get_buffer(buffer_name), buffer)
    assert not source.model.training and not dense.training
    assert len(source.tokenizer()("ab").input_ids) == 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_buffers_are_as_precise_as_in_a_float32_model(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Gemma multiplies embeddings by sqrt(hidden size), held in a buffer: 8.4853 in float32, 8.5 in bfloat16."""
    import transformers

    config_class, arguments = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**arguments | {"hidden_size": 72})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source, dense = models.open_source(str(tmp_path)), models.load_dense("it", tmp_path, None, dtype=F32)
    for buffer_name, buffer in dense.named_buffers():
        assert torch.equal(source.model.get_buffer(buffer_name), buffer), buffer_name
    assert source.model.config.dtype == torch.bfloat16 and {p.dtype for p in source.model.parameters()} == {torch.bfloat16}


def test_sharded_model_and_stray_files(tiny: Tiny, tmp_path: Path) -> None:
    """The index tells which files count; files that it does not list (other formats of the same model) do not."""
    model = models.load_dense("it", tiny("llama"), None)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "consolidated.safetensors")
    source = models.open_source(str(tmp_path))
    assert source.note == "" and torch.equal(source.tensors["model.norm.weight"], model.model.norm.weight)
    assert len(source.tensors) == len(list(source.tensors)) == len(models.own_tensors(model))

    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for bad, words in [
        ("{", "is not an index of weight files"),
        ('{"weight_map": 3}', "is not an index of weight files"),
        (json.dumps(good | {"weight_map": {"x": "gone.safetensors"}}), r"lists gone.safetensors, which is not in the folder"),
        (json.dumps(good | {"weight_map": {"x": "../x.safetensors"}}), r"lists x.safetensors, which is not in the folder"),
        (json.dumps(good | {"weight_map": {"x": "/etc/passwd"}}), r"lists passwd, which is not in the folder"),
    ]:
        index.write_text(bad)
        with pytest.raises(InputError, match=words):
            models.open_source(str(tmp_path))


def test_fingerprint_is_of_every_weight(tiny: Tiny, edited: Edited) -> None:
    one = models.fingerprint(models.open_source(str(tiny("llama"))))
    assert one == models.fingerprint(models.open_source(str(tiny("llama"))))
    other = edited("llama", change=lambda tensors: tensors["lm_head.weight"][3].mul_(1.5))
    assert models.fingerprint(models.open_source(str(other))) != one


# --- refused ----------------------------------------------------------------------------------------------------------


def test_no_model(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"no model 'nobody/nothing-here': no such folder here, and the hub gave none"):
        models.open_source("nobody/nothing-here")
    with pytest.raises(InputError, match=r"no model './nowhere/at/all'"):
        models.open_source("./nowhere/at/all")
    file = tiny("llama") / "model.safetensors"
    with pytest.raises(InputError, match=r"model.safetensors is a file; give the folder that holds it"):
        models.open_source(str(file))
    with pytest.raises(InputError, match=r"has no config.json that transformers understands"):
        models.open_source(str(tmp_path))


@pytest.mark.parametrize(
    "config, words",
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "is T5ForConditionalGeneration, not a causal LM; give a decoder-only",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is BertForMaskedLM, not a causal LM"),
        ({"model_type": "bert", "architectures": None}, "lacks the tensor bert"),
        ({"model_type": "vit", "architectures": None}, "has model type 'vit', for which transformers has no causal LM"),
        ({"model_type": "bogus"}, "has no config.json that transformers understands .*bogus"),
        ({"hidden_size": "wide"}, "has no config.json that transformers understands .*expected int"),
        ({"num_attention_heads": 0}, "has no config.json that transformers understands .*ZeroDivisionError"),
        ({"dtype": "float7"}, "has no config.json that transformers understands .*float7"),
        ({"hidden_size": -64}, "cannot be built from its config.json .*negative dimension"),
        ({"hidden_act": "nope"}, "cannot be built from its config.json .*KeyError: 'nope'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized already \(gptq\); give the original model"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model.layers.2.input_layernorm.weight \(9 missing in all\)"),
        ({"intermediate_size": 97}, r"model.layers.0.mlp.down_proj.weight is \[64, 96\] in the file, but \[64, 97\] by config.json"),
    ],
)
def test_config_of_something_else(config: dict, words: str, edited: Edited) -> None:
    with pytest.raises(InputError, match=words):
        models.open_source(str(edited("llama", config)))


def test_no_blocks(edited: Edited) -> None:
    source = models.open_source(str(edited("llama", {"num_hidden_layers": 0}, lambda t: [t.pop(n) for n in list(t) if ".layers." in n])))
    with pytest.raises(InputError, match=r"no list of decoder blocks"):
        models.find_layers(source.model, Recipe())


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe\0"])
def test_config_that_is_none(content: bytes, edited: Edited) -> None:
    folder = edited("llama")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"has no config.json that transformers understands"):
        models.open_source(str(folder))


def test_incomplete_weights(edited: Edited) -> None:
    """transformers would fill them with random numbers and warn."""
    folder = edited("llama", change=lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"lacks the tensor model.norm.weight \(1 missing in all\); the model is incomplete"):
        models.open_source(str(folder))


def test_pickles_stay_closed(edited: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened a pickle file"))
    folder = edited("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds pytorch_model.bin, a pickle file, which may run code when opened; convert it"):
        models.open_source(str(folder))
    with pytest.raises(InputError, match=r"cannot be loaded"):
        models.load_dense("it", folder, None)
    save_file({"x": torch.ones(1)}, folder / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"cannot be loaded"):
        models.open_source(str(folder))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors is not a readable safetensors file"):
        models.open_source(str(folder))


def test_damaged_weight_files(edited: Edited) -> None:
    folder = edited("llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"model.safetensors is not a readable safetensors file .*fetch it again"):
            models.open_source(str(folder))
    file.unlink()
    with pytest.raises(InputError, match=r"holds no .safetensors weights$"):
        models.open_source(str(folder))
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds no .safetensors weights; for model-q4.gguf add --gguf-file model-q4.gguf"):
        models.open_source(str(folder))
    with pytest.raises(InputError, match=r"has no file other.gguf; it has model-q4.gguf"):
        models.open_source(str(folder), gguf_file="other.gguf")
    with pytest.raises(InputError, match=r"cannot be loaded"):
        models.open_source(str(folder), gguf_file="model-q4.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(value: float, edited: Edited) -> None:
    source = models.open_source(str(edited("llama", change=lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][5].fill_(value))))
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight holds non-finite values; the model is damaged"):
        models.fingerprint(source)
    _, blocks = models.find_blocks(source.model)
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight holds non-finite values"):
        models.materialize(source, blocks[1], "model.layers.1", CPU, F32)


def test_integer_weights(edited: Edited) -> None:
    folder = edited("llama", change=lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int8)}))
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight is of type torch.int8; weights must be floating point"):
        models.fingerprint(models.open_source(str(folder)))


def test_tokenizers_that_are_none(edited: Edited) -> None:
    folder = edited("llama")
    source = models.open_source(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"has no usable tokenizer .*; put its tokenizer files beside the weights"):
        source.tokenizer()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no usable tokenizer"):
        source.tokenizer()


def test_too_little_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ResourceError, match=r"it does not fit in memory"):
        models.load_dense("it", tiny("llama"), None)


def test_hub_ids_are_fetched(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace()

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.name, asked.revision, asked.patterns = name, revision, allow_patterns
        return str(tiny("llama"))

    monkeypatch.setattr(models, "snapshot_download", fetch)
    assert models.open_source("owner/name", revision="v1").folder == tiny("llama")
    assert (asked.name, asked.revision) == ("owner/name", "v1") and not any("bin" in pattern for pattern in asked.patterns)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_is_run_only_when_asked_for(edited: Edited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    map_ = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = edited("llama", {"model_type": "own", "auto_map": map_, "architectures": ["OwnForCausalLM"]})
    (folder / "own.py").write_text(REMOTE)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on the terminal"))
    with pytest.raises(InputError, match=r"has no config.json that transformers understands"):
        models.open_source(str(folder))
    assert not (tmp_path / "transformers_modules").exists()
    source = models.open_source(str(folder), trust_remote_code=True)
    assert type(source.model).__name__ == "OwnForCausalLM" and source.trust_remote_code
    assert len(models.find_layers(source.model, Recipe(group_size=32)).quantized) == 14


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_find_layers(name: str, tiny: Tiny) -> None:
    model = models.open_source(str(tiny(name))).model
    layers = models.find_layers(model, Recipe(group_size=16))
    prefix, blocks = models.find_blocks(model)
    wanted = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.startswith(prefix + ".")]
    assert list(layers.quantized) == wanted and len(wanted) >= 8 and len(blocks) == layers.count == 2
    assert [layer for i in range(2) for layer in layers.of_block(i)] == wanted
    assert not any("head" in layer or "embed" in layer for layer in wanted)
    assert [skip for skip, _ in layers.skipped] == (EXPERTS if name == "mixtral" else [])
    if name == "mixtral":
        assert dict(layers.skipped)[EXPERTS[1]] == "3-D parameter of MixtralExperts, not a linear layer"
    if name == "gpt2":
        assert layers.quantized["transformer.h.0.mlp.c_fc"] == Shape(96, 64)


def test_skip(tiny: Tiny) -> None:
    model = models.open_source(str(tiny("llama"))).model
    layers = models.find_layers(model, Recipe(group_size=48, skip=("*self_attn*", "gate_proj", "mlp.up_proj")))
    assert list(layers.quantized) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert ("model.layers.0.mlp.up_proj", "asked for by --skip mlp.up_proj") in layers.skipped and len(layers.skipped) == 12
    with pytest.raises(InputError, match=r"nothing to quantize: no linear layer is left in model.layers after --skip \*"):
        models.find_layers(model, Recipe(skip=("*",)))
    with pytest.raises(InputError, match=r"nothing to quantize: no linear layer is left in layers$"):
        models.find_layers(nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(4)])}), Recipe())


def test_group_size_that_divides_nothing(tiny: Tiny) -> None:
    model = models.open_source(str(tiny("llama"))).model
    with pytest.raises(
        InputError,
        match=r"group size 48 does not divide 64 input channels of model.layers.0.self_attn.q_proj; use 4, 8, 16, 32, 64 or -1 \(--group-size\)",
    ):
        models.find_layers(model, Recipe(group_size=48))
    assert models.find_layers(model, Recipe(group_size=-1)).quantized
    with pytest.raises(
        InputError, match=r"group size 4 does not divide 7 input channels of b.0; use --group-size -1, or skip the layer \(--skip b.0\)"
    ):
        models.find_layers(nn.ModuleDict({"b": nn.ModuleList([nn.Linear(7, 2)])}), Recipe(group_size=4))


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), Conv1D(5, 3)])
def test_weights_are_seen_as_out_in(layer: nn.Module) -> None:
    x, before = torch.randn(2, 3), models.get_weight(layer)
    assert models.layer_shape(layer) == Shape(5, 3) and before.shape == (5, 3)
    torch.testing.assert_close(layer(x), x @ before.T + layer.bias)
    other = torch.randn(5, 3)
    layer.weight.data = models.held_as(layer, other)
    torch.testing.assert_close(layer(x), x @ other.T + layer.bias)
    assert not torch.equal(before, other)


# --- one block at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_materialized_blocks_are_copies(name: str, tiny: Tiny) -> None:
    source = models.open_source(str(tiny(name)))
    prefix, blocks = models.find_blocks(source.model)
    own = list(models.own_tensors(source.model))
    before = {tensor: source.tensors[tensor].clone() for tensor in own}
    models.materialize_around(source, prefix, CPU, F32)
    models.materialize(source, blocks[1], f"{prefix}.1", CPU, F32)
    with torch.no_grad():
        for parameter in blocks[1].parameters():
            parameter.fill_(7)
    models.release(blocks[1])
    assert all(parameter.is_meta for parameter in blocks[1].parameters())
    assert all(torch.equal(source.tensors[tensor], value) for tensor, value in before.items())


def test_dtype_of_materialized_weights(tiny: Tiny) -> None:
    source = models.open_source(str(tiny("qwen2")))
    prefix, blocks = models.find_blocks(source.model)
    models.materialize(source, blocks[0], f"{prefix}.0", CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in blocks[0].parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in blocks[0].parameters()) and all(p.is_meta for p in blocks[1].parameters())


def test_a_subset_of_tensors() -> None:
    some = models.Subset({"a": torch.zeros(1), "b": torch.ones(1)}, ["b"])
    assert list(some) == ["b"] and len(some) == 1 and some["b"] == 1 and "a" not in some
    with pytest.raises(KeyError):
        some["a"]
