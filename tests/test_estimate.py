"""--dry-run: sizes by arithmetic are those of the finished folder, nothing is written, bad input is refused as by a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from matquant import estimate, models, pipeline
from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.pipeline import RunOptions
from matquant.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_collect")

ROUNDED = Recipe(method="minmax", clip_search=False, refit_bits=0, eval_samples=0, group_size=16)
Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("llama", replace(ROUNDED, symmetric=True)),
        ("llama-tied", replace(ROUNDED, group_size=-1, symmetric=False, scale_dtype="float32")),
        ("gpt2", replace(ROUNDED, parent_bits=4, bits=(4, 3, 2), targets={4: 1.0}, slicing="round")),
        ("mixtral", ROUNDED),
        ("llama", replace(ROUNDED, refit_bits=4, calibration="TEXT", num_samples=1, seq_len=16, skip=("lm_head", "*.mlp.*"))),
    ],
)
def test_sizes_are_those_of_the_folder(name: str, recipe: Recipe, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, calibration=str(text) if recipe.calibration == "TEXT" else "self")
    found = pipeline.estimate(str(tiny(name)), recipe, RunOptions())
    assert not list(tmp_path.iterdir())
    report = pipeline.quantize(str(tiny(name)), tmp_path / "out", recipe, RunOptions())
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert found.layers == len(checkpoint.modules) and found.skipped == report.skipped
    weights = sum(shape.weights for shape in checkpoint.modules.values())
    assert found.weights == weights and tuple(found.read_bytes) == recipe.bits
    stored = list((tmp_path / "out").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in stored)
    assert found.file_bytes == sum(path.stat().st_size for path in stored) - headers
    for bits in recipe.bits:
        assert found.read_bytes[bits] == sum(recipe.layout.read_bits(shape, bits) for shape in checkpoint.modules.values()) // 8
        assert found.bits_per_weight[bits] == pytest.approx(8 * found.read_bytes[bits] / weights, abs=1e-3)
        assert bits < found.bits_per_weight[bits] < bits + 6
    assert found.memory_bytes > 0 and found.seconds > 0


def test_more_work_costs_more(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_speed", lambda: (1e-9, 1e-9))  # of this machine at this moment otherwise

    def of(recipe: Recipe, name: str = "llama") -> estimate.Estimate:
        return pipeline.estimate(str(tiny(name)), recipe, RunOptions())

    gptq, text = Recipe(group_size=16, seq_len=64), replace(Recipe(group_size=16, seq_len=64, eval_samples=0), calibration="a.txt")
    assert of(gptq).seconds > of(replace(gptq, clip_search=False)).seconds > of(replace(gptq, clip_search=False, method="minmax")).seconds
    assert of(gptq).seconds > of(replace(gptq, eval_samples=0)).seconds > of(text).seconds
    for method in ("block", "omniquant", "qat"):
        assert of(replace(gptq, method=method)).seconds > of(replace(gptq, method="minmax")).seconds
        assert of(replace(gptq, method=method, finetune_reads=100_000)).seconds > of(replace(gptq, method=method)).seconds
    omniquant = replace(gptq, method="omniquant")
    qat = replace(gptq, method="qat")
    for learned in (omniquant, qat):  # a teacher that is a target runs anyway
        assert of(replace(learned, teachers={2: 7})).seconds > of(replace(learned, teachers={2: 8})).seconds == of(learned).seconds
    assert of(replace(qat, teachers={2: 0})).seconds > of(qat).seconds > of(replace(qat, random_width=True)).seconds
    assert of(replace(gptq, num_samples=64)).memory_bytes > of(gptq).memory_bytes > of(text).memory_bytes
    assert of(text, "mixtral").memory_bytes > of(text).memory_bytes


def test_what_gguf_expands_is_stored_in_16_bits(tiny: Tiny) -> None:
    source = models.open_source(str(tiny("llama")))
    layers = models.find_layers(source.model, ROUNDED)
    full, half = (estimate.estimate_cost(each, layers, ROUNDED, {}).file_bytes for each in (source, replace(source, gguf_file="a.gguf")))
    assert full - half == 2 * (2 * 258 * 64 + 5 * 64)  # embeddings, head, five norms


def test_bad_input_is_refused(tiny: Tiny) -> None:
    for model, recipe, words in [
        ("nobody/nothing-here", ROUNDED, "no model 'nobody/nothing-here'"),
        (str(tiny("llama")), replace(ROUNDED, group_size=48), "group size 48 does not divide 64"),
        (str(tiny("llama")), replace(ROUNDED, skip=("*",)), "nothing to quantize"),
        (str(tiny("llama")), Recipe(group_size=16), "sequences of 512 tokens, but the model has 128 positions"),
    ]:
        with pytest.raises(InputError, match=words):
            pipeline.estimate(model, recipe, RunOptions())
