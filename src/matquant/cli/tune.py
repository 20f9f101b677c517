"""`matquant tune`: the fastest GPU kernel for each layer shape, width and batch, into the user's table."""

import sys
from pathlib import Path

import typer

from matquant.errors import InputError

FOLDER = typer.Argument(None, metavar="[DIR]", help="a matquant checkpoint whose layer shapes to tune for", show_default=False)
SHAPE = typer.Option([], "--shape", metavar="OUTxIN", help="tune for this layer shape; may be given again", show_default=False)
BITS = typer.Option("8,6,4,3,2", metavar="BITS,...", help="widths to tune")
BATCH = typer.Option("1,2,4,8,16,32,64,128,256", metavar="ROWS,...", help="batches to tune: rows that are multiplied at once")
GROUP = typer.Option(64, "--group-size", help="input channels that share a scale; a checkpoint has its own")
DEVICE = typer.Option("cuda:0", metavar="DEVICE", help="the GPU")
DTYPE = typer.Option("bfloat16", metavar="DTYPE", help="type of activations: bfloat16 or float16")
OUTPUT = typer.Option(None, "--output", "-o", metavar="FILE", help="table to extend", show_default="$MATQUANT_TUNED or ~/.cache/matquant/tuned.json")
JSON = typer.Option(False, "--json", help="print JSON for machines on stdout, and nothing else")


def tune(
    folder: Path | None = FOLDER, shape: list[str] = SHAPE, bits: str = BITS, batch: str = BATCH, group_size: int = GROUP, device: str = DEVICE,
    dtype: str = DTYPE, output: Path | None = OUTPUT, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Measure GPU kernels on this machine and keep the fastest."""
    import torch

    from matquant.cli import run, show
    from matquant.cli.flags import parse_bits
    from matquant.kernels.gpu import ops, table
    from matquant.kernels.gpu.tune import Product
    from matquant.kernels.gpu.tune import tune as measure
    from matquant.report import Table

    run.prepare(device, dtype)
    ops.check(device)
    shapes, group = _shapes(folder, shape, group_size)
    path = output or table.user_file()
    products = [
        Product(r, rows, out, columns, group, getattr(torch, dtype))
        for out, columns in shapes for r in parse_bits(bits) for rows in parse_bits(batch, "batch")
    ]  # fmt: skip
    found = []
    for product in products:
        found.append(measure(product, torch.device(device)))
        table.save(path, found[-1:])  # an interrupted run keeps what it has
        sys.stderr.write(f"{found[-1].out} x {found[-1].in_features}, {product.bits} bits, batch {product.batch}: {found[-1].us} us\n")
    if as_json:
        return show.emit({"file": str(path), "rows": [row.to_dict() for row in found]})
    lines = [[f"{row.out} x {row.in_features}", str(row.bits), str(row.batch), row.config.kind, f"{row.us:.1f}"] for row in found]
    show.draw(Table(["layer", "bits", "batch", "kernel", "us"], lines))
    show.say(f"written to {path}")


def _shapes(folder: Path | None, given: list[str], group: int) -> tuple[list[tuple[int, int]], int]:
    """Layer shapes and their group size. Raises InputError."""
    shapes = [_shape(text) for text in given]
    if folder is not None:
        from matquant.checkpoint import describe

        found = describe(folder)
        shapes += [(shape.out, shape.in_features) for shape in found.modules.values()]
        group = found.layout.grid.group_size
    if not shapes:
        raise InputError("nothing to tune; give a checkpoint, or --shape 4096x14336")
    return list(dict.fromkeys(shapes)), group


def _shape(text: str) -> tuple[int, int]:
    try:
        out, columns = (int(part) for part in text.lower().split("x"))
    except ValueError:
        out, columns = 0, 0
    if out < 1 or columns < 1:
        raise InputError(f"shape is {text!r}; give OUTxIN, for instance 4096x14336")
    return out, columns
