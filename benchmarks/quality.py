"""Whole-model quality of nested checkpoints against their rivals, at every width, on the same tokens.

    python benchmarks/quality.py MODEL --out results.json --group-size 64 --calibration FILE|self --text FILE|self [--text FILE ...]
        [--num-samples 32] [--eval-samples 16] [--seq-len 512] [--seeds 0 1 2] [--only NAME ...] [--measure 8]

Variants are the rows of VARIANTS. Dedicated ones make one run for each width. Codes of methods without sweeps do not depend on
refits, so these are measured without refits and with them. Every seed takes other calibration sequences; the texts measured on stay.
A variant and seed that is already in the output file is not run again, so an interrupted benchmark goes on where it was.
"""

import argparse
import copy
import gc
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers import command

from matquant import calibration, models
from matquant.blocks import BlockRun, Silent
from matquant.evaluate import logits_of, measure, windows
from matquant.recipe import Recipe
from matquant.rotate import rotated

WIDTHS = (8, 6, 4, 3, 2)
ALL_WIDTHS = (8, 7, 6, 5, 4, 3, 2)
EVERY = {"stream_samples": 1 << 20}  # as many sequences as there are for every stream
PLAIN = EVERY | {"refit_bits": 0, "sweeps": 0, "asymmetric_calibration": 0.0, "method": "gptq"}
NO_SEARCH = PLAIN | {"clip_search": False}
MATGPTQ = NO_SEARCH | {
    "slicing": "round", "feedback": "mean", "act_order": False, "static_groups": False, "symmetric": True, "normalize": False, "streams": (8,)
}  # fmt: skip
ONE_STREAM = EVERY | {"streams": (8,)}


@dataclass(frozen=True)
class Variant:
    """settings: of the recipe. dedicated: one run a width, parent and only target of that width. seeds: whether calibration matters."""

    words: str
    settings: dict[str, Any]
    dedicated: bool = False
    seeds: bool = True


VARIANTS = {
    "rtn": Variant("round to nearest, one run a width", NO_SEARCH | {"method": "minmax"}, dedicated=True, seeds=False),
    "gptq": Variant("classic GPTQ (act-order, clip search), one run a width", PLAIN | {"refit_bits": 4}, dedicated=True),
    "matgptq-348": Variant("MatGPTQ's rule, targets 8,4,3", MATGPTQ | {"targets": {8: 1.0, 4: 1.0, 3: 1.0}}),
    "matgptq-2348": Variant("MatGPTQ's rule, targets 8,4,3,2", MATGPTQ | {"targets": {8: 1.0, 4: 1.0, 3: 1.0, 2: 1.0}}),
    "nested": Variant("ours, without gradients", {"bits": ALL_WIDTHS}),
    "block": Variant("ours, block refinement", {"bits": ALL_WIDTHS, "method": "block", "refine_dtype": "bfloat16"}),
    "targets-842": Variant("ours, without gradients, targets 8,4,2", {"bits": ALL_WIDTHS, "targets": {r: Recipe().targets[r] for r in (8, 4, 2)}}),
    "targets-843": Variant("ours, without gradients, targets 8,4,3", {"bits": ALL_WIDTHS, "targets": {r: Recipe().targets[r] for r in (8, 4, 3)}}),
    "dedicated": Variant("ours, one run a width", EVERY | {}, dedicated=True),
    "all-streams": Variant("ablation: all stages, low widths' streams of all sequences", EVERY | {"bits": ALL_WIDTHS}),
    "one-pass": Variant("ablation: GPTQ alone, one stream", PLAIN | ONE_STREAM),
    "one-stream": Variant("ablation: one stream", ONE_STREAM | {"asymmetric_calibration": 0.0}),
    "streams-refit": Variant("ablation: a stream a width, GPTQ alone", PLAIN | {"refit_bits": 4}),
    "symmetric-target": Variant("ablation: all but the asymmetric target", EVERY | {"asymmetric_calibration": 0.0}),
    "full-target": Variant("ablation: asymmetric target 1 instead of the default", EVERY | {"asymmetric_calibration": 1.0}),
    "two-streams": Variant("ablation: streams 8 and 2", EVERY | {"streams": (8, 2)}),
    "sweeps-6": Variant("ablation: 6 sweeps", EVERY | {"sweeps": 6}),
    "no-clip-search": Variant("ablation: no clip search", EVERY | {"clip_search": False}),
    "integer-zero": Variant("symmetric grid", {"symmetric": True}),
    "round": Variant("slicing round", {"slicing": "round"}),
    "rotated": Variant("rotated, no gradients", EVERY | {"rotate": True}),
    "gptq-rotated": Variant("rotated, classic GPTQ, one run a width", PLAIN | {"refit_bits": 0, "rotate": True}, dedicated=True),
    "overlap": Variant("overlap, no gradients", EVERY | {"overlap": True}),
    "block-overlap": Variant("overlap, block refinement", {"method": "block", "refine_dtype": "bfloat16", "overlap": True}),
    **{f"lam8-{lam:g}": Variant(f"lam of 8 bits {lam:g}", EVERY | {"targets": {**Recipe().targets, 8: lam}}) for lam in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)},
    "favor-2": Variant("2 bits favoured", EVERY | {"favor": (2,)}),
    "favor-4": Variant("4 bits favoured", EVERY | {"favor": (4,)}),
    "favor-8": Variant("ours, without gradients, 8 bits favoured", EVERY | {"favor": (8,)}),
}  # fmt: skip


