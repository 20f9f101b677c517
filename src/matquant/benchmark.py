"""How fast the engine serves a checkpoint here: decoding, prefill, bytes of weights a second against what the memory gives, peak memory.

Everything runs in turn, width after width, as often as there are repeats, so that a slow minute hits all widths; numbers are medians. The prompt is
sampled from the model itself at its widest, so no text is needed, and drafts meet text as they would in use.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from matquant.codes import Grid
from matquant.engine import Engine
from matquant.errors import InputError, ResourceError
from matquant.kernels import cpu
from matquant.kernels.cpu import PackedWeight
from matquant.speculation import Speculation
from matquant.weight import NestedWeight

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_PROBE = 2**28  # bytes that a probe reads at least
PROBES = 5  # passes of a probe; the fastest counts, for it says what the memory can do
PRODUCTS = 40  # products of each shape and width that are timed, at least one of each layer
EMPTY = 32  # rows and columns of the weight whose product costs what a call costs


@dataclass(frozen=True)
class Width:
    """One read width. tokens a second; read_bytes: of weights, a token; share: of the bandwidth that the probe measured; peak_bytes: None where unknown."""

    bits: int
    decode: float
    prefill: float
    read_bytes: int
    read_gb_s: float
    share: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Draft:
    """Self-speculation. decode: tokens a second; speedup: over plain decoding at `bits`; acceptance: share of the tokens drafted at draft_bits; repeated:
    share of all tokens that were drafted from the text itself."""

    bits: int
    draft_bits: int
    decode: float
    speedup: float
    acceptance: float
    repeated: float
    tokens_per_pass: float


@dataclass(frozen=True)
class Latency:
    """Seconds of one product of one row with a weight [out, in] that is in no cache."""

    out: int
    in_features: int
    bits: int
    seconds: float


@dataclass(frozen=True)
class Benchmark:
    """bandwidth_gb_s: of reads. overhead_seconds: of a decode step beyond the products of its layers: head, attention, norms, sampling."""

    model: str
    isa: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    head_bits: int
    bandwidth_gb_s: float
    widths: tuple[Width, ...]
    drafts: tuple[Draft, ...]
    latency: tuple[Latency, ...]
    overhead_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: a latency's `in_features` is "in"."""
        found = asdict(self)
        found["latency"] = [{("in" if name == "in_features" else name): value for name, value in row.items()} for row in found["latency"]]
        return found


@dataclass(frozen=True)
class Setting:
    """What to measure. widths: to read at, descending. drafts: widths to draft at for the widest. memory: measure peaks, in processes of their own."""

    widths: tuple[int, ...]
    drafts: tuple[int, ...] = ()
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    threads: int | None = None
    head_bits: int | None = None
    memory: bool = True


def measure(folder: Path, setting: Setting, progress: Callable[[str, int, int], None] = lambda stage, done, of: None) -> Benchmark:
    """Raises as Engine.open, and InputError for more tokens than the model has room for."""
    threads = setting.threads or torch.get_num_threads()
    peaks: dict[int, int | None] = {}
    for done, bits in enumerate(setting.widths if setting.memory else ()):
        progress("memory", done, len(setting.widths))
        peaks[bits] = peak_memory(folder, bits, setting.prompt_tokens, setting.new_tokens, threads, setting.head_bits)
    engine = Engine.open(folder, max(setting.widths), max(setting.widths), head_bits=setting.head_bits, threads=threads)
    if (total := setting.prompt_tokens + setting.new_tokens) > engine.capacity:
        raise InputError(f"{total} tokens are more than the {engine.capacity} there is room for; ask for fewer (--prompt-tokens, --new-tokens)")
    before = bandwidth(threads)
    prompt = prompt_of(engine, setting.prompt_tokens)
    plain, drafted = _runs(engine, prompt, setting, progress)
    latency = tuple(_latency(engine, setting.widths, threads, progress))
    gb_s = median([before, bandwidth(threads)])
    decode = {bits: median(rates) for bits, (rates, _) in plain.items()}
    widths = tuple(
        Width(bits, rate, median(plain[bits][1]), read := engine.read_bytes(bits), read * rate / 1e9, read * rate / 1e9 / gb_s, peaks.get(bits))
        for bits, rate in decode.items()
    )
    widest = max(setting.widths)
    drafts = tuple(
        Draft(widest, bits, rate := median(rates), rate / decode[widest], done.acceptance, done.repeated, done.per_pass)
        for bits, (rates, done) in drafted.items()
    )
    counts = (setting.prompt_tokens, setting.new_tokens, setting.repeats, engine.stepper.head.widths[0])
    overhead = _overhead(engine, decode, latency)
    return Benchmark(folder.resolve().name, engine.stepper.head.isa, threads, *counts, gb_s, widths, drafts, latency, overhead)


# --- texts ----------------------------------------------------------------------------------------------------------


def prompt_of(engine: Engine, count: int) -> list[int]:
    """Tokens that the model writes at its widest, behind the one that begins a text."""
    config = engine.checkpoint.config
    first = next((config[name] for name in ("bos_token_id", "eos_token_id") if isinstance(config.get(name), int)), 0)
    return [first, *engine.generate([first], count - 1, temperature=1.0)]


