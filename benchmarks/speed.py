"""How long quantization takes, and where: ours at all widths against one classic GPTQ run of the same code, on a model's first blocks.

    python benchmarks/speed.py MODEL --out results.json --name WORDS --calibration FILE|self
        [--blocks 2] [--group-size 64] [--num-samples 128] [--seq-len 512] [--only NAME ...]

Blocks of a decoder are alike, so a few tell the ratio. The variants alternate within each round and the fastest round of each counts.
Parts are wall time inside the functions named in PARTS; "other" is what none of them took.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers import command
from quality import PLAIN, calibrating, machine

from matquant import activations, groups, models, objective, repair
from matquant.blocks import BlockRun, Silent
from matquant.methods import gptq
from matquant.recipe import Recipe

CLASSIC = PLAIN | {"parent_bits": 4, "bits": (4,), "targets": {4: 1.0}, "streams": (4,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "classic": CLASSIC,
    "nested": {},
    "nested-all": {"stream_samples": 1 << 20},
    "block-bfloat16": {"method": "block", "refine_dtype": "bfloat16"},
}
WORDS = {
    "classic": "classic GPTQ, 4 bits",
    "nested": "ours, 8 to 2 bits",
    "nested-all": "ours, low widths' streams of all sequences",
    "block-bfloat16": "ours, block refinement in bfloat16",
}
PARTS: dict[str, list[tuple[Any, str]]] = {
    "activations: the original's": [(activations, "pass_original")],
    "activations: moments of inputs": [(activations, "statistics")],
    "activations: to the next block": [(activations, "propagate")],
    "factors of Hessians": [(gptq, "factorize_all"), (repair, "factorize_all"), (groups, "factorize_all")],
    "objective": [(gptq, "build"), (repair, "build")],
    "clip search": [(gptq, "search_grid")],
    "columns of GPTQ": [(gptq, "choose_codes")],
    "the planes below": [(gptq, "fit_residual"), (groups, "fit_residual")],
    "sweeps": [(gptq, "descend"), (repair, "descend")],
    "refits": [(gptq, "refit"), (objective, "refit"), (repair, "refit")],
}


class Enough(Exception):
    """Raised when the blocks asked for are done."""


@contextmanager
def clocks(spent: dict[str, float], blocks: int) -> Iterator[None]:
    """Time every function of PARTS into `spent`, and stop after `blocks`."""

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] = spent.get(part, 0.0) + time.perf_counter() - started

        return call

    advance, done = groups.BlockState.advance, []

    def counted(state: groups.BlockState) -> Any:
        result = advance(state)
        done.append(state)
        if len(done) == blocks:
            raise Enough
        return result

    with ExitStack() as stack:
        for part, places in PARTS.items():
            for module, name in places:
                stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name), part)))
        stack.enter_context(mock.patch.object(groups.BlockState, "advance", counted))
        yield


def run(model: str, recipe: Recipe, train: torch.Tensor, blocks: int) -> dict[str, float]:
    """Seconds of every part, and the total."""
    source = models.open_source(model, None)
    layers = models.find_layers(source.model, recipe)
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = BlockRun(source, layers, recipe, Path(folder), torch.device("cpu"), torch.float32, Silent())
        started = time.perf_counter()
        try:
            with clocks(spent, blocks):
                work.quantize(train)
        except Enough:
            pass
        total = time.perf_counter() - started
    return {**spent, "other": total - sum(spent.values()), "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=["classic", "nested", "nested-all"], choices=list(VARIANTS))
    options = parser.parse_args()
    source = models.open_source(options.model, None)
    dense = models.load_dense(options.model, source.folder, None, dtype=torch.float32) if options.calibration == "self" else None
    train = calibrating(options.calibration, source.tokenizer(), dense, options.num_samples, options.seq_len, seed=0)
    del source, dense
    found: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name in options.only:
            recipe = replace(Recipe(), **{"group_size": options.group_size, **VARIANTS[name]})
            seconds = run(options.model, recipe, train, options.blocks)
            print(name, {part: round(value, 1) for part, value in seconds.items()}, flush=True)
            if name not in found or seconds["total"] < found[name]["total"]:
                found[name] = {part: round(value, 2) for part, value in seconds.items()}
    setting = {name: getattr(options, name) for name in ("name", "blocks", "group_size", "num_samples", "seq_len", "rounds")}
    load = os.getloadavg()[0]
    rows = [{"variant": name, "words": WORDS[name], "seconds": seconds} for name, seconds in found.items()]
    result = {"setting": setting, "command": command(), "machine": {**machine(), "load": load}, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
