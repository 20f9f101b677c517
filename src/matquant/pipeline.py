"""quantize(): blocks -> statistics -> method -> checkpoint. Interrupted at any moment, it resumes to the same bytes.

Everything is written to OUT.partial first: the run's identity (run.json), the token windows, one safetensors file for each
finished block, then the checkpoint itself, which is measured, given its report and renamed to OUT. A resumed run takes finished
blocks from their files and only sends the activations through them again; these activations are the same to the bit on the same
number of threads, so the blocks that follow are too.

Calibration activations pass through blocks that are quantized already, read at the widest target: the classic method sees its
own drift, the nested one that of its best width.
"""

import json
import os
import shutil
from collections import ChainMap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matquant import calibration, models
from matquant.blocks import BlockRun, Progress, Silent, replace_whole, save_whole
from matquant.card import base_license, model_card
from matquant.checkpoint import add_files, quantization_config, write, writing_error
from matquant.errors import InputError, ResumeError
from matquant.estimate import Estimate, estimate_cost
from matquant.evaluate import Protocol as Measured
from matquant.evaluate import evaluate, windows
from matquant.plot import quality_svg
from matquant.recipe import Recipe
from matquant.report import Report

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)

FINISHED = "finished"  # in the working folder: all that is left to do is to rename and to clean up


@dataclass(frozen=True)
class RunOptions:
    """How and where to run, which the result does not depend on but for rounding (device, dtype).

    dtype: of weights and activations while calibrating. eval_text: what to report on, instead of held-out calibration text.
    """

    device: str = "cpu"
    dtype: str = "float32"
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False
    eval_text: Path | None = None


def quantize(model: str, out: Path, recipe: Recipe, options: RunOptions, progress: Progress | None = None) -> Report:
    """Quantize `model` (a folder or hub id) into the new folder `out`. Raises MatquantError; leaves OUT.partial to resume from."""
    follow = progress or Silent()
    if options.resume and (out.with_name(out.name + ".partial") / FINISHED).exists() and out.exists():  # killed while cleaning up
        shutil.rmtree(out.with_name(out.name + ".partial"))
        return Report.from_dict(json.loads((out / "report.json").read_text()))
    torch.manual_seed(recipe.seed)
    work = out.with_name(out.name + ".partial")
    _check_output(out, work, options)
    source = models.open_source(model, options.gguf_file, options.revision, options.trust_remote_code)
    layers = models.find_layers(source.model, recipe)
    try:
        _claim(work, _identity(source, recipe, options), recipe, options)
        for name, reason in layers.skipped:
            follow.line(f"skipped {name}: {reason}")
        if source.note:
            follow.line(source.note)
        return _Run(source, layers, recipe, options, work, follow).finish(out)
    except OSError as error:
        raise writing_error(error, work, "continue with --resume afterwards") from None


# --- the working folder ---------------------------------------------------------------------------------------------


def _check_output(out: Path, work: Path, options: RunOptions) -> None:
    if os.path.lexists(out) and not options.overwrite:
        raise InputError(f"{out} exists already; choose another output folder, or replace it with --overwrite")
    if work.exists() and not (options.resume or options.overwrite):
        raise InputError(f"{work} holds an interrupted run; continue it with --resume, or start over with --overwrite")
    if options.resume and not work.exists():
        raise ResumeError(f"nothing to resume: there is no {work}; start without --resume")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to put {out.name} into; create it first")


