"""Learned methods on a whole model, at every width, all variants of a method on the same tokens and as many of them.

    python benchmarks/learned.py MODEL --name WORDS --out results.json --group-size 64 --calibration FILE --train FILE --text FILE [--text FILE ...]
        [--tokens 1000000] [--eval-samples 16] [--seq-len 512] [--seeds 0 1 2] [--only NAME ...] [--widths 8 6 4 3 2]

A run that is killed goes on where it was: what it has done lies beside --out until its rows are written, all of them. Several processes may share --out
if each has variants, or with --widths runs of dedicated variants, of its own; rows are then of the widths that are done.

Variants are the rows of VARIANTS: MatQuant on two base algorithms and what it compares with, and our post-training methods, alone and with their
reads tuned. A variant and seed that is already in the output file is not run again. A width's baseline is a run whose parent has that width.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import command
from quality import evaluation, machine

from matquant import models
from matquant.checkpoint.files import replace_whole
from matquant.errors import MatquantError
from matquant.evaluate import evaluate
from matquant.pipeline import RunOptions, quantize
from matquant.plan import BitPlan
from matquant.recipe import Recipe
from matquant.working import saved_report

WIDTHS = (8, 6, 4, 3, 2)
DONE = "rows.json"  # in a run's folder, at its end
LAMBDA = {8: 0.1, 4: 0.1, 2: 1.0}
PAPER = {"bits": WIDTHS, "slicing": "round", "refit_bits": 0, "asymmetric_calibration": 0.0, "normalize": False}
# Not as in the paper: ranges are searched before they learn, and rates are higher, because budgets here are thousands of times smaller. Tokens
# count over the root of their power: as they are, a first token of huge norm is all that counts; wholly relative, it counts next to nothing.
OMNIQUANT = PAPER | {"method": "omniquant", "token_power": 0.5}
QAT = PAPER | {"method": "qat", "learning_rate": 5e-4}
OURS = {"bits": WIDTHS}


@dataclass(frozen=True)
class Variant:
    """settings: of the recipe. dedicated: one run for each width."""

    words: str
    settings: dict[str, Any]
    dedicated: bool = False


def family(base: str, words: str, settings: dict[str, Any]) -> dict[str, Variant]:
    """What the paper compares, for one base algorithm."""
    return {
        f"{base}-baseline": Variant(f"{words}, one run a width", settings, dedicated=True),
        f"{base}-sliced": Variant(f"{words}, 8 bits sliced", settings | {"targets": {8: 1.0}}),
        f"{base}-matquant": Variant(f"MatQuant, {words}", settings | {"targets": LAMBDA}),
        f"{base}-single": Variant(f"MatQuant, {words}, Single Precision 2", settings | {"targets": {2: 1.0}}),
        f"{base}-extra": Variant(
            f"MatQuant, {words}, Extra Precision", settings | {"targets": {8: 1.0, 4: 1.0, 2: 1.0}, "slicing": "round-overflow"}
        ),
        f"{base}-8to2": Variant(f"MatQuant, {words}, [8, 4, 2, 8 -> 2]", settings | {"targets": LAMBDA, "teachers": {2: 8}}),
        f"{base}-8to4-2": Variant(f"MatQuant, {words}, [8, 4, 2, 8 -> 4; 2]", settings | {"targets": LAMBDA, "teachers": {4: 8, 2: 8}}),
        f"{base}-only-8to2": Variant(f"MatQuant, {words}, [8, 4, 8 -> 2]", settings | {"targets": LAMBDA, "teachers": {2: 8}, "teachers_only": True}),
    }


VARIANTS = {
    **family("omniquant", "OmniQuant", OMNIQUANT),
    "omniquant-one-stream": Variant("MatQuant, OmniQuant, one stream of activations", OMNIQUANT | {"targets": LAMBDA, "streams": (8,)}),
    **family("qat", "QAT", QAT),
    "qat-weights": Variant("MatQuant, QAT, weights alone", QAT | {"targets": LAMBDA, "learn_scales": False}),
    "qat-balanced": Variant("MatQuant, QAT, balanced gradients", QAT | {"targets": LAMBDA, "balance_gradients": True}),
    "qat-random": Variant("MatQuant, QAT, a random width a layer", QAT | {"targets": LAMBDA, "random_width": True}),
    "qat-ours": Variant("QAT with floor slicing, reads of their own, taught by the original", OURS | {"method": "qat", "teachers": dict.fromkeys(WIDTHS, 0)}),
    "omniquant-ours": Variant("OmniQuant with floor slicing and reads of their own", OURS | {"method": "omniquant"}),
    "nested-tuned": Variant("ours, without gradients", OURS | {"finetune_reads": 1}),
    "block-tuned": Variant("ours, block refinement", OURS | {"method": "block", "finetune_reads": 1}),
}  # fmt: skip


def recipes(variant: Variant, common: dict[str, Any], tokens: int) -> list[Recipe]:
    """One recipe, or one a width. A tuning takes its share of the tokens for each width that has a read of its own."""
    settings = {"head_bits": 0} | common | variant.settings | {"train_tokens": tokens}
    if settings.get("finetune_reads"):
        settings["finetune_reads"] = tokens
    if not variant.dedicated:
        return [Recipe(**settings)]
    return [Recipe(**{**settings, "parent_bits": r, "bits": (r,), "targets": {r: 1.0}, "streams": (r,)}) for r in WIDTHS]


def run(recipe: Recipe, model: str, original: Any, texts: dict[str, torch.Tensor], options: RunOptions, folder: Path) -> list[dict[str, Any]]:
    """Rows {text, bits, tuned, bits_per_weight, perplexity, kl, top1, overflow, seconds}; where reads are tuned, of the reads before that too.

    folder: for the work, from which a run that was killed goes on; its seconds are then null. What is left at the end are the rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / DONE
    if done.exists():
        return json.loads(done.read_text())
    out, plain, started = folder / "out", folder / "plain", time.perf_counter()
    resumed = (folder / "out.partial").exists() or out.exists()
    follow = Lines(out, plain if recipe.finetune_reads else None)
    report = saved_report(out) if out.exists() else quantize(model, out, recipe, replace(options, resume=resumed), follow)
    finished = time.perf_counter()
    made = [(out, bool(recipe.finetune_reads), finished - started)]
    if recipe.finetune_reads:
        if not plain.exists():
            quantize(model, plain, replace(recipe, finetune_reads=0), replace(options, resume=True), follow)
        made.insert(0, (plain, False, (follow.tuning_at or finished) - started))
    rows = []
    for checkpoint, tuned, took in made:
        seconds = None if resumed else round(took, 1)
        for text, sequences in texts.items():
            plans = {str(r): BitPlan(r) for r in recipe.bits}
            for row in evaluate(checkpoint, plans, sequences, original, dtype=options.dtype, device_map=options.device)[1:]:
                numbers = {"perplexity": row.perplexity, "kl": row.kl, "top1": row.top1, "bits_per_weight": row.bits_per_weight}
                overflow = report.overflow.get(int(row.bits or 0))
                rows.append({"text": text, "bits": int(row.bits or 0), "tuned": tuned, **numbers, "overflow": overflow, "seconds": seconds})
    replace_whole(done, json.dumps(rows).encode())
    shutil.rmtree(out)
    shutil.rmtree(plain, ignore_errors=True)
    return rows


