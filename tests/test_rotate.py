"""Rotation: Hadamard matrices, the same function for every family against a rotation made by dense matrices, and whole runs."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL
from runs import sums
from torch import Tensor, nn

import matquant
from matquant import models, pipeline
from matquant.checkpoint import verify
from matquant.errors import RecipeError, ResumeError
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe
from matquant.report import Report
from matquant.rotate import FAMILIES, RotatedTensors, Rotation, hadamard_core, rotated

IDS = (torch.arange(2 * 24).reshape(2, 24) * 31 + 7) % 250
PAIRS = {"tie_word_embeddings": True}
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama, tied": ("LlamaConfig", SMALL | PAIRS),
    "llama, biases everywhere": ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama, heads wider than the stream": ("LlamaConfig", SMALL | {"head_dim": 20}),
    "llama, no Hadamard of 92 and 22": ("LlamaConfig", SMALL | {"hidden_size": 92, "head_dim": 22}),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 8}),
    "mistral, tied": ("MistralConfig", SMALL | PAIRS | {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen2, tied": ("Qwen2Config", SMALL | PAIRS),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 16}),
    "qwen3, tied, biases": ("Qwen3Config", SMALL | PAIRS | {"head_dim": 32, "attention_bias": True}),
}
ROTATE = Recipe(rotate=True, seed=3, group_size=-1)
FAST = replace(ROTATE, method="minmax", group_size=32, refit_bits=0, clip_search=False, eval_samples=0)
Tiny = Callable[[str], Path]


def save(folder: Path, config: str, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model, its biases and norms random too: they are 0 and 1 when made, which would hide what becomes of them."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
    model.to(dtype).save_pretrained(folder)
    return model.eval()


def built(source: models.Source) -> nn.Module:
    """transformers' own class with the tensors of `source`, and nothing missing or left over."""
    model = type(source.model)(source.model.config)
    model.load_state_dict(dict(source.tensors), strict=True)
    return model.float().eval()


@pytest.fixture(params=BUILDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(tmp_path / "model", *BUILDS[request.param])
    return tmp_path / "model"


# --- Hadamard matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 8, 12, 20, 24, 28, 36, 44, 60, 76, 84, 104, 200, 284])
def test_cores_are_hadamard_matrices(size: int) -> None:
    h = hadamard_core(size)
    assert h is not None and h.shape == (size, size) and bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 3, 9, 10, 22, 40, 52, 92])  # 10 and 22: 4 and 10 are no primes; 40, 52, 92 need prime powers or luck
def test_no_core(size: int) -> None:
    assert hadamard_core(size) is None


def rotation(size: int, seed: int = 0) -> Rotation:
    return Rotation.random(size, torch.Generator().manual_seed(seed))


def dense(turn: Rotation) -> Tensor:
    """diag(signs) (S x core), factor by factor."""
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) * len(turn.core) < len(turn.signs):
        sylvester = torch.kron(torch.tensor([[1.0, 1], [1, -1]]).double() / 2**0.5, sylvester)
    return torch.diag(turn.signs) @ torch.kron(sylvester, turn.core)


WIDTHS = (1, 2, 16, 40, 48, 64, 72, 80, 96, 112, 120, 128, 256, 288, 576, 768, 896, 960, 1152, 1536, 1600, 2048)  # of heads and of known models
ODD = (3, 14, 22, 92)


