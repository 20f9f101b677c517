"""Token ids in, token ids out, on a CPU: one copy of the planes, read at any width, which may change between any two tokens.

    engine = Engine.open(folder, bits=4, keep=8)
    for token in engine.generate(ids, 100): ...
    engine.set_bits(2)                       # nothing is loaded or copied
    engine.generate(ids, 100, draft_bits=2)  # self-speculative: drafted at 2 bits, verified at the engine's width
    session = engine.session()               # a text that grows: only new tokens pass
    for token in session.reply(ids, 100): ...
    for token in session.reply(more, 100): ...

Greedy output with drafts (speculation.py) is that of plain decoding to the token, because a row is computed the same alone or among others; sampled output
has the same distribution.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matquant import llama, tables
from matquant.checkpoint import Checkpoint, choose
from matquant.checkpoint.files import parse_json
from matquant.codes import Grid
from matquant.errors import InputError, PlanError, UnservedError, choices
from matquant.kernels import cpu
from matquant.kernels.step import Cache, Stepper
from matquant.plan import BitPlan
from matquant.speculation import Picker, Speculation, speculate
from matquant.threads import for_steps_of
from matquant.weight import NestedWeight

HEAD_BITS = 8  # of a head that is rounded when it is loaded
PREFILL = 192  # tokens of a prompt that pass at once: two panels of the kernels; what they need grows with them, their speed does not


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; empty if there is none."""
    return parse_json(path.read_bytes(), str(path)) if path.is_file() else {}


def _give_back() -> None:
    """Let the system have memory that is free: glibc keeps up to twice the largest array freed so far, for every thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _head(checkpoint: Checkpoint, shape: llama.Served, bits: int | None, pool: Executor) -> NestedWeight:
    """The head as stored, or rounded to `bits` if it is not quantized; a tied one is the embedding's. Raises InputError for other bits than are stored."""
    if shape.head in checkpoint.modules:
        return checkpoint.read(shape.head)
    known = {*checkpoint.tables, *(name.removesuffix(".weight") for name in checkpoint.base)}
    name = next(name for name in (shape.head, shape.embedding) if name in known)
    if (table := checkpoint.tables.get(name)) is not None:
        if bits not in (None, table.bits):
            raise InputError(
                f"head_bits is {bits}, but {checkpoint.folder} stores its head at {table.bits} bits; leave head_bits out, or quantize with --head-bits {bits}"
            )
        return checkpoint.table(name)
    out, hidden = checkpoint.base_shapes[f"{name}.weight"]
    grid = Grid(bits or HEAD_BITS, tables.fitting_group(hidden), symmetric=False, overlap=False)
    return tables.rounded_rows(lambda first, end: checkpoint.rows(f"{name}.weight", first, end), out, hidden, grid, pool)