@dataclass
class Lines:
    """Progress that prints what is told. plain: where to keep the run as it is before its reads are tuned, if wanted."""

    out: Path
    plain: Path | None
    tuning_at: float | None = None

    def __call__(self, stage: str, done: int, of: int) -> None:
        if not stage.startswith("tuning") or self.plain is None or self.tuning_at is not None:
            return
        self.tuning_at = time.perf_counter()
        partial = self.plain.with_name(self.plain.name + ".partial")
        if (partial / "run.json").exists():
            return
        shutil.copytree(self.out.with_name(self.out.name + ".partial"), partial, ignore=shutil.ignore_patterns("tuning", "logs"))
        record = json.loads((partial / "run.json").read_text())
        record["recipe"]["finetune_reads"] = 0  # the same run, which ends here
        (partial / "run.json").write_text(json.dumps(record))

    def line(self, text: str) -> None:
        if text.startswith("note: "):
            print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", action="append", required=True, help="to measure on; may be given again")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of end-to-end training")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--train-dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--forward-tokens", type=int, default=1024, help="of one forward pass of end-to-end training")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), help="of dedicated variants, make these runs only")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another recipe setting, for all variants; may be given again"
    )
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    source = models.open_source(options.model, options.gguf_file)
    original = models.load_dense(options.model, source.folder, options.gguf_file, dtype=torch.float32).to(options.device)
    texts = {Path(spec).name: evaluation(spec, source.tokenizer(), original, options.eval_samples, options.seq_len) for spec in options.text}
    extra = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in options.set)}
    common = {"group_size": options.group_size, "num_samples": options.num_samples, "seq_len": options.seq_len}
    common |= {"eval_samples": 0, "train_dtype": options.train_dtype, "refine_dtype": options.train_dtype, **extra}
    setting = common | {"tokens": options.tokens, "held_out": [options.eval_samples, options.seq_len]}
    for role, file in (("calibration", options.calibration), ("train_text", options.train)):
        common[role], setting[role] = file, Path(file).name
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    if result.get("setting", setting) != setting:
        sys.exit(f"{options.out} was made with other settings: {result['setting']}; choose another --out")
    result |= {"name": options.name, "setting": setting}
    how = RunOptions(gguf_file=options.gguf_file, device=options.device, forward_tokens=options.forward_tokens)
    for seed in options.seeds:
        for name in options.only:
            variant, key = VARIANTS[name], f"{name}/{seed}"
            folder = options.out.with_suffix(".work") / f"{name}-{seed}"
            if key in result["runs"] and not folder.exists():
                continue
            wanted = recipes(variant, common | {"seed": seed}, options.tokens)
            places = [folder / recipe.hash[:12] for recipe in wanted]
            try:
                for recipe, place in zip(wanted, places, strict=True):
                    if not variant.dedicated or recipe.parent_bits in options.widths:
                        rows = run(recipe, options.model, original, texts, how, place)
                        print(key, [(row["bits"], round(row["kl"], 4)) for row in rows[-5:]], flush=True)
            except MatquantError as error:
                print(f"{key}: {error}; its work is kept in {folder}", flush=True)
                continue
            done = [place for place in places if (place / DONE).exists()]
            rows = [row for place in done for row in json.loads((place / DONE).read_text())]
            written = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}  # another process may have added to it
            about = machine() | ({} if options.device == "cpu" else {"device": torch.cuda.get_device_name(options.device)})
            entry = {"words": variant.words, "command": command(), "machine": about, "settings": variant.settings, "rows": rows}
            result["runs"] = {**written, key: entry}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            if len(done) == len(places):
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
