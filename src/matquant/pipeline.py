"""quantize(): blocks -> statistics -> method -> checkpoint. Interrupted at any moment, it resumes to the same bytes.

Everything is written to OUT.partial first: the run's identity (run.json), the token windows, one safetensors file for each
finished block, then the checkpoint itself, which is measured, given its report and renamed to OUT. A resumed run takes finished
blocks from their files and only sends the activations through them again; these activations are the same to the bit on the same
number of threads, so the blocks that follow are too.

Calibration activations pass through blocks that are quantized already, one stream for each width that has its own.

Several processes (`accelerate launch -m matquant quantize ...`) share the calibration sequences and the steps of a training; the first of
them reads texts, writes and measures.
"""

import json
import os
import shutil
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matquant import models, overflow, texts
from matquant.blocks import BlockRun, Progress, Silent, is_whole, save_whole
from matquant.card import base_license, model_card
from matquant.checkpoint import Checkpoint, add_files, quantization_config, write, writing_error
from matquant.checkpoint.files import PICKLES, replace_whole, safe_name, sha256_file
from matquant.corpus import Stream
from matquant.errors import InputError, RecipeError, ResourceError, ResumeError, choices
from matquant.estimate import Estimate, estimate_cost
from matquant.evaluate import Protocol as Measured
from matquant.evaluate import check_fits, evaluate
from matquant.plot import errors_svg, quality_svg
from matquant.qat import Training
from matquant.recipe import Recipe
from matquant.report import Report
from matquant.rotate import rotated
from matquant.tables import Found, find_tables, table_tensors
from matquant.train import FORWARD_TOKENS, Means, check_trackers
from matquant.tuning import Tuning, changes, tuned_files
from matquant.working import FINISHED, check_output, claim, clean_up, only_to_clean, saved_report
from matquant.world import ALONE, World

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

IDENTIFYING = (".json", ".jinja", ".md", ".model", ".py", ".txt")  # small files of a model that the result depends on
DTYPES = ("float32", "bfloat16", "float16")
WINDOWS, LOGS = "windows.safetensors", "logs"  # in the working folder


@dataclass(frozen=True)
class RunOptions:
    """How and where to run, which the result does not depend on but for rounding (device, dtype).

    dtype: of weights and activations while calibrating. eval_text: what to report on, instead of held-out calibration text.
    streams_on_disk: keep activations in files of the working folder. gradient_checkpointing: of end-to-end training, where it saves memory.
    forward_tokens: of one forward pass of such a training, at most: with more a GPU is faster, and wants more memory.
    track: who follows it besides the log (train.TRACKERS), in the folder OUT.logs.
    """

    device: str = "cpu"
    dtype: str = "float32"
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False
    eval_text: Path | None = None
    streams_on_disk: bool = False
    gradient_checkpointing: bool = False
    forward_tokens: int = FORWARD_TOKENS
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype is {self.dtype!r}; {choices(self.dtype, DTYPES)}")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise RecipeError(f"device is {self.device!r}; give cpu, cuda or cuda:N") from None
        if self.forward_tokens < 1:
            raise RecipeError(f"forward_tokens is {self.forward_tokens}; it must be at least 1")
        check_trackers(self.track)


def quantize(model: str, out: Path, recipe: Recipe, options: RunOptions, progress: Progress | None = None) -> Report:
    """Quantize `model` (a folder or hub id) into the new folder `out`. Raises MatquantError; leaves OUT.partial to resume from."""
    world = World.join(torch.device(options.device))
    follow = progress if progress is not None and world.first else Silent()
    if out.name in ("", ".."):
        raise InputError(f"the output {out} has no name of its own; give the folder to make, for instance {out / 'matquant'}")
    work = out.with_name(out.name + ".partial")
    if world.once(lambda: options.resume and only_to_clean(out, work, options.overwrite)):
        world.once(lambda: clean_up(work))
        return saved_report(out)
    world.once(lambda: check_output(out, work, options.resume, options.overwrite))
    source = _source(model, recipe, options)
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} holds the model itself, which --overwrite would delete; choose another output folder")
    layers, tables = _parts(source, recipe)
    run = _Run(source, layers, tables, recipe, options, work, follow, world)
    run.check_length()
    with _named_errors(work, "choose another output folder"):
        identity = _identity(source, recipe, options) | {"processes": world.size}
        world.once(lambda: claim(work, identity, recipe, options.resume, options.overwrite))
    for name, reason in layers.skipped:
        follow.line(f"skipped {name}: {reason}")
    if source.note:
        follow.line(source.note)
    try:
        with _named_errors(work, "continue with --resume afterwards"):
            return run.finish(out)
    except InputError:
        if world.first and not any((work / "blocks").glob("*.safetensors")):  # nothing is lost that took long to make
            shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def _named_errors(work: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise writing_error(error, work, advice) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"out of memory ({str(error)[:100]}); use a smaller --num-samples or a machine with more, and --resume") from None


def _source(model: str, recipe: Recipe, options: RunOptions) -> models.Source:
    return rotated(models.open_source(model, options.gguf_file, options.revision, options.trust_remote_code), recipe)


