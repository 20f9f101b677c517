"""Which kernel with which blocks: a table by (GPU, bits, batch, shape), never a measurement while serving.

tuned.json holds what was measured and is shipped; a user's own file, written by `matquant tune`, comes first. A row is

    {"gpu": "NVIDIA H200", "dtype": "bfloat16", "bits": 2, "batch": 16, "out": 8192, "in": 8192, "group": 128, "config": {...}, "us": 9.1}

and a product takes the row of its GPU and bits, of the nearest batch (rounded up to a power of two; at most a factor of two away, of equals the larger)
and of the nearest shape, by ratios. Where there is none, it takes a default: MMA where that kernel runs, the best of the H200 over all widths, else
UNTUNED, which nobody has measured.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from math import log2
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from matquant.errors import InputError, choices

Kind = Literal["gemv", "mma", "dot", "dense"]
SHIPPED = Path(__file__).parent / "tuned.json"
USER_VARIABLE = "MATQUANT_TUNED"
BATCHES = tuple(2**i for i in range(10))  # classes; larger batches count as the last


@dataclass(frozen=True)
class Config:
    """One way to compute a product.

    kind: gemv (ordinary units), mma (NVIDIA's tensor cores, layouts spelled out: where `mma_runs`), dot (tensor cores), dense (the weight into a
    scratch, then torch.mm). block_n, block_m: rows of the weight and of x that one program takes. block_k: tiles that gemv takes at once. run: slots of one tl.dot (1, 2 or 4). least_m: to which dot pads the rows of x.
    split_k: programs that share a sum. warps, stages: as Triton's; those of mma split a sum, and its stage 1 copies nothing ahead. rows: of the weight in the scratch of dense; 0 = all.
    """

    kind: Kind
    block_n: int = 64
    block_m: int = 8
    block_k: int = 8
    run: int = 4
    least_m: int = 8
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    rows: int = 0
    registers: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"kind is {self.kind!r}; {choices(self.kind, get_args(Kind))}")
        for name in ("block_n", "block_m", "block_k", "run", "least_m", "warps"):
            if (value := getattr(self, name)) < 1 or value & (value - 1):
                raise InputError(f"{name} is {value}; allowed: powers of two")
        if self.run > 4 or self.split_k < 1 or self.stages < 1 or min(self.rows, self.registers) < 0:
            raise InputError(f"{self} is no configuration; allowed: run 1, 2 or 4, split_k and stages from 1, rows and registers from 0")


@dataclass(frozen=True)
class Row:
    """A measurement. us: microseconds, with the weight not in the cache."""

    gpu: str
    dtype: str
    bits: int
    batch: int
    out: int
    in_features: int
    group: int
    config: Config
    us: float

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["in"] = values.pop("in_features")
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Row":
        """Raises InputError for a row that is none."""
        known = {field.name for field in fields(Row)} - {"in_features"} | {"in"}
        if not isinstance(values, Mapping) or set(values) != known:
            raise InputError(
                f"a row of a tuned table has the fields {', '.join(sorted(known))}; got {values!r}; delete the file or run matquant tune"
            )
        rest = {name: value for name, value in values.items() if name not in ("in", "config")}
        try:
            return Row(in_features=values["in"], config=Config(**values["config"]), **rest)
        except TypeError as error:
            raise InputError(f"{values['config']!r} is no configuration ({error}); delete the file or run matquant tune") from None


# Not measured: chosen so that a program's weights fill its threads, the programs fill some 130 multiprocessors, and nothing spills to memory.
UNTUNED_GEMV = Config("gemv", block_n=4, block_m=2, block_k=8, warps=1, stages=1)
GEMV_BATCH, GEMV_BITS = 2, 4  # at most; wider reads need more registers than a thread has
UNTUNED: tuple[tuple[int, Config], ...] = (
    (16, Config("dot", block_n=64, block_m=16, warps=4, stages=3, split_k=4)),
    (64, Config("dot", block_n=64, block_m=64, warps=4, stages=3, split_k=2)),
)
UNTUNED_LARGE = Config("dense")
MMA: tuple[tuple[int, Config], ...] = (
    (8, Config("mma", block_n=16, block_m=8, warps=4, stages=1, registers=128)),
    (16, Config("mma", block_n=32, block_m=16, warps=4, stages=1)),
)
GLUON = (3, 6)  # Triton's version from which the kernel mma compiles


def batch_class(batch: int) -> int:
    """The class of a batch: the next power of two, at most the last of BATCHES."""
    return next((size for size in BATCHES if size >= batch), BATCHES[-1])


def mma_runs(device: torch.device, dtype: torch.dtype, in_features: int, group: int) -> bool:
    """Whether the kernel mma computes such products: on NVIDIA's GPUs, in 16 bits, groups without padding, rows of x at multiples of 16 bytes."""
    return dtype in (torch.float16, torch.bfloat16) and group % 32 == 0 and in_features % 8 == 0 and _mma_device(device.type, device.index)


