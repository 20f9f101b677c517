"""transformers: loading at a width, the widths in memory, saving, and every trap of transformers 5 that would load garbage in silence."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import build_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

import matquant
from matquant import hf
from matquant.checkpoint import Checkpoint
from matquant.errors import CheckpointError, InputError, MissingPlanesError, PlanError
from matquant.linear import NestedLinear
from matquant.plan import BitPlan, Shape
from matquant.recipe import Recipe
from matquant.weight import NestedWeight

WIDTHS = (8, 6, 4, 3, 2)
IDS = torch.arange(24).reshape(2, 12) * 7 % 256
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
Build = Callable[..., tuple[Path, dict[str, NestedWeight]]]


@pytest.fixture(scope="session")
def build(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build("llama", slicing="round") -> (checkpoint folder, name -> NestedWeight); never write into the folder."""
    made: dict[str, tuple[Path, dict[str, NestedWeight]]] = {}

    def make(model: str = "llama", **settings: object) -> tuple[Path, dict[str, NestedWeight]]:
        key = repr((model, sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / "nested"
            made[key] = folder, build_checkpoint(tiny(model), folder, Recipe(**{"group_size": 32} | settings))
        return made[key]

    return make


@pytest.fixture
def copied(build: Build, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint folder of one's own, without MANIFEST: for damage that checksums would report first."""

    def make(model: str = "llama", manifest: bool = False, **settings: object) -> Path:
        folder = Path(shutil.copytree(build(model, **settings)[0], tmp_path / "copy"))
        if not manifest:
            (folder / "MANIFEST.json").unlink()
        return folder

    return make


def dense(model_folder: Path, weights: dict[str, NestedWeight], bits: Callable[[str], int]) -> nn.Module:
    """The float model with every quantized weight replaced by what NestedWeight.read says."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        value = weight.read(bits(name)).dense()
        module.weight.data = value.T.contiguous() if isinstance(module, Conv1D) else value
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], family: str = "base") -> None:
    """Change the tensors of one shard and the index with it."""
    file = next(folder.glob(f"model-{family}-*.safetensors"))
    tensors = load_file(file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# --- reading at a width ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"slicing": "round"}, {"slicing": "round-overflow"}, {"overlap": True}, {"symmetric": True}, {"group_size": -1, "scale_dtype": "float32"}],
    ids=["floor", "round", "round-overflow", "overlap", "symmetric", "whole-row"],
)
def test_logits_equal_the_dense_model_at_every_width(build: Build, tiny: Callable[[str], Path], settings: dict) -> None:
    folder, weights = build("llama", **settings)
    model = matquant.from_pretrained(folder)
    assert not model.training and model.generation_config.eos_token_id == 257
    for bits in WIDTHS:
        matquant.set_bits(model, bits)
        expected = logits(dense(tiny("llama"), weights, BitPlan(bits).bits))
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(matquant.from_pretrained(folder, bits=bits)), expected)


@pytest.mark.parametrize("model", ["llama-tied", "gpt2", "opt", "qwen2", "gemma3", "phi", "mixtral"])
def test_architectures(build: Build, tiny: Callable[[str], Path], model: str, tmp_path: Path) -> None:
    """Conv1D (gpt2), biases (gpt2, opt, qwen2, phi), tied embeddings (llama-tied, gpt2, opt, gemma3), fused experts left alone (mixtral)."""
    folder, weights = build(model)
    loaded = matquant.from_pretrained(folder, bits=3, keep=8)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, NestedLinear)}
    assert layers.keys() == weights.keys()
    expected = logits(dense(tiny(model), weights, lambda name: 3))
    torch.testing.assert_close(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "saved")
    again = matquant.from_pretrained(tmp_path / "saved")
    assert same(tensors_of(again), tensors_of(loaded))
    plain = loaded.dequantize()
    torch.testing.assert_close(logits(plain), expected)
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), expected)


def test_conv1d_is_transposed_once(build: Build) -> None:
    folder, weights = build("gpt2")
    model = matquant.from_pretrained(folder)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, NestedLinear) and layer.transposed and (layer.out_features, layer.in_features) == (192, 64)
    assert torch.equal(layer.nested().codes, weights["transformer.h.0.attn.c_attn"].codes)
    assert isinstance(model.dequantize().transformer.h[0].attn.c_attn, Conv1D)


def test_a_plan_at_load_and_later(build: Build, tiny: Callable[[str], Path]) -> None:
    folder, weights = build()
    plan = BitPlan(3, {Q_PROJ: 8, DOWN: 2})
    expected = logits(dense(tiny("llama"), weights, plan.bits))
    model = matquant.from_pretrained(folder, bits=plan, keep=8)
    torch.testing.assert_close(logits(model), expected)
    assert model.get_submodule(DOWN).bits == 2 and model.get_submodule(Q_PROJ).bits == 8
    matquant.set_bits(model, 4)
    assert {module.bits for module in model.modules() if isinstance(module, NestedLinear)} == {4}
    matquant.set_bits(model, plan)
    torch.testing.assert_close(logits(model), expected)


def test_the_default_width_is_what_config_says(copied: Callable[..., Path]) -> None:
    folder = copied()
    assert matquant.from_pretrained(folder).model.layers[0].mlp.up_proj.bits == 8
    edit_config(folder, lambda config: config["quantization_config"].update(bits=3))
    assert matquant.from_pretrained(folder).model.layers[0].mlp.up_proj.bits == 3
    assert matquant.from_pretrained(folder).model.layers[0].mlp.up_proj.planes == 8
    layer = matquant.from_pretrained(folder, keep=2).model.layers[0].mlp.up_proj
    assert (layer.bits, layer.planes) == (2, 2)


def test_set_bits_refuses_before_it_changes_anything(build: Build) -> None:
    model = matquant.from_pretrained(build()[0], bits=4)
    with pytest.raises(MissingPlanesError, match="8 bits need planes 0-7, but only 0-3 were loaded; load the model with bits=8 or keep=8"):
        matquant.set_bits(model, BitPlan(2, {DOWN: 8}))
    with pytest.raises(PlanError, match="the plan gives default 5 bits; choose from 8, 6, 4, 3, 2"):
        matquant.set_bits(model, 5)
    with pytest.raises(PlanError, match=r"did you mean model\.layers\.1\.mlp\.down_proj"):
        matquant.set_bits(model, BitPlan(4, {"model.layers.1.mlp.down_pro": 2}))
    assert {module.bits for module in model.modules() if isinstance(module, NestedLinear)} == {4}
    with pytest.raises(InputError, match="no matquant layers"):
        matquant.set_bits(nn.Linear(2, 2), 4)


def test_what_to_load_is_checked_first(build: Build) -> None:
    folder, _ = build()
    with pytest.raises(PlanError, match="the plan gives default 7 bits; choose from"):
        matquant.from_pretrained(folder, bits=7)
    with pytest.raises(PlanError, match="does not have; did you mean"):
        matquant.from_pretrained(folder, bits=BitPlan(4, {"model.layers.0.self_attn.q_pro": 2}))
    with pytest.raises(PlanError, match="keep is 3, but 4 bits are to be read; give keep=4 or more"):
        matquant.from_pretrained(folder, bits=4, keep=3)
    with pytest.raises(PlanError, match="keep is 5; choose from 8, 6, 4, 3, 2"):
        matquant.from_pretrained(folder, keep=5)


def test_generate_and_compute_dtypes(build: Build) -> None:
    folder, _ = build()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = matquant.from_pretrained(folder, bits=4, dtype=dtype)
        assert model.dtype == dtype
        out = model.generate(IDS[:1, :4], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert out.shape == (1, 9)


# --- only what is needed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slicing", "bits", "planes"), [("floor", 2, 2), ("floor", 4, 4), ("floor", 8, 8), ("round", 3, 4), ("round", 8, 8)])
def test_other_planes_are_neither_held_nor_opened(build: Build, monkeypatch: pytest.MonkeyPatch, slicing: str, bits: int, planes: int) -> None:
    import transformers.modeling_utils

    opened: list[str] = []

    def watch(file: str, *args: object, **kwargs: object) -> object:
        opened.append(Path(file).name)
        return safe_open(file, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", watch)
    folder, _ = build(slicing=slicing)
    layer = matquant.from_pretrained(folder, bits=bits).model.layers[0].mlp.up_proj
    assert layer.planes == planes and layer.weight.shape[0] == 2
    assert [name for name, _ in layer.named_buffers() if name.startswith("plane")] == [f"plane_{k}" for k in range(2, planes)]
    assert sorted(file.split("-")[1] for file in opened) == ["base", *(f"plane{k}" for k in range(2, planes))]


@pytest.mark.parametrize("planes", [2, 3, 5])
@pytest.mark.parametrize("index", ["whole", "partial"])
def test_a_folder_with_the_first_planes_only(copied: Callable[..., Path], build: Build, planes: int, index: str, tmp_path: Path) -> None:
    folder = copied(manifest=index == "whole")
    gone = [file.name for k in range(planes, 8) for file in folder.glob(f"model-plane{k}-*")]
    for name in gone:
        (folder / name).unlink()
    if index == "partial":
        path = folder / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        data["weight_map"] = {name: file for name, file in data["weight_map"].items() if file not in gone}
        path.write_text(json.dumps(data))
    here = [r for r in WIDTHS if r <= planes]
    model = matquant.from_pretrained(folder)
    assert model.get_submodule(DOWN).bits == max(here)
    assert torch.equal(logits(model), logits(matquant.from_pretrained(build()[0], bits=max(here))))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    with pytest.raises(MissingPlanesError, match=r"8 bits need planes 0-7"):
        matquant.from_pretrained(folder, bits=8)
    with pytest.raises(MissingPlanesError, match="6 bits need planes 0-5, but only"):
        matquant.set_bits(model, 6)
    model.save_pretrained(tmp_path / "saved")
    assert Checkpoint.open(tmp_path / "saved").planes == max(here)  # of 5 planes, the fifth serves no offered width
    assert same(tensors_of(matquant.from_pretrained(tmp_path / "saved")), tensors_of(model))


# --- transformers' own entry points ---------------------------------------------------------------------------------


def test_auto_model_and_its_quantization_config(build: Build) -> None:
    folder, _ = build()
    expected = logits(matquant.from_pretrained(folder, bits=3))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_submodule(DOWN).bits == 8
    matquant.set_bits(model, 3)
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="loading attributes"):  # trap: transformers ignores them unless the class is in its tuple
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=matquant.MatquantConfig(bits=3))
    assert model.get_submodule(DOWN).planes == 3 and torch.equal(logits(model), expected)


def test_other_classes_of_the_same_model(build: Build) -> None:
    folder, _ = build()
    body = AutoModel.from_pretrained(folder)
    assert isinstance(body.layers[0].mlp.up_proj, NestedLinear)
    with torch.no_grad():
        hidden = body(IDS).last_hidden_state
        full = matquant.from_pretrained(folder)
        assert torch.equal(full.lm_head(hidden), full(IDS).logits)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)  # its head is new by design
    assert isinstance(classifier.model.layers[0].mlp.up_proj, NestedLinear)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_maps_and_dtypes_keep_scales(build: Build, device_map: object, dtype: torch.dtype) -> None:
    folder, weights = build(scale_dtype="float32")
    model = matquant.from_pretrained(folder, device_map=device_map, dtype=dtype)
    layer = model.get_submodule(DOWN)
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, weights[DOWN].scale)
    assert torch.equal(layer.zero_2, weights[DOWN].refits[2].zero) and layer.weight.dtype == torch.uint8
    model.to(torch.float16)
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, weights[DOWN].scale)
    assert model.dtype == torch.float16


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_disk_offload(build: Build, tmp_path: Path, offload_buffers: bool) -> None:
    folder, _ = build()
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = matquant.from_pretrained(folder, bits=4, device_map=parts, offload_folder=tmp_path / "off", offload_buffers=offload_buffers)
    torch.testing.assert_close(logits(model), logits(matquant.from_pretrained(folder, bits=4)))
    matquant.set_bits(model, 2)
    torch.testing.assert_close(logits(model), logits(matquant.from_pretrained(folder, bits=2)))
    if offload_buffers:
        with pytest.raises(InputError, match="cannot dequantize a model that is offloaded to disk"):
            model.dequantize()


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"slicing": "round", "symmetric": True}, {"overlap": True, "refit_bits": 0}], ids=str)
@pytest.mark.parametrize("shard", ["50GB", "40KB"])
def test_save_pretrained_round_trip(build: Build, tmp_path: Path, settings: dict, shard: str) -> None:
    folder, weights = build(**settings)
    model = matquant.from_pretrained(folder, bits=4, keep=8)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    stored = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "saved")]
    assert stored[0]["quantization_config"] == stored[1]["quantization_config"]  # the width in use is not written: trap 11
    saved = Checkpoint.open(tmp_path / "saved")
    assert saved.recipe == Recipe(group_size=32, **settings)
    for name, weight in weights.items():
        found = saved.read(name)
        assert torch.equal(found.codes, weight.codes) and torch.equal(found.scale, weight.scale)
        for bits in WIDTHS:
            assert torch.equal(found.read(bits).dense(), weight.read(bits).dense())
    again = matquant.from_pretrained(tmp_path / "saved")
    assert again.get_submodule(DOWN).bits == 8 and same(tensors_of(again), tensors_of(model))
    narrow = matquant.from_pretrained(tmp_path / "saved", bits=2)
    assert torch.equal(logits(narrow), logits(matquant.from_pretrained(folder, bits=2)))


def test_dequantize(build: Build, tmp_path: Path) -> None:
    folder, weights = build()
    model = matquant.from_pretrained(folder, bits=3)
    plain = model.dequantize()
    assert type(plain.get_submodule(DOWN)) is nn.Linear
    assert torch.equal(plain.get_submodule(DOWN).weight, weights[DOWN].read(3).dense())
    assert not hasattr(plain.config, "quantization_config") and not plain.is_quantized
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any(isinstance(module, NestedLinear) for module in again.modules())
    assert torch.equal(logits(again), logits(plain))
    half = matquant.from_pretrained(folder, bits=3).dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


# --- traps: what transformers would load as garbage -----------------------------------------------------------------


def test_unregistered_transformers_stops_on_the_shape(build: Build) -> None:
    """Trap 1: without matquant, nothing tells transformers that the codes are codes. In fresh interpreters."""
    load = f"AutoModelForCausalLM.from_pretrained({str(build()[0])!r})"
    without = f"from transformers import AutoModelForCausalLM\ntry:\n    {load}\nexcept RuntimeError as e:\n    print('stopped')"
    after = f"import matquant\nfrom transformers import AutoModelForCausalLM\nprint(type({load}.model.layers[0].mlp.up_proj).__name__)"
    for code, said in [(without, "stopped"), (after, "NestedLinear")]:
        result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert result.stdout.strip() == said, result.stderr


def test_register_is_idempotent() -> None:
    known = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    hf.register()
    hf.register()
    assert known == auto.LOADING_ATTRIBUTES_CONFIG_TYPES and known.count(hf.MatquantConfig) == 1
    assert auto.AUTO_QUANTIZER_MAPPING["matquant"] is hf.MatquantHfQuantizer


def both_ways(folder: Path, match: str, **kwargs: object) -> None:
    """Refused by our entry point and by transformers' own."""
    for load in (matquant.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=match):
            load(folder, **kwargs)


def test_float_codes_are_refused(copied: Callable[..., Path]) -> None:
    """Trap 2: transformers casts a float tensor into a uint8 placeholder."""
    folder = copied()
    rewrite(folder, lambda tensors: tensors.update({f"{DOWN}.weight": tensors[f"{DOWN}.weight"].float()}))
    both_ways(folder, "F32")


def test_a_state_dict_in_place_of_files_is_refused(build: Build) -> None:
    """Its dtypes could not be checked before transformers casts them."""
    config = AutoConfig.from_pretrained(build()[0])
    with pytest.raises(InputError, match="loaded from a folder, not from a state dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"model.norm.weight": torch.ones(64)})


def test_a_tensor_that_was_cast_is_refused() -> None:
    """Also where transformers keeps a module in float32 by its name."""
    layer = NestedLinear(Shape(8, 32), Recipe(group_size=32).layout)
    layer.scale = layer.scale.float()
    with pytest.raises(CheckpointError, match=r"down_proj.scale was loaded as torch.float32, not torch.float16"):
        hf.check_values("down_proj", layer)


@pytest.mark.parametrize("suffix", ["weight", "scale", "scale.2", "zero.2"])
def test_a_missing_quantized_tensor_is_refused(copied: Callable[..., Path], suffix: str) -> None:
    """Trap 3: transformers leaves uninitialised memory and logs a line."""
    folder = copied()
    rewrite(folder, lambda tensors: tensors.pop(f"{DOWN}.{suffix}"))
    both_ways(folder, "missing")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_base_tensor_is_refused(copied: Callable[..., Path], name: str) -> None:
    folder = copied()
    rewrite(folder, lambda tensors: tensors.pop(name))
    both_ways(folder, f"the checkpoint lacks {name}")


def test_an_extra_base_tensor_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.bias": torch.zeros(64)}))
    both_ways(folder, r"the checkpoint has, unknown to the model, model.layers.1.mlp.down_proj.bias")


def test_a_base_tensor_of_another_shape_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied()
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    both_ways(folder, "wrong shape model.norm.weight")
    both_ways(folder, "wrong shape model.norm.weight", ignore_mismatched_sizes=True)


def test_bad_scales_are_refused(copied: Callable[..., Path]) -> None:
    folder = copied()
    rewrite(folder, lambda tensors: tensors[f"{DOWN}.scale"].fill_(float("nan")))
    both_ways(folder, rf"{DOWN}.scale is not finite everywhere")
    rewrite(folder, lambda tensors: tensors[f"{DOWN}.scale"].zero_())
    both_ways(folder, rf"{DOWN}.scale is not positive everywhere")


def test_a_flipped_bit_in_a_plane_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied(manifest=True)
    file = next(folder.glob("model-plane2-*"))
    content = bytearray(file.read_bytes())
    content[-7] ^= 16
    file.write_bytes(content)
    both_ways(folder, "differs from its sha256")
    assert matquant.from_pretrained(folder, bits=2).get_submodule(DOWN).planes == 2  # that plane is not needed


def test_buffers_survive_and_are_persistent(build: Build) -> None:
    """Trap 4: non-persistent buffers are garbage after loading."""
    model = matquant.from_pretrained(build()[0])
    layer = model.get_submodule(DOWN)
    assert not layer._non_persistent_buffers_set
    assert {name for name, _ in layer.named_buffers()} == set(layer.state_dict())


def test_nothing_quantized_is_trainable(build: Build) -> None:
    """Trap 5: transformers makes floating parameters trainable. Trap 12: the Trainer is told so."""
    for name in ("llama", "gpt2"):
        model = matquant.from_pretrained(build(name)[0])
        for layer in (module for module in model.modules() if isinstance(module, NestedLinear)):
            assert not any(buffer.requires_grad for buffer in layer.buffers())
            assert {name for name, _ in layer.named_parameters()} <= {"bias"}
    assert model.hf_quantizer.is_trainable is False and model.hf_quantizer.is_qat_trainable is False


def test_a_quantized_head(build: Build, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Trap 8: fine when untied; refused when the config still ties it."""
    folder = tmp_path / "head"
    weights = build_checkpoint(tiny("llama"), folder, Recipe(group_size=32), also=("lm_head",))
    model = matquant.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(dense(tiny("llama"), weights, lambda name: 8)))
    model.tie_weights()  # lm-eval calls it again
    model.save_pretrained(tmp_path / "saved")
    assert same(tensors_of(matquant.from_pretrained(tmp_path / "saved")), tensors_of(model))
    (folder / "MANIFEST.json").unlink()
    edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    both_ways(folder, "lm_head is quantized but tied to the embedding; set tie_word_embeddings to false")


def test_the_dtype_of_the_model_is_not_that_of_scales(build: Build, tmp_path: Path) -> None:
    """Trap 9: model.dtype is the first floating parameter, and save_pretrained writes it."""
    model = matquant.from_pretrained(build(scale_dtype="float32")[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    again = matquant.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))


def test_a_config_of_another_model_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied()
    edit_config(folder, lambda config: config.update(num_hidden_layers=1))
    both_ways(folder, "the checkpoint quantizes model.layers.1.* which LlamaForCausalLM does not have")
    edit_config(folder, lambda config: config.update(num_hidden_layers=2, intermediate_size=64))
    both_ways(folder, r"down_proj is \[64, 96\] in the checkpoint but \[64, 64\] in the model")


def test_modules_that_are_no_linear_layers_are_refused(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    real = modeling_llama.LlamaMLP.__init__

    def with_scaled(self: nn.Module, config: object) -> None:
        real(self, config)
        self.down_proj = Scaled(96, 64, bias=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_scaled)
    both_ways(copied(), "which is a Scaled and no linear layer")


def test_a_transformers_without_the_report_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.MatquantHfQuantizer, "_refuse_incomplete", lambda self, model: None)
    with pytest.raises(InputError, match="does not report missing tensors"):
        matquant.from_pretrained(build()[0])


def test_float_models_are_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=matquant.MatquantConfig(bits=4))
    with pytest.raises(InputError, match="describes no matquant checkpoint"):
        matquant.from_pretrained(tiny("llama"))


# --- folders and the Hub --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "./a/b", "/no/such/folder", Path("some/where"), "a/b/c"])
def test_no_such_folder(path: object) -> None:
    with pytest.raises(InputError, match=r"no folder .*; give the folder of a matquant checkpoint, or a Hub id"):
        matquant.from_pretrained(path)


def test_hub_ids_fetch_only_the_planes_needed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[dict] = []

    def fetch(repo: str, **kwargs: object) -> str:
        calls.append({"repo": repo, **kwargs})
        return str(build()[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = matquant.from_pretrained("owner/name", bits=4, revision="v1")
    assert model.get_submodule(DOWN).planes == 4
    assert calls[0]["repo"] == "owner/name" and calls[0]["revision"] == "v1"
    assert calls[0]["ignore_patterns"] == ["model-plane5-*", "model-plane6-*", "model-plane7-*"]
    matquant.from_pretrained("owner/name", bits=BitPlan(2, {DOWN: 6}))
    assert calls[1]["ignore_patterns"] == ["model-plane7-*"]
    matquant.from_pretrained("owner/name")
    assert calls[2]["ignore_patterns"] == []


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot get owner/name from the Hub"):
        matquant.from_pretrained("owner/name", local_files_only=True)
