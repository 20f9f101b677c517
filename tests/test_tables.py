"""Tables: output heads and embeddings at a width of their own, from the rounding to transformers and the engine."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import build_checkpoint
from runs import FAST, IDS, Tiny
from safetensors import safe_open
from small_checkpoint import edit_json, reseal
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import matquant
from matquant import hf, models, pipeline, tables
from matquant.checkpoint import Checkpoint, describe, verify
from matquant.cli import main
from matquant.codes import Grid, fit_grid, nearest_code
from matquant.embedding import NestedEmbedding, NestedHead, TiedHead
from matquant.engine import Engine
from matquant.errors import CheckpointError, InputError, PlanError, RecipeError
from matquant.evaluate import evaluate
from matquant.pipeline import RunOptions, quantize
from matquant.plan import BitPlan
from matquant.recipe import Recipe
from matquant.search.plans import model_of
from matquant.search.units import examine

pytestmark = pytest.mark.usefixtures("no_plots")

RECIPE = replace(FAST, parent_bits=8, bits=(8, 3, 2), targets={8: 1.0}, calibration="self")
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made("llama", head_bits=4) -> a checkpoint; never write into the folder."""
    folders: dict[str, Path] = {}

    def make(kind: str, **settings: Any) -> Path:
        key = repr((kind, sorted(settings.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("made") / "out"
            quantize(str(tiny(kind)), folders[key], replace(RECIPE, **settings), RunOptions())
        return folders[key]

    return make


def of_reader(weight: Tensor, bits: int, size: int, symmetric: bool, dtype: str) -> np.ndarray:
    """A weight rounded and read again, group by group in numpy, by the words of docs/FORMAT.md."""
    w, most = weight.double().numpy(), 2**bits - 1
    read = np.empty_like(w)
    for o, row in enumerate(w):
        for first in range(0, len(row), len(row) if size == -1 else size):
            part = row[first : first + (len(row) if size == -1 else size)]
            low, high = min(part.min(), 0), max(part.max(), 0)
            step = float(np.array(np.abs(part).max() * 2 / most if symmetric else (high - low) / most).astype(dtype)) or 1.0
            zero = 2 ** (bits - 1) if symmetric else min(max(np.floor(-low / step + 0.5), 0), most)
            read[o, first : first + len(part)] = step * (np.clip(np.floor(part / step + zero + 0.5), 0, most) - zero)
    return read


@pytest.mark.parametrize(
    "settings", [{}, {"head_bits": 4, "symmetric": True}, {"head_bits": 2, "scale_dtype": "float32"}, {"head_bits": 5, "group_size": -1}]
)
def test_what_is_stored_is_rounded_to_nearest(made: Make, tiny: Tiny, settings: dict[str, Any]) -> None:
    """Codes at the border of two cells may fall either way: the reference computes in float64."""
    recipe, folder = replace(RECIPE, **settings), made("llama", **settings)
    checkpoint, source = Checkpoint.open(folder), models.open_source(str(tiny("llama")))
    assert list(checkpoint.tables) == [HEAD, EMBEDDING] and verify(folder) == []
    for name, table in checkpoint.tables.items():
        assert table.bits == recipe.head_bits and table.layout.grid.group_size == recipe.group_size
        want = of_reader(source.tensors[f"{name}.weight"], recipe.head_bits, recipe.group_size, recipe.symmetric, recipe.scale_dtype)
        got = checkpoint.table(name).read(table.bits).dense().numpy()
        step = np.ptp(want, -1, keepdims=True) / (2**table.bits - 1)
        assert (np.abs(got - want) > 1e-5 * step).mean() < 5e-3 and (np.abs(got - want) <= 2 * step).all()


def hidden_of(model: Any) -> tuple[Tensor, Tensor]:
    """(what the blocks are given, what the head is given) of IDS."""
    with torch.no_grad():
        return model.get_input_embeddings()(IDS), model.base_model(IDS).last_hidden_state


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_computes_from_the_stored_table(made: Make, tiny: Tiny, kind: str, bits: int) -> None:
    folder = made(kind, head_bits=bits)
    checkpoint, model = Checkpoint.open(folder), matquant.from_pretrained(folder, 3)
    assert list(checkpoint.tables) == ([EMBEDDING] if kind == "llama-tied" else [HEAD, EMBEDDING])
    embedding, head = (checkpoint.table(name).read(bits).dense() for name in (EMBEDDING, HEAD if HEAD in checkpoint.tables else EMBEDDING))
    given, last = hidden_of(model)
    assert torch.equal(given, embedding[IDS])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, last @ head.T)
    kinds = {type(module) for module in model.modules()} & {NestedEmbedding, NestedHead, TiedHead}
    assert kinds == {NestedEmbedding, TiedHead if kind == "llama-tied" else NestedHead}
    plain = model.dequantize()
    torch.testing.assert_close(plain(IDS).logits, last @ head.T)
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == (kind == "llama-tied")
    assert type(plain.get_input_embeddings()) is nn.Embedding and torch.equal(plain.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("settings", [{}, {"head_bits": 5, "symmetric": True}, {"head_bits": 2, "scale_dtype": "float32"}, {"head_bits": 0}])
def test_the_engine_agrees_with_transformers(made: Make, kind: str, settings: dict[str, Any]) -> None:
    folder = made(kind, **settings)
    engine, model = Engine.open(folder, 3, exact=True), matquant.from_pretrained(folder, 3)
    given, last = hidden_of(model)
    assert torch.equal(engine.embeddings[IDS[0]], given[0])
    with torch.no_grad():
        want = model(IDS).logits[0]
        if not settings.get("head_bits", 8):  # then the engine rounds the head when it is opened
            want = last[0] @ tables.rounded(model.lm_head.weight, Grid(8, 64, symmetric=False, overlap=False)).read(8).dense().T
    torch.testing.assert_close(engine.logits(IDS[0]), want, rtol=1e-3, atol=1e-4)


def test_head_bits_of_the_engine_are_for_heads_that_are_not_stored(made: Make) -> None:
    assert Engine.open(made("llama", head_bits=0), 8, head_bits=4).stepper.head.widths == (4,)
    assert Engine.open(made("llama", head_bits=0), 8).stepper.head.widths == (8,)
    assert Engine.open(made("llama-tied", head_bits=4), 8, head_bits=4).stepper.head.widths == (4,)
    with pytest.raises(InputError, match="head_bits is 8, but .* stores its head at 4 bits; leave head_bits out, or quantize with --head-bits 8"):
        Engine.open(made("llama-tied", head_bits=4), 8, head_bits=8)


def test_on_the_command_line(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(made("llama-tied", head_bits=4))
    assert main(["inspect", folder]) == 0
    assert (
        "table model.embed_tokens: 258 x 64 at 4 bits, groups of 32, 9.8 kB; read so at every width\nnot quantized: nothing"
        in capsys.readouterr().out
    )
    assert main(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"] == {EMBEDDING: {"shape": [258, 64], "bits": 4, "group_size": 32}}
    assert main(["generate", folder, "1 squared", "--bits", "3", "--max-new-tokens", "2", "--head-bits", "8"]) == 3
    assert "head_bits is 8" in capsys.readouterr().err
    assert main(["bench", folder, "--bits", "2", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--no-memory", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head_bits"] == 4


def test_the_card_says_so(made: Make) -> None:
    line = "output head and embeddings rounded to nearest at 4 bits, whatever the width of the layers"
    assert (
        line in (made("llama-tied", head_bits=4) / "README.md").read_text()
        and line[:40] not in (made("llama", head_bits=0) / "README.md").read_text()
    )


# --- which, and how large -------------------------------------------------------------------------------------------


def test_the_group_is_the_recipes_where_it_divides_a_row(tiny: Tiny, tmp_path: Path) -> None:
    assert [tables.fitting_group(hidden) for hidden in (576, 96, 60)] == [64, 32, -1]
    assert [tables.fitting_group(hidden, (48, 64, 32)) for hidden in (96, 64, 36)] == [48, 64, -1] and tables.fitting_group(64, (-1, 64)) == -1
    recipe = replace(RECIPE, group_size=96, skip=("*self_attn*", "gate_proj", "up_proj"))  # 96 divides no row of 64
    quantize(str(tiny("llama-tied")), tmp_path / "out", recipe, RunOptions())
    table = Checkpoint.open(tmp_path / "out").tables[EMBEDDING]
    assert table.layout.grid.group_size == 64 and verify(tmp_path / "out") == []
    matquant.from_pretrained(tmp_path / "out", 2)(IDS)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_what_is_left_as_it_came_and_why(tiny: Tiny) -> None:
    def left(kind: str, recipe: Recipe = RECIPE, change: Callable[[Any], object] = lambda model: None) -> tuple[list[str], dict[str, str]]:
        model = AutoModelForCausalLM.from_pretrained(tiny(kind))
        change(model)
        found = tables.find_tables(model, recipe)
        return list(found.tables), dict(found.left)

    assert left("llama", replace(RECIPE, head_bits=0)) == ([], {})
    assert left("llama", replace(RECIPE, skip=("lm_head",))) == ([EMBEDDING], {HEAD: "asked for by --skip lm_head"})
    tied = replace(RECIPE, skip=("embed_tokens",))
    assert left("llama-tied", tied) == ([], dict.fromkeys([EMBEDDING, HEAD], "asked for by --skip embed_tokens"))
    scaled = lambda model: setattr(model, HEAD, Scaled(64, 258))  # noqa: E731
    assert left("llama", change=scaled) == ([EMBEDDING], {HEAD: "read by lm_head, a Scaled, which is neither a linear layer nor an embedding"})

    def share(model: Any) -> None:
        model.model.other = nn.Embedding(258, 64)
        model.model.other.weight = model.model.embed_tokens.weight

    tables_, why = left("llama", change=share)
    assert tables_ == [HEAD] and why[EMBEDDING] == "shared with model.other, which is neither head nor embedding"


@pytest.mark.parametrize("bits", [1, 9, -1, 16])
def test_bad_widths_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"head_bits is {bits}; give 2 to 8, or 0 to leave the output head and the embeddings as they came"):
        Recipe(head_bits=bits)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_sizes(made: Make, tiny: Tiny, kind: str) -> None:
    """The quantized part is the layers of the blocks alone; the whole model counts what tables really take."""
    bare, own = made(kind, head_bits=0), made(kind)
    count = 1 if kind == "llama-tied" else 2
    stored = count * (258 * 64 + 258 * 2 * 3)  # bytes: codes; scales and zeros of two groups a row
    checkpoints = [Checkpoint.open(folder) for folder in (bare, own)]
    saved = count * 258 * 64 * 4 - stored
    assert checkpoints[0].other_bytes - checkpoints[1].other_bytes == saved
    assert checkpoints[0].other_weights == checkpoints[1].other_weights
    assert (
        sum(path.stat().st_size for path in bare.glob("*.safetensors")) - sum(path.stat().st_size for path in own.glob("*.safetensors"))
        > saved - 4096
    )
    without, having = describe(bare), describe(own)
    assert without.parameters == having.parameters and without.quantized == having.quantized and without.tables == {}
    assert [without.bits_per_weight(r) for r in (8, 3, 2)] == [having.bits_per_weight(r) for r in (8, 3, 2)]
    before, after = (evaluate(folder, [3], IDS, models.load_dense("it", tiny(kind), None))[:2] for folder in (bare, own))
    assert before[0].file_bytes == after[0].file_bytes and before[0].bits_per_weight_model == after[0].bits_per_weight_model == 32
    assert before[1].bits_per_weight == after[1].bits_per_weight
    assert before[1].bits_per_weight_model - after[1].bits_per_weight_model == pytest.approx(8 * saved / having.parameters)
    estimates = [pipeline.estimate(str(tiny(kind)), replace(RECIPE, head_bits=bits), RunOptions()) for bits in (0, 8)]
    assert estimates[0].file_bytes - estimates[1].file_bytes == saved and estimates[0].bits_per_weight == estimates[1].bits_per_weight


def test_plans_know_nothing_of_tables(made: Make) -> None:
    folder = made("llama")
    checkpoint = Checkpoint.open(folder)
    structure = examine(checkpoint)
    assert structure.head == 0 and examine(Checkpoint.open(made("llama", head_bits=0))).head == 258 * 64
    assert examine(Checkpoint.open(made("llama-tied"))).head == 0
    assert {name for unit in structure.units for name in unit.layers} == set(checkpoint.modules) and HEAD not in checkpoint.modules
    assert model_of(checkpoint, structure).other_bytes == checkpoint.other_bytes
    model = matquant.from_pretrained(folder, 8, keep=8)
    head = model.lm_head.weight_at(8).dense()
    matquant.set_bits(model, 2)
    assert model.lm_head.bits == 8 and torch.equal(model.lm_head.weight_at(8).dense(), head)
    assert {layer.bits for layer in hf.layers_of(model).values()} == {2} and not {HEAD, EMBEDDING} & hf.layers_of(model).keys()
    for load in (lambda plan: matquant.from_pretrained(folder, plan), lambda plan: matquant.set_bits(model, plan)):
        with pytest.raises(PlanError, match="the plan names layer 'lm_head', which the checkpoint does not have"):
            load(BitPlan(8, {HEAD: 2}))


# --- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "gemma3", "opt"])
def test_saving_and_loading(made: Make, kind: str, tmp_path: Path) -> None:
    model = matquant.from_pretrained(made(kind, head_bits=6))
    with torch.no_grad():
        want = model(IDS).logits
    model.tie_weights()  # lm-eval calls it again
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved") == [
        f"{tmp_path / 'saved'} has no MANIFEST.json, so damaged bytes cannot be found; it was not written by matquant quantize, or is incomplete"
    ]
    again = matquant.from_pretrained(tmp_path / "saved")
    names = model.state_dict().keys()
    assert again.state_dict().keys() == names and not [name for name in names if name.startswith("lm_head.") and "tied" in kind]
    plain = matquant.from_pretrained(made(kind, head_bits=6)).dequantize()
    plain.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        for other in (again, twin):
            assert torch.equal(other(IDS).logits, want)
        torch.testing.assert_close(plain(IDS).logits, want)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits, want)
    if kind == "llama-tied":
        del model
        assert twin.lm_head.table is twin.get_input_embeddings()


def test_dtypes_and_classes_without_a_head(made: Make) -> None:
    folder = made("llama-tied")
    for model in (matquant.from_pretrained(folder, 8, dtype="bfloat16"), matquant.from_pretrained(folder, 8).to(torch.bfloat16)):
        assert model.get_input_embeddings()(IDS).dtype == model(IDS).logits.dtype == torch.bfloat16 == model.dtype
        assert model.get_input_embeddings().scale.dtype == torch.float16
    for kind in ("llama", "llama-tied"):
        body, full = AutoModel.from_pretrained(made(kind)), matquant.from_pretrained(made(kind))
        with torch.no_grad():
            assert torch.equal(body(IDS).last_hidden_state, full.base_model(IDS).last_hidden_state)
    ids = full.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=257)
    assert ids.shape == (2, 9)


def test_a_tied_head_cannot_read_an_embedding_that_is_elsewhere(made: Make) -> None:
    model = matquant.from_pretrained(made("llama-tied"))
    model.get_input_embeddings().to("meta")
    with pytest.raises(InputError, match="the embedding is offloaded, and the head is tied to it; give it a device of its own in device_map"):
        model.lm_head(torch.zeros(1, 64))
    with pytest.raises(InputError, match="cannot dequantize a model that is offloaded"):
        model.dequantize()


# --- the format -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_tables_is_of_version_1(made: Make, tiny: Tiny) -> None:
    folder = made("llama-tied", head_bits=0)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == 1 and "tables" not in section and section["modules_to_not_convert"] == [HEAD]
    stored = Checkpoint.open(folder).base[f"{EMBEDDING}.weight"]
    assert torch.equal(stored, models.open_source(str(tiny("llama-tied"))).tensors[f"{EMBEDDING}.weight"])


def test_a_recipe_from_before_there_were_tables_left_them_as_they_came(tiny: Tiny, tmp_path: Path) -> None:
    build_checkpoint(tiny("llama"), tmp_path / "old", Recipe(group_size=32))

    def keep(config: dict[str, Any]) -> None:
        section = config["quantization_config"]
        del section["recipe"]["head_bits"]
        section["recipe_hash"] = hashlib.sha256(json.dumps(section["recipe"], sort_keys=True).encode()).hexdigest()

    edit_json(tmp_path / "old" / "config.json", keep)
    reseal(tmp_path / "old")
    assert Checkpoint.open(tmp_path / "old").recipe == Recipe(group_size=32, head_bits=0)
    with torch.no_grad():
        matquant.from_pretrained(tmp_path / "old", 2)(IDS)
    assert Engine.open(tmp_path / "old", 2).stepper.head.widths == (8,)


def test_the_first_planes_alone_hold_whole_tables(made: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("llama-tied"), tmp_path / "part"))
    for file in folder.glob("model-plane*"):
        file.unlink()
    assert verify(folder) == []
    with torch.no_grad():
        want = matquant.from_pretrained(made("llama-tied"), 2)(IDS).logits
        assert torch.equal(matquant.from_pretrained(folder, 2)(IDS).logits, want)
    torch.testing.assert_close(Engine.open(folder, 2, exact=True).logits(IDS[0]), want[0], rtol=1e-3, atol=1e-4)
    with safe_open(folder / "model-base-00001-of-00001.safetensors", "pt") as file:
        assert {f"{EMBEDDING}.{suffix}" for suffix in ("weight", "scale", "zero", *(f"plane.{k}" for k in range(2, 8)))} <= set(file.keys())


def table(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda section: section["tables"][HEAD].update(values)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 1": (
        lambda s: s.update(format_version=1),
        "format_version is 1, but there are tables, which came with version 2; one of them was edited",
    ),
    "no tables": (lambda s: s.pop("tables"), "tables must map each quantized embedding or head to its bits, group_size and in"),
    "a list": (lambda s: s.update(tables=[HEAD]), "tables must map each quantized embedding or head"),
    "words": (table(bits="8"), "table lm_head: bits is '8'; it must be of type int"),
    "too many bits": (table(bits=9), "table lm_head: bits is 9; allowed: 2 to 8"),
    "other bits": (
        table(bits=4),
        "extra tensor 'lm_head.plane.4': table 'lm_head' of this checkpoint has weight, scale, zero, plane.2, plane.3 only",
    ),
    "bad groups": (table(group_size=7), "table lm_head: group_size 7 does not divide 64 input channels"),
    "other groups": (table(group_size=16), r"lm_head.scale is F16 \[258, 2\]; 64 input channels ask for F16 \[258, 4\]"),
    "no inputs": (table(**{"in": 0}), "table lm_head: in is 0; allowed: 1 to 2"),
    "other inputs": (table(**{"in": 128}), r"lm_head.weight is U8 \[2, 258, 8\]; 128 input channels ask for U8 \[2, 258, 16\]"),
    "both": (lambda s: s["modules"].update({HEAD: 64}), "lm_head is a module and a table; it can be one only"),
    "one more": (lambda s: s["tables"].update({"other": s["tables"][HEAD]}), "tensor 'other.weight' is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, made: Make, tmp_path: Path) -> None:
    change, words = DAMAGE[case]
    folder = Path(shutil.copytree(made("llama"), tmp_path / "damaged"))
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))
    reseal(folder)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder)
    assert verify(folder) != []