def _runs(
    engine: Engine, prompt: Sequence[int], setting: Setting, progress: Callable[[str, int, int], None]
) -> tuple[dict[int, tuple[list[float], list[float]]], dict[int, tuple[list[float], Speculation]]]:
    """(width -> tokens a second of decoding and of prefill, draft width -> tokens a second and what the drafts were worth), one a repeat."""
    plain: dict[int, tuple[list[float], list[float]]] = {bits: ([], []) for bits in setting.widths}
    drafted: dict[int, tuple[list[float], Speculation]] = {bits: ([], Speculation()) for bits in setting.drafts}
    for repeat in range(setting.repeats):
        progress("decoding", repeat, setting.repeats)
        for bits, (decode, prefill) in plain.items():
            engine.set_bits(bits)
            first, rest = times_of(engine, prompt, setting.new_tokens)
            decode.append((setting.new_tokens - 1) / rest)
            prefill.append(len(prompt) / first)
        engine.set_bits(max(setting.widths))
        for bits, (decode, done) in drafted.items():
            engine.speculation = done
            decode.append((setting.new_tokens - 1) / times_of(engine, prompt, setting.new_tokens, bits)[1])
    progress("decoding", setting.repeats, setting.repeats)
    return plain, drafted


def times_of(engine: Engine, prompt: Sequence[int], new: int, draft: int | None = None) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last. Greedy."""
    started = time.perf_counter()
    tokens = engine.generate(prompt, new, draft_bits=draft)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - started, time.perf_counter() - first


# --- bytes ----------------------------------------------------------------------------------------------------------


def bandwidth(threads: int) -> float:
    """GB a second that `threads` threads read from memory: torch's sum over float32 numbers that do not fit the last cache.

    A sum that comes from memory waits for it, so this is a lower bound of what the memory gives, and near it.
    """
    numbers = torch.ones(max(LEAST_PROBE, 2 * last_cache()) // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = min(_seconds(numbers.sum) for _ in range(PROBES))
    finally:
        torch.set_num_threads(before)
    return numbers.nbytes / best / 1e9


def last_cache() -> int:
    """Bytes of the last-level cache, where the system tells (Linux); else 0."""
    sizes = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")), default=0)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _weights(engine: Engine) -> Iterator[PackedWeight]:
    for block in engine.stepper.blocks:
        yield from block.weights.values()


def _latency(engine: Engine, widths: Sequence[int], threads: int, progress: Callable[[str, int, int], None]) -> Iterator[Latency]:
    """For each shape and width, going round the model's own layers of that shape, so that none is in a cache; less the cost of a call."""
    shapes: dict[tuple[int, int], list[PackedWeight]] = {}
    for weight in _weights(engine):
        shapes.setdefault(weight.shape, []).append(weight)
    call = _call(threads)
    flush = torch.ones(max(LEAST_PROBE, last_cache()) // 4)
    for done, ((out, in_features), weights) in enumerate(shapes.items()):
        progress("products", done, len(shapes))
        x = torch.randn(1, in_features, generator=torch.Generator().manual_seed(0))
        for bits in widths:
            rounds = -(-PRODUCTS // len(weights))
            seconds: list[float] = []
            for _ in range(rounds):
                flush.sum()
                seconds += [_seconds(lambda weight=weight, x=x, bits=bits: cpu.linear(x, weight, bits, threads=threads)) for weight in weights]
            yield Latency(out, in_features, bits, max(median(seconds) - call, 0.0))
    progress("products", len(shapes), len(shapes))


def _call(threads: int) -> float:
    """Seconds of a product so small that it is nothing but a call."""
    grid = Grid(8, -1, symmetric=True, overlap=False)
    codes = torch.zeros(EMPTY, EMPTY, dtype=torch.uint8)
    weight = cpu.pack(NestedWeight(codes, torch.ones(EMPTY, 1, dtype=torch.float16), None, grid, "floor"), (8,))
    x: Tensor = torch.ones(1, EMPTY)
    return median(_seconds(lambda: cpu.linear(x, weight, 8, threads=threads)) for _ in range(PRODUCTS))


def _overhead(engine: Engine, decode: dict[int, float], latency: Sequence[Latency]) -> float:
    """Seconds of a step that are not products of layers: the median over widths."""
    of = {(row.out, row.in_features, row.bits): row.seconds for row in latency}
    rest = [1 / rate - sum(of[(*weight.shape, bits)] for weight in _weights(engine)) for bits, rate in decode.items()]
    return max(median(rest), 0.0)


# --- memory ---------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
import torch
from matquant.benchmark import own_peak
from matquant.engine import Engine
folder, bits, prompt, new, threads, head_bits = json.loads(sys.argv[1])
torch.set_num_threads(threads)
engine = Engine.open(Path(folder), bits, head_bits=head_bits, threads=threads)
made = len(list(engine.generate([1] * prompt, new)))
print(json.dumps([own_peak(), made]))
"""


def peak_memory(folder: Path, bits: int, prompt: int, new: int, threads: int, head_bits: int | None = None) -> int | None:
    """Most bytes resident of a process that opens the checkpoint at one width and continues a prompt; None where the system does not tell."""
    arguments = json.dumps([str(folder), bits, prompt, new, threads, head_bits])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    if done.returncode:
        raise ResourceError(f"a process that serves {folder} at {bits} bits ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])[0]


def own_peak() -> int | None:
    """Most bytes resident of this process. Linux' VmHWM and not getrusage, which remembers the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