@dataclass
class Engine:
    """One model in memory. embeddings: [vocabulary, hidden] by rows, as stored, mapped from the file. kept: widths that each layer was packed for."""

    stepper: Stepper
    embeddings: Tensor | tables.Rows
    checkpoint: Checkpoint
    shape: llama.Served
    kept: Mapping[str, tuple[int, ...]]
    plan: BitPlan
    capacity: int
    exact: bool = False
    threads: int | None = None
    speculation: Speculation = field(default_factory=Speculation)
    known: dict[Any, Tensor] = field(default_factory=dict[Any, Tensor], repr=False)  # what `widths` found, by plan

    @staticmethod
    def open(
        folder: str | Path,
        bits: int | float | str | BitPlan | None = None,
        keep: int | None = None,
        *,
        capacity: int = 4096,
        head_bits: int | None = None,
        exact: bool = False,
        threads: int | None = None,
        isa: str | None = None,
    ) -> "Engine":
        """Pack the layers of a checkpoint for the widths up to `keep` (None: each for the one that `bits` gives it; all if that is None too).

        bits: as for `matquant.from_pretrained`: a width, a BitPlan, the name of a plan, a plan file, or a mean width.
        capacity: tokens of a text, at most; less where the model has fewer positions. head_bits: what a head that is not quantized is rounded to (None: 8).
        exact: products of floats instead of 8-bit inputs. Raises UnservedError for what it cannot read: a model of another shape than Llama's, a slicing other than floor; otherwise as `matquant.from_pretrained`.
        """
        checkpoint = Checkpoint.open(folder)
        if isinstance(bits, str | float):
            from matquant.search.plans import resolve  # brings transformers, which takes as much memory as a small model

            bits = resolve(Path(folder), bits)
        plan, widest = choose(checkpoint, bits, keep)
        if (slicing := checkpoint.layout.slicing) != "floor":
            raise UnservedError(f"the engine reads slicing floor, not {slicing}; use matquant.from_pretrained")
        single = bits is not None and keep is None
        wide = tuple(r for r in checkpoint.widths if r <= widest)
        kept = {name: (plan.bits(name),) if single else wide for name in checkpoint.modules}
        shape = llama.served(Path(folder))
        names = [shape.name(i, part) for i in range(shape.count) for part in llama.PARTS]
        if missing := [name for name in names if name not in checkpoint.modules]:
            raise UnservedError(
                f"{missing[0]} is not quantized in {folder}, and the engine reads quantized layers alone; use matquant.from_pretrained"
            )
        checkpoint.check_files(widest)
        workers = threads or torch.get_num_threads()
        with for_steps_of(1), ThreadPoolExecutor(workers) as pool:  # a thread a layer: all of it but the reads is one array after the other
            # The largest first: what a layer takes on its way comes on top of those that are packed.
            names.sort(key=lambda name: -checkpoint.modules[name].weights)
            weights = {shape.head: cpu.pack(head := _head(checkpoint, shape, head_bits, pool), (head.grid.bits,), isa, workers)}
            del head
            for at in range(0, len(names), len(llama.PARTS)):
                own = names[at : at + len(llama.PARTS)]
                weights |= zip(own, pool.map(lambda name: cpu.pack(checkpoint.read(name, kept[name]), kept[name], isa, 1), own), strict=True)
                _give_back()
        stepper = llama.stepper_of(shape, weights.__getitem__, checkpoint.base.__getitem__)
        quantized = shape.embedding in checkpoint.tables
        rows = tables.Rows.of(checkpoint, shape.embedding) if quantized else checkpoint.base[f"{shape.embedding}.weight"]
        return Engine(stepper, rows, checkpoint, shape, kept, plan, min(capacity, shape.longest), exact, threads)

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end a text, by generation_config.json, or else config.json."""
        ends = _json(self.checkpoint.folder / "generation_config.json").get("eos_token_id", self.checkpoint.config.get("eos_token_id"))
        return tuple(token for token in (ends if isinstance(ends, list) else [ends]) if isinstance(token, int))

    def read_bytes(self, bits: int | BitPlan) -> int:
        """Bytes of weights that one token reads, the head's included."""
        plan = BitPlan(bits) if isinstance(bits, int) else bits
        layers = (
            (weight, plan.bits(self.shape.name(i, part))) for i, block in enumerate(self.stepper.blocks) for part, weight in block.weights.items()
        )
        head = self.stepper.head
        return sum(weight.read_bytes(width) for weight, width in layers) + head.read_bytes(head.widths[0])

    def set_bits(self, bits: int | BitPlan) -> None:
        """Read at `bits` from the next token on. Raises PlanError for a width that was not kept."""
        plan = BitPlan(bits) if isinstance(bits, int) else bits.check(self.checkpoint.modules, self.checkpoint.layout.widths)
        self.widths(plan)
        self.plan = plan

    def widths(self, plan: BitPlan) -> UInt8[Tensor, " widths"]:
        """What the stepper takes for `plan`. Raises PlanError for a width that was not kept. Found once for a plan: a step is short."""
        key = plan.default, frozenset(plan.overrides.items())
        if key in self.known:
            return self.known[key]
        names = [{part: self.shape.name(i, part) for part in llama.PARTS} for i in range(len(self.stepper.blocks))]
        for name in (name for own in names for name in own.values()):
            if (width := plan.bits(name)) not in self.kept[name]:
                raise PlanError(f"{width} bits were not kept of {name}; {choices(width, self.kept[name])}, or open the checkpoint with keep={width}")
        self.known[key] = self.stepper.widths([{part: plan.bits(name) for part, name in own.items()} for own in names])
        return self.known[key]

    def step(
        self, ids: Int[Tensor, " tokens"], sequence: Int[Tensor, " tokens"], position: Int[Tensor, " tokens"], cache: Cache, rows: Int[Tensor, " wanted"],
        plan: BitPlan | None = None, words: int | None = None,
    ) -> Float[Tensor, "wanted words"]:  # fmt: skip
        """Logits of some of the tokens, each given its sequence and its position in it. words: of the first of the vocabulary only."""
        widths = self.widths(plan or self.plan)
        return self.stepper.step(widths, self.embeddings[ids], sequence, position, cache, rows, words, self.exact, self.threads)

    def logits(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens vocabulary"]:
        """Of a whole text, at every position."""
        return Session(self, self.stepper.cache(1, len(ids))).read(ids.tolist(), 0, last=len(ids))

    # --- one text ---------------------------------------------------------------------------------------------------

    def session(self, capacity: int | None = None) -> "Session":
        """An empty text of at most `capacity` tokens (None: as many as there is room for; those that no token has reached take no memory)."""
        return Session(self, self.stepper.cache(1, min(capacity or self.capacity, self.capacity)))

    def generate(
        self, ids: Sequence[int], new: int, temperature: float = 0.0, seed: int = 0, draft_bits: int | None = None, stop: Sequence[int] = ()
    ) -> Iterator[int]:
        """At most `new` tokens after `ids`, one by one; as Session.reply."""
        return self.session(max(len(ids) + new, 1)).reply(ids, new, temperature, seed, draft_bits, stop)


@dataclass
class Session:
    """One text that grows, and the keys and values of its tokens: what has passed once does not pass again.

    ids: of the whole text. passed: how many of them have keys and values in `cache`. Those stay what the widths of their time made them.
    """

    engine: Engine
    cache: Cache
    ids: list[int] = field(default_factory=list[int])
    passed: int = 0

    def rewind(self, ids: Sequence[int]) -> list[int]:
        """Go back to the longest beginning that the text shares with `ids`. Returns the rest of `ids`, which `reply` may go on with."""
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), min(len(self.ids), len(ids)))
        del self.ids[same:]
        self.passed = min(self.passed, same)
        return list(ids[same:])

    def reply(
        self, ids: Sequence[int], new: int, temperature: float = 0.0, seed: int = 0, draft_bits: int | None = None, stop: Sequence[int] = ()
    ) -> Iterator[int]:
        """At most `new` tokens after the text and `ids`, one by one; ends behind one of `stop`. Greedy at temperature 0.

        Each token belongs to the text as soon as it is handed out, so a reply may be left at any token and the text goes on from there.
        draft_bits: draft at this width, where the text does not repeat itself (speculation.py). Raises InputError for a text without tokens, or one that leaves no room for new ones.
        """
        if not ids and not self.ids:
            raise InputError("the prompt has no tokens; give at least one")
        if (length := len(self.ids) + len(ids)) + new > (room := min(self.cache.capacity, self.engine.capacity)):
            raise InputError(f"{length} tokens and {new} new ones are more than the {room} there is room for; ask for fewer")
        self.passed = min(self.passed, len(self.ids))  # a reply that was left had passed drafted tokens too
        self.ids += ids
        self.passed = min(self.passed, len(self.ids) - 1)
        pick = Picker(temperature, torch.Generator().manual_seed(seed))
        if draft_bits:
            self.engine.widths(BitPlan(draft_bits))  # refused before a token passes
        for token in speculate(self, new, pick, draft_bits) if draft_bits else self._plain(new, pick):
            self.ids.append(token)
            yield token
            if token in stop:
                return

    def read(
        self, ids: Sequence[int], start: int, plan: BitPlan | None = None, last: int = 1, words: int | None = None
    ) -> Float[Tensor, "last words"]:
        """Logits of the last tokens of `ids`, whose first has position `start`; of the first `words` of the vocabulary. None: as Engine.step."""
        found: list[Tensor] = []
        for at in range(0, len(ids), PREFILL):
            part = ids[at : at + PREFILL]
            wanted = torch.arange(max(len(part) - max(last - (len(ids) - at - len(part)), 0), 0), len(part), dtype=torch.int32)
            sequence = torch.zeros(len(part), dtype=torch.int32)
            position = torch.arange(start + at, start + at + len(part), dtype=torch.int32)
            found.append(self.engine.step(torch.tensor(part), sequence, position, self.cache, wanted, plan, words))
        return found[0] if len(found) == 1 else torch.cat(found)

    def advance(self) -> Float[Tensor, " vocabulary"]:
        """Pass what has not passed. Returns the logits of the last token."""
        logits = self.read(self.ids[self.passed :], self.passed)
        self.passed = len(self.ids)
        return logits[-1]

    def _plain(self, new: int, pick: Picker) -> Iterator[int]:
        for _ in range(new):
            yield pick.choose(self.advance())[0]
