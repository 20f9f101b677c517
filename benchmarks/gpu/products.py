"""GPU kernels against cuBLAS, other projects' kernels and the speed of memory; decode of a model of Llama-3-8B's shape. Under 9 minutes on one GPU.

    python benchmarks/gpu/products.py --out results.json [--plot results.svg] [--seconds 500] [--device cuda:0] [--dtype bfloat16]
        [--shapes 8192x8192,...] [--batches 1,16,256,...] [--bits 8,6,4,3,2] [--group-size 128] [--decode 4096,14336,32,32,8,128256] [--tune]

Every product is held against the reference before it is timed. Times are medians of replays of a CUDA graph in which copies of the weight, together
three times the L2, take turns, so that weights come from memory. What matters most is measured first; when --seconds are used up, the rest is left
out and named. Configurations come from the shipped table and the user's; --tune measures them first (minutes a shape).
Bandwidth: bytes of planes and metadata, over time; "copy" is what a device-to-device copy reads and writes, at the best of three sizes that no cache holds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from decode import Shape, tokens_per_second
from peers import command
from quality import machine

from matquant.kernels.gpu import ops, table, tune

# Linear layers of Llama-3-8B and 70B (config.json of either), q k v and gate up fused as servers fuse them. out x in.
SHAPES = "8192x8192,4096x4096,6144x4096,28672x4096,4096x14336,10240x8192,57344x8192,8192x28672"
BATCHES = "1,16,256,4,64,8,32,2,128"
BITS = "2,4,8,3,6"
LLAMA_3_8B = "4096,14336,32,32,8,128256"
# On an H200, 8192 x 8192, batch 1, in microseconds: what we aim at, and what others published for that card (Humming's benchmark files).
TARGETS = {8: 22.0, 6: 17.0, 4: 12.5, 3: 10.5, 2: 8.5}
PUBLISHED = {"cuBLAS float16": {16: 50.1}, "Humming": {8: 31.2, 4: 22.4, 3: 22.2, 2: 19.4}, "Marlin": {4: 23.1}}


@dataclass
class Results:
    """rows: of products. left_out: what there was no time for."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    decode: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def us(self, kernel: str, bits: int, batch: int, shape: str) -> float | None:
        return next((r["us"] for r in self.rows if (r["kernel"], r["bits"], r["batch"], r["shape"]) == (kernel, bits, batch, shape)), None)


# --- measurements ---------------------------------------------------------------------------------------------------------