def recipes(variant: Variant, common: dict[str, Any]) -> list[Recipe]:
    """One recipe, or one a width."""
    settings = {"bits": WIDTHS, **common, **variant.settings}
    if not variant.dedicated:
        return [Recipe(**settings)]
    return [Recipe(**{**settings, "parent_bits": r, "bits": (r,), "targets": {r: 1.0}, "streams": (r,)}) for r in WIDTHS]


def evaluation(spec: str, tokenizer: Any, dense: Any, count: int, seq_len: int) -> torch.Tensor:
    """`count` sequences to measure on: the first of a text file, or sampled from the model."""
    if spec == "self":
        return sample(tokenizer, dense, count, seq_len, seed=1000)
    stream = calibration.token_stream(tokenizer, calibration.read_texts(spec))
    return windows(stream, seq_len, calibration.leading_token(tokenizer), count)


def calibrating(spec: str, tokenizer: Any, dense: Any, count: int, seq_len: int, seed: int) -> torch.Tensor:
    """`count` sequences to calibrate on: drawn from a text file, or sampled from the model."""
    if spec == "self":
        return sample(tokenizer, dense, count, seq_len, seed)
    stream = calibration.token_stream(tokenizer, calibration.read_texts(spec))
    return calibration.choose_windows(stream, seq_len, count, 0, seed, spec, calibration.leading_token(tokenizer))[0]


def sample(tokenizer: Any, dense: Any, count: int, seq_len: int, seed: int) -> torch.Tensor:
    return calibration.sample_windows(dense, calibration.start_token(tokenizer), count, seq_len, seed, lambda done, of: None)


class Bench:
    """The original, the texts, and its logits on them, which are kept: 4 bytes a token and vocabulary entry."""

    def __init__(self, dense: Any, source: tuple[str, str | None], texts: dict[str, torch.Tensor]) -> None:
        self.dense, self.source, self.texts = dense, source, texts
        self.truth: dict[bytes, torch.Tensor] = {}
        forward = logits_of(dense)

        def remember(ids: torch.Tensor) -> torch.Tensor:
            self.truth[ids.numpy().tobytes()] = forward(ids)
            return self._reference(ids)

        self.perplexity = {text: measure(forward, remember, held, [], None)[0].perplexity for text, held in texts.items()}

    def run(self, recipe: Recipe, train: torch.Tensor, folder: Path, keep: bool = False, widths: Sequence[int] = ALL_WIDTHS) -> list[dict[str, Any]]:
        """Rows {text, bits, refit, bits_per_weight, perplexity, kl, top1, quantize_seconds} of one recipe, at those of its widths that are in `widths`.

        folder: for finished blocks, from which a run that was killed goes on; its seconds are then null. keep: leave them there.
        """
        source = rotated(models.open_source(*self.source), recipe)
        dense = turned(self.dense, source) if recipe.rotate else self.dense
        layers = models.find_layers(source.model, recipe)
        folder.mkdir(parents=True, exist_ok=True)
        resumed = any(folder.iterdir())
        run = BlockRun(source, layers, recipe, folder, torch.device("cpu"), torch.float32, Silent())
        started = time.perf_counter()
        run.quantize(train)
        seconds = None if resumed else round(time.perf_counter() - started, 1)
        weights = {name: run.weight(name) for name in layers.quantized}
        del source
        gc.collect()
        count = sum(shape.weights for shape in layers.quantized.values())
        originals = {name: dense.get_submodule(name) for name in layers.quantized}
        both = recipe.sweeps == 0 and bool(recipe.layout.refit_widths)  # codes do not depend on the refits
        rows = []
        for text, held in self.texts.items():
            state = {"modules": originals}
            settings, labels = [], []
            for refits in (False, True) if both else (bool(recipe.layout.refit_widths),):
                for bits in [r for r in recipe.bits if r in widths]:
                    if refits and both and bits not in recipe.layout.refit_widths:
                        continue
                    layout = recipe.layout if refits else replace(recipe.layout, refit_widths=())
                    size = sum(layout.read_bits(s, bits) for s in layers.quantized.values()) / count
                    own = refits and bits in recipe.layout.refit_widths
                    labels.append({"text": text, "bits": bits, "refit": own, "bits_per_weight": size, "quantize_seconds": seconds})
                    settings.append((str(len(labels)), choose(state, originals, weights, bits, refits)))
            found = measure(self._forward(dense, state), self._reference, held, settings, None)[1:]
            rows += [{**label, "perplexity": q.perplexity, "kl": q.kl, "top1": q.top1} for label, q in zip(labels, found, strict=True)]
        swap(dense, originals)
        if not keep:
            shutil.rmtree(folder)
        return rows

    def _forward(self, dense: Any, state: dict[str, Any]) -> Any:
        def forward(ids: torch.Tensor) -> torch.Tensor:
            swap(dense, state["modules"])
            return logits_of(dense)(ids)

        return forward

    def _reference(self, ids: torch.Tensor) -> torch.Tensor:
        return self.truth[ids.numpy().tobytes()]