def _parts(source: models.Source, recipe: Recipe) -> tuple[models.Layers, Found]:
    """What is quantized. Raises InputError as models.find_layers."""
    layers, tables = models.find_layers(source.model, recipe), find_tables(source.model, recipe)
    return replace(layers, skipped=(*layers.skipped, *tables.left)), tables


def _identity(source: models.Source, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """What must be equal for a run to be continued, besides the recipe. Raises InputError for weights that are damaged."""
    small = sorted(path for path in source.folder.iterdir() if path.suffix in IDENTIFYING and path.is_file())
    return {
        "model": str(source.folder.resolve()),
        "weights": models.fingerprint(source)[:16],
        **{path.name: sha256_file(path)[0][:16] for path in small},
        "device": options.device,
        "dtype": options.dtype,
        "gguf_file": options.gguf_file,
        "eval_text": str(options.eval_text) if options.eval_text else None,
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("matquant", "torch", "transformers")},
    }


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    source: models.Source
    layers: models.Layers
    tables: Found
    recipe: Recipe
    options: RunOptions
    work: Path
    follow: Progress
    world: World = ALONE

    @property
    def device(self) -> torch.device:
        return self.world.place(torch.device(self.options.device))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.options.dtype)

    @property
    def blocks(self) -> BlockRun:
        return self._blocks(self.work / "blocks")

    @property
    def chosen(self) -> BlockRun:
        """The blocks with the codes that the checkpoint will hold."""
        return self._blocks(self._folder("trained")) if self.recipe.method == "qat" else self.blocks

    def _blocks(self, where: Path) -> BlockRun:
        on_disk = self.options.streams_on_disk
        return BlockRun(self.source, self.layers, self.recipe, where, self.device, self.dtype, self.follow, on_disk, self.world)

    @property
    def _looks_at_text(self) -> bool:
        """Whether any setting wants sequences to calibrate or to train on."""
        return self.blocks.calibrated or self.recipe.method == "qat" or bool(self.recipe.finetune_reads)

    def check_length(self) -> None:
        """Raise InputError if the model has fewer positions than a sequence."""
        if self._looks_at_text or self.recipe.eval_samples:
            check_fits(self.source.model, torch.zeros(1, self.recipe.seq_len, dtype=torch.long))

    def finish(self, out: Path) -> Report:
        """Do what is left to do."""
        checkpoint = self.work / "checkpoint"
        self.world.once(self._choose)
        train, held, protocol = self._windows()
        if self.blocks.calibrated and len(train) < self.world.size:
            raise InputError(f"{len(train)} sequences do not go round among {self.world.size} processes; start fewer, or give more --num-samples")
        if not self.world.same(checkpoint.exists()):
            self._make(checkpoint, train)
        return self.world.once(lambda: self._measure(checkpoint, out, held, protocol))

    def _measure(self, checkpoint: Path, out: Path, held: Tensor | None, protocol: Measured | None) -> Report:
        """Add the report, and rename."""
        manifest = Checkpoint.open(checkpoint).manifest
        if manifest is not None and "report.json" in manifest.files:  # killed before the last rename
            report = saved_report(checkpoint)
        else:
            report = self._report(checkpoint, held, protocol)
            add_files(checkpoint, self._report_files(report))
        if os.path.lexists(out):  # --overwrite: the former folder is out of the way for the blink of an eye
            shutil.rmtree(self.work / "replaced", ignore_errors=True)
            os.rename(out, self.work / "replaced")
        replace_whole(self.work / FINISHED, b"")
        os.rename(checkpoint, out)
        clean_up(self.work)
        return report

    def _make(self, checkpoint: Path, train: Tensor) -> None:
        """Quantize, train and tune, and write what came of it."""
        stored = {*self.layers.quantized, *self.tables.tables}
        base = [name for name in models.own_tensors(self.source.model) if name.removesuffix(".weight") not in stored]
        dtype = self._expanded(base)
        config = self._config() | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})
        self.blocks.quantize(train)
        if self.recipe.method == "qat":
            self._train(train)
        if self.recipe.finetune_reads:
            self._tune(train)
        self.world.once(lambda: self._write(checkpoint, base, dtype, config))

    def _write(self, checkpoint: Path, base: list[str], dtype: torch.dtype | None, config: dict[str, Any]) -> None:
        self.follow("writing", 0, 1)
        chosen = (models.SafetensorsFiles(made) for made in (self._tuned, self.chosen.files))  # of two tensors with one name the first counts
        tables = table_tensors(self.source.tensors, self.tables.tables)
        write(checkpoint, ChainMap(*chosen, tables, models.Subset(self.source.tensors, base, dtype)), config, self._files())
        self.follow("writing", 1, 1)

    @property
    def _tuned(self) -> list[Path]:
        return tuned_files(self.work / "tuning", self.recipe)

    def _tune(self, train: Tensor) -> None:
        where = self._folder("tuning")
        weights = {name: self.chosen.weight(name) for name in self.layers.quantized}
        held, stream = self._training_text(train)
        Tuning(self._source, self._dense, weights, self.recipe, where, self._means, held, stream, self.follow).run()

    def _train(self, train: Tensor) -> None:
        _, stream = self._training_text(train)
        where, start, result = self._folder("training"), self.blocks, self.chosen
        Training(self._source, self._dense, start, result, self.recipe, where, self._means, stream, self.follow).run()

    @property
    def _means(self) -> Means:
        options, tracks = self.options, self.work.with_name(self.work.name.removesuffix(".partial") + ".logs")
        saving = options.gradient_checkpointing, options.forward_tokens
        return Means(self.device, self.dtype, self.work / LOGS, tracks, *saving, options.track, self.world)

    def _training_text(self, train: Tensor) -> tuple[Tensor, Stream]:
        reported = 0 if self.options.eval_text is not None else self.recipe.eval_samples
        return texts.training_text(self.recipe, self.source.tokenizer(), train, reported)

    def _source(self) -> models.Source:
        """Opened again: blocks that were quantized have given their memory back."""
        return _source(self.source.name, self.recipe, self.options)

    def _folder(self, name: str) -> Path:
        (self.work / name).mkdir(exist_ok=True)  # of all processes, whichever comes first
        return self.work / name

    def _report_files(self, report: Report) -> dict[str, bytes]:
        plot = quality_svg(report.rows)
        errors = errors_svg(report.layers, report.outputs)
        files = {name: image for name, image in (("quality.svg", plot), ("errors.svg", errors)) if image}
        if report.rows and not plot:
            self.follow.line("no plot: it needs matplotlib (pip install 'matquant[plot]')")
        card = model_card(report, base_license(self.source.folder), files)
        files |= {log.name: log.read_bytes() for log in sorted((self.work / LOGS).glob("*.jsonl"))}
        return files | {"report.json": report.to_json(), "README.md": card.encode()}

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Make the file of the sequences, once; it is kept for a resumed run."""
        path = self.work / WINDOWS
        if not path.exists():
            count = self.recipe.num_samples if self._looks_at_text else 0
            chosen = texts.choose(self.source, self.recipe, count, self.options.eval_text, self._dense, self.follow)
            for part in (chosen.train, chosen.held):
                if len(part):
                    check_fits(self.source.model, part)
            if len(chosen.train) < count:
                self.follow.line(f"{self.recipe.calibration} has text for {len(chosen.train)} of {count} sequences to calibrate on")
            save_whole(path, {"train": chosen.train, "held": chosen.held}, {"bos": json.dumps(chosen.leads), "text": chosen.words})
        if not is_whole(path):
            raise ResumeError(f"{path} is damaged; start over with --overwrite")

    def _windows(self) -> tuple[Tensor, Tensor | None, Measured | None]:
        """(calibration windows, held-out windows, how they are measured)."""
        path = self.work / WINDOWS
        saved = models.SafetensorsFiles([path])
        notes = saved.metadata(path)
        held = saved["held"]
        if not len(held):
            return saved["train"], None, None
        return saved["train"], held, Measured.of(held, json.loads(notes["bos"]), notes["text"])

    def _dense(self) -> Any:
        return models.load_dense(self.source.name, self.source.folder, self.source.gguf_file, self.options.trust_remote_code, self.dtype).to(
            self.device
        )

    # --- the folder -------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        config = json.loads(self.source.model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(self.source.model).__name__]
        linears = [name for name, module in self.source.model.named_modules() if isinstance(module, nn.Linear | models.Conv1D)]
        left = [name for name in linears if name not in self.layers.quantized and name not in self.tables.held]
        config["quantization_config"] = quantization_config(self.recipe, self.layers.quantized, left, tables=self.tables.tables)
        return config

    def _expanded(self, base: list[str]) -> torch.dtype | None:
        """What to store floats as that were float32 only because GGUF's blocks were expanded; None: as they are."""
        if self.source.gguf_file is None:
            return None
        largest = max(self.source.tensors[name].abs().max().item() for name in base)
        return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16

    def _files(self) -> dict[str, bytes]:
        if self.source.gguf_file is None:
            patterns = (*COPIED, "*.py") if self.options.trust_remote_code else COPIED
            found = [path for pattern in patterns for path in sorted(self.source.folder.glob(pattern)) if path.is_file()]
            return {path.name: path.read_bytes() for path in found if safe_name(path.name) and not path.name.endswith(PICKLES)}
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
        return Report(
            self.source.name,
            hub_id,
            self.recipe,
            rows,
            protocol,
            self.blocks.reports(),
            self.layers.skipped,
            self.blocks.outputs(),
            changes(self._tuned),
            overflow.costs((self.chosen.weight(name) for name in self.layers.quantized), self.recipe.bits),
        )


# --- what a run would cost ------------------------------------------------------------------------------------------


def estimate(model: str, recipe: Recipe, options: RunOptions) -> Estimate:
    """Sizes by arithmetic, time and memory by a rough model. Writes nothing. Raises as `quantize` for a bad model or recipe."""
    source = _source(model, recipe, options)
    layers, tables = _parts(source, recipe)
    _Run(source, layers, tables, recipe, options, Path(), Silent()).check_length()
    return estimate_cost(source, layers, recipe, tables.tables)