@pytest.mark.parametrize("size", [*WIDTHS, *ODD])
def test_rotations_are_orthogonal_and_fast_equals_dense(size: int) -> None:
    turn, eye = rotation(size), torch.eye(size, dtype=torch.float64)
    q = turn.apply(eye)
    torch.testing.assert_close(q @ q.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(q, dense(turn), rtol=0, atol=1e-12)
    x = torch.randn(5, 3 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(turn.apply(x), x @ torch.block_diag(q, q, q), rtol=0, atol=1e-11)
    assert bool(((q.abs() * size**0.5 - 1).abs() < 1e-12).all()) == (size in WIDTHS)  # a Hadamard matrix wherever there is one


def test_the_seed_decides() -> None:
    for size in (64, 22):
        same, again, other = (rotation(size, seed).apply(torch.eye(size, dtype=torch.float64)) for seed in (1, 1, 2))
        assert torch.equal(same, again) and not torch.equal(same, other)


def test_wide_models_have_cheap_rotations() -> None:
    assert {n: len(rotation(n).core) for n in (2304, 2560, 3072, 3584, 4096, 5120)} == {2304: 36, 2560: 20, 3072: 12, 3584: 28, 4096: 1, 5120: 20}


# --- the same function ------------------------------------------------------------------------------------------------


def test_the_function_stays(folder: Path) -> None:
    source = rotated(models.open_source(str(folder)), ROTATE)
    original = models.load_dense("it", folder, None)
    turned = built(source)
    with torch.no_grad():
        before, after = original(IDS).logits, turned(IDS).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    for name, parameter in turned.named_parameters():
        if name.endswith("norm.weight") and not name.endswith(("q_norm.weight", "k_norm.weight")):
            assert bool((parameter == 1).all()), name
        elif name.endswith("proj.weight"):
            assert float((parameter - original.get_parameter(name)).detach().abs().mean()) > 0.1, name


def eager(folder: Path, seed: int) -> dict[str, Tensor]:
    """Norms folded and everything turned in float64, matrix by matrix, on the loaded model."""
    model = models.load_dense("it", folder, None, dtype=torch.float64)
    config, generator = model.config, torch.Generator().manual_seed(seed)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, r = (dense(Rotation.random(size, generator)) for size in (config.hidden_size, head))
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        fold(model.model.norm, [model.lm_head])
        for block in model.model.layers:
            at, mlp = block.self_attn, block.mlp
            fold(block.input_layernorm, [at.q_proj, at.k_proj, at.v_proj])
            fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
            values, queries = torch.block_diag(*[r] * config.num_key_value_heads), torch.block_diag(*[r] * config.num_attention_heads)
            output(at.v_proj, values)
            at.o_proj.weight.copy_(at.o_proj.weight @ queries)
            for reader in (at.q_proj, at.k_proj, at.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight.copy_(reader.weight @ q)
            for writer in (at.o_proj, mlp.down_proj):
                output(writer, q)
        for outer in (model.model.embed_tokens, model.lm_head):
            outer.weight.copy_(outer.weight @ q)
    return model.state_dict()


def fold(norm: Any, readers: list[Any]) -> None:
    for reader in readers:
        reader.weight.copy_(reader.weight @ torch.diag(norm.weight))
    norm.weight.fill_(1)


def output(layer: Any, q: Tensor) -> None:
    layer.weight.copy_(q.T @ layer.weight)
    if layer.bias is not None:
        layer.bias.copy_(q.T @ layer.bias)


def test_tensor_by_tensor_equals_the_whole_model_turned_by_dense_matrices(folder: Path) -> None:
    lazy = rotated(models.open_source(str(folder)), ROTATE).tensors
    want = eager(folder, ROTATE.seed)
    assert set(lazy) == set(want) and len(lazy) == len(want)
    for name, tensor in want.items():
        torch.testing.assert_close(lazy[name], tensor.float(), rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_in_memory_is_turned_too(tmp_path: Path) -> None:
    save(tmp_path, *BUILDS["llama, tied"])
    lazy, whole = models.open_source(str(tmp_path)), models.load_dense("it", tmp_path, None)
    loaded = replace(lazy, model=whole, tensors=whole.state_dict(), note="loaded whole")
    turned = rotated(loaded, ROTATE)
    want = rotated(lazy, ROTATE).tensors
    assert all(torch.equal(turned.tensors[name], want[name]) for name in want) and len(turned.tensors) == len(want)
    models.materialize(turned, turned.model.model.layers[0], "model.layers.0", torch.device("cpu"), torch.float32)
    assert torch.equal(turned.model.model.layers[0].mlp.up_proj.weight, want["model.layers.0.mlp.up_proj.weight"])


def test_off_is_off(tiny: Tiny) -> None:
    source = models.open_source(str(tiny("gpt2")))
    assert rotated(source, replace(ROTATE, rotate=False)) is source


def test_large_embeddings_are_turned_by_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, *BUILDS["llama, tied"])
    whole = rotated(models.open_source(str(tmp_path)), ROTATE).tensors
    monkeypatch.setattr("matquant.rotate.SLAB", 100)
    slabs = rotated(models.open_source(str(tmp_path)), ROTATE).tensors
    assert all(torch.equal(whole[name], slabs[name]) for name in whole)


class Watched(Mapping[str, Tensor]):
    """Tells what was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, []

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    save(tmp_path, *BUILDS["llama, tied"])
    source = models.open_source(str(tmp_path))
    watched = Watched(source.tensors)
    tensors = rotated(replace(source, tensors=watched), ROTATE).tensors
    watched.asked.clear()  # a shape checker looks at an item when a Source is made
    assert "lm_head.weight" in tensors and "nothing" not in tensors and len(list(tensors)) == 21 and watched.asked == []
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    assert sorted(watched.asked) == ["model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"]
    watched.asked.clear()
    assert tensors["lm_head.weight"].shape == (258, 64)
    assert sorted(watched.asked) == ["model.embed_tokens.weight", "model.norm.weight"]
    with pytest.raises(KeyError):
        tensors["model.layers.2.mlp.up_proj.weight"]


def test_what_is_stored_keeps_its_type_and_what_is_quantized_is_not_rounded(tmp_path: Path) -> None:
    save(tmp_path, *BUILDS["qwen2, tied"], dtype=torch.bfloat16)
    tensors = rotated(models.open_source(str(tmp_path)), replace(ROTATE, skip=("up_proj",))).tensors
    wide = {name for name in tensors if tensors[name].dtype == torch.float32}
    assert all(tensors[name].dtype in (torch.bfloat16, torch.float32) for name in tensors)
    assert wide == {name for name in tensors if name.endswith("proj.weight") and "up_proj" not in name}


def test_outliers_are_spread(tmp_path: Path) -> None:
    model = save(tmp_path, *BUILDS["llama"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[5] = 50.0  # one channel that rules all groups it is in
    model.save_pretrained(tmp_path)
    up = "model.layers.0.mlp.up_proj.weight"
    spread = rotated(models.open_source(str(tmp_path)), ROTATE).tensors[up]
    folded = model.get_parameter(up).detach() * model.get_parameter("model.layers.0.post_attention_layernorm.weight").detach()
    peak = lambda w: float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean())  # noqa: E731
    assert peak(spread) < 0.6 * peak(folded)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi", "phi3", "opt", "gpt2", "mixtral"])
def test_other_families_are_refused(name: str, tiny: Tiny, tmp_path: Path) -> None:
    kind = {"gemma3": "gemma3_text"}.get(name, name)
    message = f"rotate does not know how models of type '{kind}' are built; supported are llama, mistral, qwen2, qwen3; drop --rotate"
    for run in (
        lambda: quantize(str(tiny(name)), tmp_path / "out", FAST, RunOptions()),
        lambda: pipeline.estimate(str(tiny(name)), FAST, RunOptions()),
    ):
        with pytest.raises(RecipeError, match=message):
            run()
    assert not list(tmp_path.iterdir())


def test_a_model_with_code_of_its_own_is_refused(tiny: Tiny) -> None:
    source = models.open_source(str(tiny("llama")))
    source.model.__class__ = type("MyLlama", (type(source.model),), {"__module__": "transformers_modules.mine"})
    with pytest.raises(RecipeError, match="rotate knows the llama of transformers, but this model brings its own MyLlama; supported are"):
        rotated(source, ROTATE)


def add_layer_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.LayerNorm(64)


def add_gate(model: Any) -> None:
    model.model.layers[0].mlp.gate = nn.Linear(64, 1)


def add_scale(model: Any) -> None:
    model.model.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize(
    ("change", "tensor"),
    [(add_layer_norm, "model.layers.1.input_layernorm.bias"), (add_gate, "model.layers.0.mlp.gate.weight"), (add_scale, "model.scale")],
)
def test_a_tensor_that_the_table_does_not_explain_is_refused(change: Callable[[Any], None], tensor: str, tiny: Tiny) -> None:
    source = models.open_source(str(tiny("llama")))
    change(source.model)
    with pytest.raises(RecipeError, match=f"rotate does not know the tensor {tensor}, which is no part of a llama as it was tested; supported are"):
        rotated(source, ROTATE)


def test_every_family_is_tested() -> None:
    assert {build.partition(",")[0] for build in BUILDS} == set(FAMILIES)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse; Python's warnings are errors."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield seen
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_from_a_folder_to_a_folder(name: str, tiny: Tiny, text: Path, tmp_path: Path, quiet: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "quality_svg", lambda rows: None)
    recipe = Recipe(
        rotate=True, group_size=16, bits=(8, 4, 2), targets={8: 100, 4: 4, 2: 1}, calibration=str(text), clip_search=False,
        num_samples=2, seq_len=40, eval_samples=1, skip=("1.mlp.down_proj",),
    )  # fmt: skip
    out = tmp_path / "out"
    report = quantize(str(tiny(name)), out, recipe, RunOptions())
    kl = {row.label: row.kl for row in report.rows}
    assert verify(out) == [] and kl["8"] is not None and 0 < kl["8"] < 1e-4  # of the original, which is not turned
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["recipe"]["rotate"] is True
    assert Report.from_dict(json.loads((out / "report.json").read_text())).recipe.rotate
    with torch.no_grad():
        want = models.load_dense("it", tiny(name), None)(IDS).logits
        ours = matquant.from_pretrained(out, bits=8)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert ours.lm_head.weight is not ours.get_input_embeddings().weight
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        assert float((ours(IDS).logits - want).norm() / want.norm()) < 0.04  # .02 and .03 without rotation too
    assert quiet == []


def test_without_turning_the_head_would_be_wrong(tiny: Tiny, tmp_path: Path) -> None:
    """The comparison above can fail: with other tensors of the same shapes it does."""
    quantize(str(tiny("llama-tied")), tmp_path / "out", replace(FAST, head_bits=0), RunOptions())
    model = matquant.from_pretrained(tmp_path / "out", bits=8)
    model.lm_head.weight = model.get_input_embeddings().weight
    model.lm_head.weight.data = models.open_source(str(tiny("llama-tied"))).tensors["model.embed_tokens.weight"]
    with torch.no_grad():
        want = models.load_dense("it", tiny("llama-tied"), None)(IDS).logits
        assert float((model(IDS).logits - want).abs().max() / want.abs().max()) > 0.2


class Killed(Exception):
    """As by a user's Ctrl-C."""


class KilledAt:
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __call__(self, stage: str, done: int, of: int) -> None:
        if stage == self.stage:
            raise Killed

    def line(self, text: str) -> None: ...


def test_equal_bytes_again_after_a_kill_and_no_resume_without_rotation(tiny: Tiny, tmp_path: Path) -> None:
    model = str(tiny("llama-tied"))
    quantize(model, tmp_path / "want", FAST, RunOptions())
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", FAST, RunOptions(), KilledAt("writing"))
    with pytest.raises(ResumeError, match="rotate: True -> False"):
        quantize(model, tmp_path / "out", replace(FAST, rotate=False), RunOptions(resume=True))
    quantize(model, tmp_path / "out", FAST, RunOptions(resume=True))
    assert sums(tmp_path / "out") == sums(tmp_path / "want")
    quantize(model, tmp_path / "other", replace(FAST, seed=4), RunOptions())
    assert sums(tmp_path / "other").keys() == sums(tmp_path / "want").keys() and sums(tmp_path / "other") != sums(tmp_path / "want")


def test_a_dry_run_counts_the_untied_head(tiny: Tiny) -> None:
    for bits, more in ((0, 258 * 64 * 4), (8, 258 * (64 + 2 * 3))):  # two groups a row
        recipe = replace(FAST, head_bits=bits)
        sizes = [pipeline.estimate(str(tiny("llama-tied")), each, RunOptions()).file_bytes for each in (recipe, replace(recipe, rotate=False))]
        assert sizes[0] - sizes[1] == more


def test_damaged_weights_are_still_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model", *BUILDS["llama"])
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(matquant.errors.InputError, match="model.layers.1.mlp.down_proj.weight holds non-finite values"):
        quantize(str(tmp_path / "model"), tmp_path / "out", FAST, RunOptions())


def test_integers_are_handed_on_as_they_are() -> None:
    codes = {"lm_head.weight": torch.ones(4, 4, dtype=torch.int8)}
    assert RotatedTensors(codes, ["lm_head.weight"], FAMILIES["llama"], False, {}, frozenset())["lm_head.weight"].dtype == torch.int8
