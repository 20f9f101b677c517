"""quantize() from a folder to a folder: every architecture, equal bytes for equal runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES
from runs import FAST, IDS, RESUME, SMALL, Crash, Edited, Lines, Tiny, crash_at, partial, sums
from torch import Tensor

import matquant
from matquant import activations, calibration, models
from matquant.checkpoint import Checkpoint, files, verify
from matquant.pipeline import RunOptions, quantize
from matquant.plan import Shape
from matquant.recipe import Recipe
from matquant.report import Report

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    targets = {8: 100.0, 4: 2.0, 2: 1.0}
    recipe = Recipe(
        group_size=16, bits=(8, 4, 2), targets=targets, calibration=str(text), clip_search=False, num_samples=2, seq_len=40, eval_samples=1
    )
    follow, out = Lines(), tmp_path / "out"
    report = quantize(str(tiny(name)), out, recipe, RunOptions(), follow)
    assert verify(out) == [] and not partial(out).exists()
    kl = {row.label: row.kl for row in report.rows}
    assert list(kl) == ["32", "8", "4", "2"] and kl["8"] < 1e-4 and kl["8"] < kl["4"] < kl["2"] < 0.1
    checkpoint = Checkpoint.open(out)
    assert sorted(layer.name for layer in report.layers) == sorted(checkpoint.modules)
    assert all(layer.errors[8] < layer.errors[4] < layer.errors[2] < 1 for layer in report.layers)
    skipped = [line for line in follow.lines if line.startswith("skipped ")]
    assert skipped == [f"skipped {module}: {reason}" for module, reason in report.skipped] and bool(skipped) == (name == "mixtral")

    dense = models.load_dense("it", tiny(name), None, dtype=torch.float32)
    with torch.no_grad():
        original = dense(IDS).logits
    for table, found in checkpoint.tables.items():
        dense.get_submodule(table).weight.data = checkpoint.table(table).read(found.bits).dense()  # of a tied head too
    model = matquant.from_pretrained(out, 8)
    for bits in (8, 2):
        matquant.set_bits(model, bits)
        for module in checkpoint.modules:
            layer = dense.get_submodule(module)
            layer.weight.data = models.held_as(layer, checkpoint.read(module).read(bits).dense())
        with torch.no_grad():
            logits = model(IDS).logits
            torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
        p, q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < {8: 1e-4, 2: 0.1}[bits]


def test_the_folder(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    follow, out = Lines(), tmp_path / "out"
    report = quantize(str(tiny("llama")), out, recipe, RunOptions(), follow)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "README.md", "report.json", "tokenizer.json", "generation_config.json", "MANIFEST.json"} <= names
    assert not any(name.startswith(".") or "partial" in name for name in names)
    assert str(tmp_path) not in (out / "report.json").read_text() + (out / "README.md").read_text() + (out / "config.json").read_text().replace(
        recipe.calibration, ""
    )
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert config["quantization_config"]["modules_to_not_convert"] == []
    saved = Report.from_dict(json.loads((out / "report.json").read_text()))
    assert saved.rows == report.rows and saved.layers == report.layers and saved.outputs == report.outputs
    assert len(report.outputs) == 2 and all(0 < output[3] < output[2] < 1 for output in report.outputs)
    assert report.protocol is not None and report.protocol.text == f"{recipe.calibration}, the part not calibrated on"
    assert saved.protocol == replace(report.protocol, text="calibration.txt, the part not calibrated on")
    assert report.rows[1].file_bytes == Checkpoint.open(out).bytes_for(3) - sum((out / n).stat().st_size for n in ("README.md", "report.json")) - (
        (out / "MANIFEST.json").stat().st_size - manifest_before(out)
    )
    assert {stage for stage, _, _ in follow.stages} == {"quantizing", "writing", "measuring"}
    assert "no plot: it needs matplotlib (pip install 'matquant[plot]')" in follow.lines


def manifest_before(out: Path) -> int:
    """Size of MANIFEST.json before the report and the card came in."""
    manifest = files.Manifest.load(out)
    assert manifest is not None
    return len(files.Manifest({name: entry for name, entry in manifest.files.items() if name not in ("README.md", "report.json")}).to_bytes())


def test_plot_and_license(edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = edited("llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# model\n")
    quantize(str(folder), tmp_path / "out", recipe, RunOptions())
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"<?xml") for name in ("quality.svg", "errors.svg"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "(quality.svg)" in card and "(errors.svg)" in card and verify(tmp_path / "out") == []


def test_equal_runs_give_equal_bytes(tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path) -> None:
    torch.rand(5)  # whatever state the process is in
    quantize(str(tiny("llama")), tmp_path / "again", recipe, RunOptions())
    assert sums(tmp_path / "again") == sums(want)


def test_streams_on_disk_give_equal_bytes(tiny: Tiny, recipe: Recipe, want: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without and with an interruption, and with the streams where they were not before: that is no other run."""
    options = RunOptions(streams_on_disk=True)
    quantize(str(tiny("llama")), tmp_path / "again", recipe, options)
    assert sums(tmp_path / "again") == sums(want)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(activations, "propagate", 2, patch)
        quantize(str(tiny("llama")), out, recipe, options)
    assert {path.name for path in (partial(out) / "blocks").glob("stream*")} == {
        *(f"stream-{width}.bin" for width in (0, 2, 3)),
        "stream-original-inputs.bin",
    }
    quantize(str(tiny("llama")), out, recipe, RESUME)
    assert sums(out) == sums(want) and not partial(out).exists()


