"""Whole-model quality of nested checkpoints against their rivals, at every width, on one set of tokens.

    python benchmarks/quality.py MODEL --out results.json --group-size 64 --calibration FILE|self --text FILE|self
        [--num-samples 32] [--eval-samples 16] [--seq-len 512] [--only NAME ...]

Variants are the rows of VARIANTS. Dedicated ones make one run for each width. Codes do not depend on refits, so each nested
run is measured twice, with its refits and without. A variant that is already in the output file is not run again.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from matquant import calibration, models
from matquant.blocks import BlockRun, Silent
from matquant.evaluate import logits_of, measure, windows
from matquant.recipe import Recipe

WIDTHS = (8, 6, 4, 3, 2)
NESTED = Recipe().targets
PLAIN = {"refit_bits": 0, "clip_search": False}
ROUND_TO_NEAREST = {"method": "minmax", **PLAIN}
MATGPTQ = {"slicing": "round", "feedback": "mean", "act_order": False, "static_groups": False, "symmetric": True, **PLAIN}
MATGPTQ_TARGETS = {8: 1.0, 4: 1.0, 3: 1.0, 2: 1.0}


@dataclass(frozen=True)
class Variant:
    """settings: of the recipe. dedicated: one run a width, parent and only target of that width."""

    words: str
    settings: dict[str, Any]
    dedicated: bool = False


VARIANTS = {
    "rtn": Variant("round to nearest, one run a width", ROUND_TO_NEAREST, dedicated=True),
    "gptq": Variant("classic GPTQ with clip search, one run a width", {}, dedicated=True),
    "matgptq": Variant("MatGPTQ's rule", {**MATGPTQ, "targets": MATGPTQ_TARGETS}),
    "floor": Variant("ours, floor", {}),
    "round": Variant("ours, round", {"slicing": "round"}),
    "floor-symmetric": Variant("ours, floor, symmetric", {"symmetric": True}),
    "round-symmetric": Variant("ours, round, symmetric", {"slicing": "round", "symmetric": True}),
    "gptq-symmetric": Variant("classic GPTQ, symmetric, one run a width", {"symmetric": True}, dedicated=True),
}


def recipes(variant: Variant, common: dict[str, Any]) -> list[Recipe]:
    """One recipe, or one a width."""
    settings = {"symmetric": False, "bits": WIDTHS, "targets": NESTED, **common, **variant.settings}
    if not variant.dedicated:
        return [Recipe(**settings)]
    return [Recipe(**{**settings, "parent_bits": r, "bits": (r,), "targets": {r: 1.0}}) for r in WIDTHS]


def tokens_of(spec: str, tokenizer: Any, dense: Any, count: int, seq_len: int, seed: int) -> torch.Tensor:
    """`count` sequences: cut from a text file, or sampled from the model."""
    if spec == "self":
        start = calibration.start_token(tokenizer)
        return calibration.sample_windows(dense, start, count, seq_len, seed, lambda done, of: None)
    stream = calibration.token_stream(tokenizer, calibration.read_texts(spec))
    return windows(stream, seq_len, calibration.leading_token(tokenizer), count)


def run_one(
    recipe: Recipe, source_args: tuple[str, str | None], dense: Any, train: torch.Tensor, held: torch.Tensor, truth: dict[bytes, torch.Tensor]
) -> list[dict[str, Any]]:
    """Rows {bits, refit, bits_per_weight, perplexity, kl, top1} of one recipe. truth: the original's logits, kept between recipes."""
    source = models.open_source(*source_args)
    layers = models.find_layers(source.model, recipe)
    originals = {name: dense.get_submodule(name) for name in layers.quantized}
    with tempfile.TemporaryDirectory() as folder:
        run = BlockRun(source, layers, recipe, Path(folder), torch.device("cpu"), torch.float32, Silent())
        started = time.perf_counter()
        run.quantize(train)
        seconds = time.perf_counter() - started
        weights = {name: run.weight(name) for name in layers.quantized}
    weight_count = sum(shape.weights for shape in layers.quantized.values())
    state = {"modules": originals}

    def reference(ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in truth:  # 4 bytes a token and vocabulary entry: 0.2 GB a thousand tokens
            swap(dense, originals)
            truth[key] = logits_of(dense)(ids)
        return truth[key]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        swap(dense, state["modules"])
        return logits_of(dense)(ids)

    settings, labels = [], []
    for refits in (False, True) if recipe.layout.refit_widths else (False,):
        for bits in recipe.bits:
            if refits and bits not in recipe.layout.refit_widths:
                continue
            layout = recipe.layout if refits else replace(recipe.layout, refit_widths=())
            labels.append(
                {"bits": bits, "refit": refits, "bits_per_weight": sum(layout.read_bits(s, bits) for s in layers.quantized.values()) / weight_count}
            )
            settings.append((str(len(labels)), choose(state, originals, weights, bits, refits)))
    found = measure(forward, reference, held, settings, None)[1:]
    swap(dense, originals)
    del source
    gc.collect()
    return [
        {**label, "perplexity": q.perplexity, "kl": q.kl, "top1": q.top1, "quantize_seconds": round(seconds, 1)}
        for label, q in zip(labels, found, strict=True)
    ]


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
    """What the numbers depend on besides the arguments."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"commit": commit.stdout.strip(), "machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--gguf-file")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", default="self")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()

    source = models.open_source(options.model, options.gguf_file)
    tokenizer = source.tokenizer()
    dense = models.load_dense(options.model, source.folder, options.gguf_file, dtype=torch.float32)
    cut = options.num_samples if options.calibration == options.text == "self" else 0
    if cut:
        both = tokens_of("self", tokenizer, dense, cut + options.eval_samples, options.seq_len, options.seed)
        train, held = both[:cut], both[cut:]
    else:
        train = tokens_of(options.calibration, tokenizer, dense, options.num_samples, options.seq_len, options.seed)
        held = tokens_of(options.text, tokenizer, dense, options.eval_samples, options.seq_len, options.seed + 1)
    truth: dict[bytes, torch.Tensor] = {}
    result = json.loads(options.out.read_text()) if options.out.exists() else {"variants": {}}
    shown = {"calibration": Path(options.calibration).name, "text": Path(options.text).name}
    setting = {"group_size": options.group_size, "train": list(train.shape), "held_out": list(held.shape), **shown}
    result |= {"name": options.name, "command": " ".join(Path(a).name if "/" in a else a for a in sys.argv), "setting": setting, "machine": machine()}
    for name in options.only:
        if name in result["variants"]:
            continue
        variant, rows = VARIANTS[name], []
        for recipe in recipes(variant, {"group_size": options.group_size}):
            rows += run_one(recipe, (options.model, options.gguf_file), dense, train, held, truth)
            print(name, recipe.bits, round(time.perf_counter()), flush=True)
        result["variants"][name] = {"words": variant.words, "settings": asdict(variant)["settings"], "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