def copy_gigabytes(device: torch.device) -> float:
    """Bytes read and written a second by a copy, in 1e9; of the size that is copied fastest."""
    sizes = [2**20] if device.type != "cuda" else [2**26, 2**28, 2**31]
    found = []
    for size in sizes:
        pairs = [(torch.empty(size // 4, device=device), torch.empty(size // 4, device=device)) for _ in range(max(1, 2**28 // size))]
        found.append(2 * size / tune.microseconds([lambda a=a, b=b: b.copy_(a) for a, b in pairs] * 4, device) / 1e3)
    return max(found)


def dense_us(out: int, columns: int, batch: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of the library's product with a dense weight."""
    x, weight = torch.randn(batch, columns, device=device).to(dtype), torch.randn(out, columns, device=device).to(dtype)
    count = max(2, tune.COLD * tune.l2_bytes(device) // weight.nbytes + 1)
    copies = [weight, *(weight.clone() for _ in range(count - 1))]
    turns = copies if device.type != "cuda" else copies * -(-tune.FEWEST // count)
    return tune.microseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in turns], device)


def ours(out: int, columns: int, batch: int, bits: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row. Raises RuntimeError where the product is wrong."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.tune:
        table.save(table.user_file(), [tune.tune(tune.Product(bits, batch, out, columns, options.group_size, dtype), device)])
    weight = tune.random_weight(out, columns, options.group_size, bits, device)
    x = torch.randn(batch, columns, device=device).to(dtype)
    if not tune.right(x, weight, bits, ops.linear(x, weight, bits)):
        raise RuntimeError(f"wrong product: {out} x {columns}, batch {batch}, {bits} bits")
    copies = tune.cold_copies(weight, bits, device)
    turns = copies if device.type != "cuda" else copies * -(-tune.FEWEST // len(copies))
    us = tune.microseconds([lambda w=w: ops.linear(x, w, bits) for w in turns], device)
    config = table.choose(device, dtype, bits, batch, out, columns, weight.group)
    read = weight.read_bytes(bits)
    return {"kernel": "matquant", "bits": bits, "us": us, "bytes": read, "gigabytes_per_second": read / us / 1e3, "config": vars(config)}


def torchao_us(out: int, columns: int, batch: int, options: argparse.Namespace) -> float:
    """Of torchao's 4-bit weights (https://github.com/pytorch/ao): its default configuration at our group size."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    layers = [torch.nn.Sequential(torch.nn.Linear(columns, out, bias=False, dtype=dtype, device=device)) for _ in range(4)]
    for layer in layers:
        quantize_(layer, Int4WeightOnlyConfig(group_size=options.group_size))
    x = torch.randn(batch, columns, device=device, dtype=dtype)
    count = max(2, tune.COLD * tune.l2_bytes(device) * 2 // (out * columns) // len(layers) + 1)
    return tune.microseconds([lambda layer=layer: layer(x) for layer in layers * count], device)


PEERS: dict[str, tuple[int, Callable[..., float]]] = {"torchao": (4, torchao_us)}  # package -> (bits, measurement)


def products(options: argparse.Namespace, results: Results, until: float) -> None:
    """All rows that there is time for, in the order given: all shapes of a batch before the next batch."""
    shapes = [tuple(int(part) for part in text.split("x")) for text in options.shapes.split(",")]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    for batch in options.batches:
        for out, columns in shapes:
            where = {"shape": f"{out}x{columns}", "batch": batch}
            if time.monotonic() > until:
                results.left_out.append(f"{where['shape']} at batch {batch}")
                continue
            results.rows.append({"kernel": options.dtype, "bits": 16, "us": dense_us(out, columns, batch, dtype, device)} | where)
            results.rows += [ours(out, columns, batch, bits, options) | where for bits in options.bits]
            for name, (bits, measure) in PEERS.items():
                if find_spec(name) is None or device.type != "cuda":
                    continue
                try:
                    results.rows.append({"kernel": name, "bits": bits, "us": measure(out, columns, batch, options)} | where)
                except Exception as error:  # noqa: BLE001 - a peer that fails is no reason to lose our numbers
                    results.left_out.append(f"{name} on {where['shape']}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            print(
                *(f"{r['kernel']}-{r['bits']} {r['us']:.1f}" for r in results.rows if r["shape"] == where["shape"] and r["batch"] == batch),
                flush=True,
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()


def targets(results: Results) -> list[dict[str, Any]]:
    """The issue's targets, and whether they were met: times at batch 1, batch 16 over batch 1, batch 256 over the dense product."""
    found, shape = [], "8192x8192"
    dense = next((row["us"] for row in results.rows if (row["bits"], row["batch"], row["shape"]) == (16, 256, shape)), None)
    for bits, target in TARGETS.items():
        one, sixteen, many = (results.us("matquant", bits, batch, shape) for batch in (1, 16, 256))
        if one is not None:
            found.append({"bits": bits, "what": "us at batch 1, at most", "target": target, "found": one, "met": one <= target})
        if one is not None and sixteen is not None:
            found.append({"bits": bits, "what": "batch 16 over batch 1, at most", "target": 1.3, "found": sixteen / one, "met": sixteen <= 1.3 * one})
        if many is not None and dense is not None:
            found.append(
                {"bits": bits, "what": "speed over dense at batch 256, at least", "target": 0.9, "found": dense / many, "met": dense >= 0.9 * many}
            )
    return found


# --- showing --------------------------------------------------------------------------------------------------------------


def shown(results: Results, reached: list[dict[str, Any]]) -> str:
    """Markdown: microseconds by shape and batch, then targets, then decode."""
    names = list(dict.fromkeys((r["kernel"], r["bits"]) for r in results.rows))
    places = list(dict.fromkeys((r["shape"], r["batch"]) for r in results.rows))
    lines = [["out x in", "batch", *(f"{kernel} {bits}" for kernel, bits in names)]]
    for shape, batch in places:
        values = (results.us(kernel, bits, batch, shape) for kernel, bits in names)
        lines.append([shape, str(batch), *("" if us is None else f"{us:.1f}" for us in values)])
    text = _markdown(lines)
    if reached:
        rows = [[str(t["bits"]), t["what"], f"{t['target']:g}", f"{t['found']:.2f}", "yes" if t["met"] else "no"] for t in reached]
        text += "\n" + _markdown([["bits", "target", "value", "found", "met"], *rows])
    if results.decode:
        rows = [[str(row["bits"]), f"{row['tokens_per_second']:.1f}"] for row in results.decode]
        text += "\n" + _markdown([["decode, bits", "tokens/s"], *rows])
    return text


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def plot(results: Results, copy: float, path: Path) -> None:
    """Time over batch of every width on the first shape, with the time that memory takes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from matquant.plot import STYLE, WIDTH_COLORS, as_svg

    shape = results.rows[0]["shape"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for kernel, bits in dict.fromkeys((r["kernel"], r["bits"]) for r in results.rows if r["shape"] == shape):
            points = sorted((r["batch"], r["us"]) for r in results.rows if (r["kernel"], r["bits"], r["shape"]) == (kernel, bits, shape))
            mine = kernel == "matquant"
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                color=WIDTH_COLORS.get(bits) if mine else None,
                ls="-" if mine else ":",
                label=f"{kernel} {bits}",
            )
        for row in (r for r in results.rows if r["kernel"] == "matquant" and r["batch"] == 1 and r["shape"] == shape):
            axes.axhline(row["bytes"] / copy / 1e3, color=WIDTH_COLORS[row["bits"]], lw=0.5)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="microseconds", title=f"{shape}; thin lines: its bytes at the speed of a copy")
        axes.legend(frameon=False, fontsize=8)
        path.write_bytes(as_svg(figure, "GPU kernels"))


# --- main -----------------------------------------------------------------------------------------------------------------


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", type=whole_numbers, default=whole_numbers(BATCHES))
    parser.add_argument("--bits", type=whole_numbers, default=whole_numbers(BITS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--decode", type=whole_numbers, default=whole_numbers(LLAMA_3_8B), help="hidden,inner,layers,heads,kv heads,vocabulary")
    parser.add_argument("--decode-tokens", type=int, default=50)
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache of keys and values")
    parser.add_argument("--tune", action="store_true", help="extend the user's table first")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(given)
    started, device = time.monotonic(), torch.device(options.device)
    ops.check(device)
    torch.manual_seed(0)
    results, copy = Results(), copy_gigabytes(device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    products(options, results, started + options.seconds)
    stored(options, results, copy, started)  # what follows needs more memory than what was
    results.decode = tokens_per_second(Shape(*options.decode), options.bits, options.group_size, getattr(torch, options.dtype), device,
                                       options.context, options.decode_tokens)  # fmt: skip
    found = stored(options, results, copy, started)
    if options.plot:
        plot(results, copy, options.plot)
    print(shown(results, found["targets"]))
    print(*(f"left out: {words}" for words in results.left_out), sep="\n")
    return found


def stored(options: argparse.Namespace, results: Results, copy: float, started: float) -> dict[str, Any]:
    """What goes into --out, written."""
    device = torch.device(options.device)
    properties = {"gpu": table.gpu_name(device), "l2_bytes": tune.l2_bytes(device), "copy_gigabytes_per_second": copy}
    found = {
        "command": command(), "machine": {**machine(), **properties}, "interpreted": ops.interpreted(), "group_size": options.group_size,
        "dtype": options.dtype, "rows": results.rows, "targets": targets(results), "published_h200": PUBLISHED, "decode": results.decode,
        "left_out": results.left_out, "seconds": time.monotonic() - started,
    }  # fmt: skip
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