def _identity(source: models.Source, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """What must be equal for a run to be continued, besides the recipe."""
    files = {path.name: path.stat().st_size for path in sorted(source.folder.iterdir()) if path.suffix in (".safetensors", ".gguf", ".json")}
    return {
        "model": str(source.folder.resolve()),
        "files": files,
        "device": options.device,
        "dtype": options.dtype,
        "gguf_file": options.gguf_file,
        "eval_text": str(options.eval_text) if options.eval_text else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _claim(work: Path, identity: dict[str, Any], recipe: Recipe, options: RunOptions) -> None:
    """Make the working folder, or take over the one of an equal run. Raises ResumeError with the differences."""
    if options.overwrite and not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    record = {"identity": identity, "recipe": recipe.to_dict()}
    if options.resume and (work / "run.json").exists():
        before = json.loads((work / "run.json").read_text())
        changed = Recipe.from_dict(before["recipe"]).differences(recipe)
        changed += [f"{key}: {before['identity'].get(key)} -> {value}" for key, value in identity.items() if before["identity"].get(key) != value]
        if changed:
            raise ResumeError(f"{work} is a run with other settings ({'; '.join(changed)}); use the same, or start over with --overwrite")
        return
    work.mkdir(exist_ok=True)
    (work / "blocks").mkdir(exist_ok=True)
    replace_whole(work / "run.json", json.dumps(record, indent=1).encode())


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    source: models.Source
    layers: models.Layers
    recipe: Recipe
    options: RunOptions
    work: Path
    follow: Progress

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.options.dtype)

    @property
    def blocks(self) -> BlockRun:
        return BlockRun(self.source, self.layers, self.recipe, self.work / "blocks", self.device, self.dtype, self.follow)

    def finish(self, out: Path) -> Report:
        base = [name for name in models.own_tensors(self.source.model) if name.removesuffix(".weight") not in self.layers.quantized]
        checkpoint = self.work / "checkpoint"
        train, held, protocol = self._windows()
        if not checkpoint.exists():
            self.blocks.quantize(train)
            self.follow("writing", 0, 1)
            tensors = ChainMap(models.SafetensorsFiles(self.blocks.files), models.Subset(self.source.tensors, base))
            write(checkpoint, tensors, self._config(), self._files())
            self.follow("writing", 1, 1)
        report = self._report(checkpoint, held, protocol)
        plot = quality_svg(report.rows)
        files = {"quality.svg": plot} if plot else {}
        if report.rows and not plot:
            self.follow.line("no plot: it needs matplotlib (pip install 'matquant[plot]')")
        card = model_card(report, base_license(self.source.folder), next(iter(files), None))
        files |= {"report.json": report.to_json(), "README.md": card.encode()}
        add_files(checkpoint, files)
        if self.options.overwrite and out.exists():
            shutil.rmtree(out)
        replace_whole(self.work / FINISHED, b"")
        os.rename(checkpoint, out)
        shutil.rmtree(self.work)
        return report

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _windows(self) -> tuple[Tensor, Tensor | None, Measured | None]:
        """(calibration windows, held-out windows, how they are measured); made once and kept for a resumed run."""
        path = self.work / "windows.safetensors"
        if not path.exists():
            train, held, bos, words = self._make_windows()
            save_whole(path, {"train": train, "held": held}, {"bos": json.dumps(bos), "text": words})
        saved = models.SafetensorsFiles([path])
        notes = saved.metadata(path)
        held = saved["held"]
        if not len(held):
            return saved["train"], None, None
        return saved["train"], held, Measured.of(held, json.loads(notes["bos"]), notes["text"])

    def _make_windows(self) -> tuple[Tensor, Tensor, int | None, str]:
        recipe, wanted = self.recipe, self.recipe.eval_samples
        tokenizer = self.source.tokenizer()
        bos = calibration.leading_token(tokenizer)
        train_count = recipe.num_samples if self.blocks.calibrated else 0
        external = self._external_windows(tokenizer, bos) if self.options.eval_text and wanted else None
        held_count = 0 if external is not None else wanted
        if train_count + held_count == 0:
            empty = torch.zeros(0, recipe.seq_len, dtype=torch.long)
            return empty, empty if external is None else external, bos, str(self.options.eval_text)
        if recipe.calibration == "self":
            sampled, start = self._sample(tokenizer, train_count + held_count)
            train, held = sampled[:train_count], sampled[train_count:]
            bos, words = start, f"sampled from the original, seed {recipe.seed}, not calibrated on"
        else:
            tokens = calibration.token_stream(tokenizer, calibration.read_texts(recipe.calibration))
            train, held = calibration.choose_windows(tokens, recipe.seq_len, train_count, held_count, recipe.seed, recipe.calibration, bos)
            words = f"{recipe.calibration}, the part not calibrated on"
        return (train, held, bos, words) if external is None else (train, external, bos, str(self.options.eval_text))

    def _external_windows(self, tokenizer: Any, bos: int | None) -> Tensor:
        tokens = calibration.token_stream(tokenizer, calibration.read_texts(str(self.options.eval_text)))
        return windows(tokens, self.recipe.seq_len, bos, self.recipe.eval_samples)

    def _sample(self, tokenizer: Any, count: int) -> tuple[Tensor, int]:
        start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
        model = self._dense()
        follow = lambda done, of: self.follow("sampling text", done, of)  # noqa: E731
        return calibration.sample_windows(model, start, count, self.recipe.seq_len, self.recipe.seed, follow), start

    def _dense(self) -> Any:
        return models.load_dense(self.source.name, self.source.folder, self.source.gguf_file, self.options.trust_remote_code, self.dtype).to(
            self.device
        )

    # --- the folder -------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        config = json.loads(self.source.model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(self.source.model).__name__]
        linears = [name for name, module in self.source.model.named_modules() if isinstance(module, nn.Linear | models.Conv1D)]
        left = [name for name in linears if name not in self.layers.quantized]
        config["quantization_config"] = quantization_config(self.recipe, self.layers.quantized, left)
        return config

    def _files(self) -> dict[str, bytes]:
        if self.source.gguf_file is None:
            return {path.name: path.read_bytes() for pattern in COPIED for path in sorted(self.source.folder.glob(pattern)) if path.is_file()}
        folder = self.work / "tokenizer"
        self.source.tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}

    def _report(self, checkpoint: Path, held: Tensor | None, protocol: Measured | None) -> Report:
        rows = ()
        if held is not None:
            follow = lambda done, of: self.follow("measuring", done, of)  # noqa: E731
            rows = tuple(
                evaluate(checkpoint, self.recipe.bits, held, self._dense(), dtype=self.dtype, device_map=self.options.device, progress=follow)
            )
        hub_id = None if Path(self.source.name).exists() else self.source.name
        return Report(self.source.name, hub_id, self.recipe, rows, protocol, self.blocks.reports(), self.layers.skipped)


# --- what a run would cost ------------------------------------------------------------------------------------------


def estimate(model: str, recipe: Recipe, options: RunOptions) -> Estimate:
    """Sizes by arithmetic, time and memory by a rough model. Writes nothing. Raises as `quantize` for a bad model or recipe."""
    source = models.open_source(model, options.gguf_file, options.revision, options.trust_remote_code)
    layers = models.find_layers(source.model, recipe)
    return estimate_cost(source, layers, recipe)