@lru_cache(maxsize=16)
def _mma_device(kind: str, index: int | None) -> bool:
    if kind != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    triton = tuple(int(part) for part in version("triton").split(".")[:2])
    if triton < GLUON or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        import matquant.kernels.gpu.jit_mma  # noqa: F401
    except (ImportError, AttributeError):  # Gluon is young: a later one may name things otherwise
        return False
    return True


def untuned(bits: int, batch: int, mma: bool = False) -> Config:
    """What is taken where nothing was measured. mma: whether that kernel runs."""
    if mma and batch <= MMA[-1][0]:
        return next(config for most, config in MMA if batch <= most)
    if bits <= GEMV_BITS and batch <= GEMV_BATCH:
        return UNTUNED_GEMV
    return next((config for most, config in UNTUNED if batch <= most), UNTUNED_LARGE)


def user_file() -> Path:
    """Where `matquant tune` writes: $MATQUANT_TUNED, or tuned.json in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get(USER_VARIABLE, cache / "matquant" / "tuned.json"))


def load(path: Path) -> tuple[Row, ...]:
    """The rows of a table; none where there is no file. Raises InputError for a file that is no table."""
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} is no table of configurations ({error}); delete it or run matquant tune") from None
    return tuple(Row.from_dict(row) for row in rows)


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write a table, or extend it: a row takes the place of one for the same product."""
    key = lambda row: (row.gpu, row.dtype, row.bits, row.batch, row.out, row.in_features, row.group)  # noqa: E731
    merged = {key(row): row for row in (*load(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [row.to_dict() for row in merged.values()]}, indent=1) + "\n")
    forget()


def forget() -> None:
    """Read the files again at the next choice."""
    _rows.cache_clear()
    _choose.cache_clear()


@lru_cache(maxsize=1)
def _rows() -> tuple[Row, ...]:
    return (*load(user_file()), *load(SHIPPED))


def choose(device: torch.device, dtype: torch.dtype, bits: int, batch: int, out: int, in_features: int, group: int) -> Config:
    """The configuration for a product. The same arguments give the same one until the files change and `forget` is called."""
    if dtype == torch.float32 and device.type == "cuda":  # tl.dot in float32 is unrolled into single products, which take minutes to compile
        return UNTUNED_LARGE
    mma = mma_runs(device, dtype, in_features, group)
    return _choose(
        _gpu_name(device.type, device.index), str(dtype).removeprefix("torch."), bits, batch_class(batch), batch, out, in_features, group, mma
    )


@lru_cache(maxsize=16)
def _gpu_name(kind: str, index: int | None) -> str:
    return torch.cuda.get_device_name(index) if kind == "cuda" else kind


def gpu_name(device: torch.device) -> str:
    """What rows call a device."""
    return _gpu_name(device.type, device.index)


@lru_cache(maxsize=4096)
def _choose(gpu: str, dtype: str, bits: int, batch: int, tokens: int, out: int, in_features: int, group: int, mma: bool) -> Config:
    fitting = [row for row in _rows() if row.gpu == gpu and row.bits == bits and (mma or row.config.kind != "mma")]
    nearest = min((row.batch for row in fitting), key=lambda size: (abs(log2(size / batch)), -size), default=0)
    if not batch / 2 <= nearest <= 2 * batch:
        return untuned(bits, tokens, mma)
    fitting = [row for row in fitting if row.batch == nearest]
    return min(fitting, key=lambda row: _distance(row, dtype, out, in_features, group)).config


def _distance(row: Row, dtype: str, out: int, in_features: int, group: int) -> tuple[float, float, bool]:
    """How far a product is from a measured one: shape first, its rows twice (they are the programs), then group, then type; the first of equals is the user's."""
    shape = 2 * abs(log2(out / row.out)) + abs(log2(in_features / row.in_features))
    return shape, abs(log2(group / row.group)), dtype != row.dtype