def turned(dense: Any, source: models.Source) -> Any:
    """A copy of `dense` with the rotated tensors of `source`, which compute the same."""
    model = copy.deepcopy(dense)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer tied
    for name, parameter in model.named_parameters():
        parameter.data = source.tensors[name].float()
    return model


def swap(model: Any, modules: dict[str, Any]) -> None:
    """Put modules in place by name."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def choose(state: dict[str, Any], originals: dict[str, Any], weights: dict[str, Any], bits: int, refits: bool) -> Any:
    """A setting of `measure`: dense layers read at one width, made when it is their turn."""

    def switch() -> None:
        modules = {}
        for name, weight in weights.items():
            read = (weight if refits else replace(weight, refits={})).read(bits).dense()
            linear = torch.nn.Linear(read.shape[1], read.shape[0], bias=originals[name].bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(read, requires_grad=False)
            linear.bias = originals[name].bias
            modules[name] = linear
        state["modules"] = modules

    return switch


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the arguments. commit: "" where the sources were copied without their history."""
    found = shutil.which("git") and subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"commit": found.stdout.strip() if found else "", "machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--gguf-file")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", action="append", help="may be given again")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--keep", action="store_true", help="leave the finished blocks beside --out, for another benchmark to go on from")
    parser.add_argument("--measure", type=int, nargs="*", default=list(ALL_WIDTHS), metavar="BITS", help="measure at no other widths")
    parser.add_argument("--only", nargs="*", default=["rtn", "gptq", "matgptq-348", "matgptq-2348", "nested"], choices=list(VARIANTS))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    source = models.open_source(options.model, options.gguf_file)
    tokenizer = source.tokenizer()
    dense = models.load_dense(options.model, source.folder, options.gguf_file, dtype=torch.float32)
    specs = options.text or ["self"]
    texts = {Path(spec).name: evaluation(spec, tokenizer, dense, options.eval_samples, options.seq_len) for spec in specs}
    bench = Bench(dense, (options.model, options.gguf_file), texts)
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    setting = {
        "group_size": options.group_size,
        "train": [options.num_samples, options.seq_len],
        "calibration": Path(options.calibration).name,
        "held_out": [options.eval_samples, options.seq_len],
    }
    if result.get("setting", setting) != setting:
        sys.exit(f"{options.out} was made with other settings: {result['setting']}; choose another --out")
    result |= {"name": options.name, "setting": setting}
    result.setdefault("original", bench.perplexity)
    for seed in options.seeds:
        train = calibrating(options.calibration, tokenizer, dense, options.num_samples, options.seq_len, seed)
        for name in options.only:
            variant, key = VARIANTS[name], f"{name}/{seed}"
            if key in result["runs"] or (not variant.seeds and f"{name}/{options.seeds[0]}" in result["runs"]):
                continue
            rows = []
            for recipe in recipes(variant, {"group_size": options.group_size}):
                folder = options.out.with_suffix(".work") / f"{name}-{seed}-{recipe.hash[:12]}"
                rows += bench.run(recipe, train, folder, options.keep, options.measure)
                print(key, [(row["bits"], round(row["kl"], 4)) for row in rows[-7:]], flush=True)
            run = {"words": variant.words, "command": command(), "machine": machine(), "settings": variant.settings, "rows": rows}
            written = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}  # another process may have added to it
            result["runs"] = {**written, key: run}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