def test_sampled_calibration(tiny: Tiny, tmp_path: Path) -> None:
    own = replace(SMALL, calibration="self", num_samples=3, eval_samples=2)
    follow = Lines()
    one, _, other = (quantize(str(tiny("llama")), tmp_path / str(i), r, RunOptions(), follow) for i, r in enumerate([own, own, replace(own, seed=1)]))
    assert sums(tmp_path / "0") == sums(tmp_path / "1")
    assert one.rows != other.rows and one.layers != other.layers
    protocol = one.protocol
    assert protocol is not None and (protocol.sequences, protocol.seq_len, protocol.tokens) == (2, 16, 30)
    assert protocol.text == "sampled from the original, seed 0, not calibrated on" and protocol.bos == "token 256 leads every sequence"
    assert ("sampling text", 16, 16) in follow.stages


def test_rounding_to_nearest_needs_no_text(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((activations, "record"), (calibration, "read_texts"), (calibration, "sample_windows")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("calibrated"))
    report = quantize(str(tiny("llama")), tmp_path / "out", replace(FAST, seq_len=4000), RunOptions())
    assert report.rows == () and report.protocol is None and len(report.layers) == 14 and verify(tmp_path / "out") == []
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()


def test_extra_precision_is_counted_in_truth(tiny: Tiny, tmp_path: Path) -> None:
    report = quantize(
        str(tiny("llama")),
        tmp_path / "out",
        replace(FAST, parent_bits=4, bits=(4, 2), targets={4: 1.0, 2: 1.0}, slicing="round-overflow"),
        RunOptions(),
    )
    share, stored = report.overflow[2]
    assert list(report.overflow) == [2] and 0 < share < 0.2
    assert stored > 2 + 5 * share + 1 / 16
    assert Checkpoint.open(tmp_path / "out").layout.read_bits(Shape(64, 32), 2) == 64 * (32 * 3 + 16 + 8)
    assert f"{2 + share:.2f} at 2 bits ({stored:.2f} stored sparsely)" in (tmp_path / "out" / "README.md").read_text()


def test_rounding_to_nearest_can_be_measured(tiny: Tiny, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "record", lambda *args: pytest.fail("calibrated"))
    report = quantize(str(tiny("llama")), tmp_path / "out", replace(recipe, method="minmax", refit_bits=0, eval_samples=3), RunOptions())
    assert report.protocol is not None and report.protocol.sequences == 3 and len(report.rows) == 3


def test_a_text_of_its_own_for_the_report(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Quite another text. " * 20)
    reports = {}
    for calibrated in (recipe, replace(recipe, method="minmax", refit_bits=0)):
        for wanted in (2, 0):
            options = RunOptions(eval_text=other, overwrite=True)
            report = reports[calibrated.method, wanted] = quantize(
                str(tiny("llama")), tmp_path / "out", replace(calibrated, eval_samples=wanted), options
            )
            assert bool(report.rows) == bool(report.protocol) == bool(wanted)
    for method in ("gptq", "minmax"):
        protocol = reports[method, 2].protocol
        assert protocol is not None and (protocol.text, protocol.sequences) == (str(other), 2)
    assert reports["gptq", 2].layers == reports["gptq", 0].layers


def test_short_calibration_is_told(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    short, follow = tmp_path / "short.txt", Lines()
    short.write_text("x" * 16 * 5)
    report = quantize(
        str(tiny("llama")), tmp_path / "out", replace(recipe, calibration=str(short), num_samples=32, eval_samples=8), RunOptions(), follow
    )
    assert f"{short} has text for 4 of 32 sequences to calibrate on" in follow.lines
    assert report.protocol is not None and report.protocol.sequences == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_calculating_in_16_bits(dtype: str, edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    folder = edited("llama", {"dtype": "bfloat16"}, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    report = quantize(str(folder), tmp_path / "out", recipe, RunOptions(dtype=dtype))
    assert report.rows[0].label == "16" and report.rows[1].kl is not None and 0 < report.rows[1].kl < 0.1
    assert {tensor.dtype for tensor in Checkpoint.open(tmp_path / "out").base.values()} == {torch.bfloat16}
    assert verify(tmp_path / "out") == []


def test_dead_inputs_and_overflow_are_notes_in_the_report(edited: Edited, recipe: Recipe, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25

    out = tmp_path / "out"
    report = quantize(str(edited("llama", change=change)), out, replace(recipe, clip_search=True, scale_dtype="float32"), RunOptions())
    notes = {layer.name: layer.notes for layer in report.layers if layer.notes}
    assert notes == {
        "model.layers.0.mlp.down_proj": ("3 of 96 inputs are always 0: their weights are rounded to nearest",),
        "model.layers.1.mlp.down_proj": ("the Hessian is not finite: rounded to nearest",),
    }
    assert verify(out) == [] and all(row.kl is not None and row.kl < 1 for row in report.rows)


def test_remote_code_travels_with_the_checkpoint(edited: Edited, tmp_path: Path) -> None:
    folder = edited("llama")
    (folder / "own.py").write_text("")
    (folder / "tokenizer (1).json").write_text("{}")
    for trusted in (False, True):
        quantize(str(folder), tmp_path / "out", FAST, RunOptions(trust_remote_code=trusted, overwrite=True))
        assert (tmp_path / "out" / "own.py").exists() == trusted and verify(tmp_path / "out") == []