def test_values_of_tables_are_checked(made: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(made("llama"), tmp_path / "damaged"))
    file = folder / "model-base-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors[f"{HEAD}.scale"][3, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    reseal(folder)
    assert any("lm_head.scale is not finite everywhere" in problem for problem in verify(folder))
    for reads in (lambda: Engine.open(folder, 2), lambda: matquant.from_pretrained(folder, 2), lambda: Checkpoint.open(folder).table(HEAD)):
        with pytest.raises(CheckpointError, match=r"lm_head\.scale is not finite everywhere"):
            reads()


def test_a_model_that_does_not_fit_its_tables(made: Make, tmp_path: Path) -> None:
    def opened(words: str, change: Callable[[dict[str, Any]], object], kind: str = "llama") -> None:
        folder = Path(shutil.copytree(made(kind), tmp_path / words.replace("/", "")[:20]))
        edit_json(folder / "config.json", change)
        reseal(folder)
        with pytest.raises(CheckpointError, match=words):
            matquant.from_pretrained(folder, 2)

    opened("lm_head is quantized but tied to the embedding; set tie_word_embeddings to false", lambda c: c.update(tie_word_embeddings=True))
    opened("the checkpoint lacks lm_head.weight", lambda c: c.update(tie_word_embeddings=False), "llama-tied")
    opened(r"the table lm_head is \[258, 64\] in the checkpoint but \[300, 64\] in the model", lambda c: c.update(vocab_size=300))


# --- rounding and looking up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_some_rows_at_a_time(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight = Grid(6, 16, symmetric=symmetric, overlap=False), torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(tables, "AT_ONCE", 200)  # four rows
    found = tables.rounded(weight, grid)
    grouped = weight.reshape(37, 3, 16)
    scale, zero = fit_grid(grouped, grid, torch.float16)
    middle = torch.full_like(scale, grid.center) if zero is None else zero
    assert torch.equal(found.codes, nearest_code(grouped / scale[..., None] + middle[..., None], grid).reshape(37, 48))
    assert torch.equal(found.scale, scale.half()) and (zero is None) == (found.zero is None)
    assert zero is None or torch.equal(found.zero, zero.to(torch.uint8))


def test_a_row_of_zeros_is_read_as_zeros(tiny: Tiny) -> None:
    weight = torch.randn(5, 64)
    weight[2] = 0
    for symmetric in (False, True):
        assert not tables.rounded(weight, Grid(8, 32, symmetric=symmetric, overlap=False)).read(8).dense()[2].any()
