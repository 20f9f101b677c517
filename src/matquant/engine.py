"""Token ids in, token ids out, on a CPU: one copy of the planes, read at any width, which may change between any two tokens.

    engine = Engine.open(folder, bits=4, keep=8)
    for token in engine.generate(ids, 100): ...
    engine.set_bits(2)                       # nothing is loaded or copied
    engine.generate(ids, 100, draft_bits=2)  # self-speculative: drafted at 2 bits, verified at the engine's width

Self-speculation is speculative decoding (https://arxiv.org/abs/2211.17192) with a narrower read of the same weights as the draft model (as QSpec's,
https://arxiv.org/abs/2410.11305): the verifier's pass over the drafted tokens writes its own keys and values over the draft's, so both share one
cache. Greedy output is that of plain decoding to the token, because a row is computed the same alone or among others; sampled output has
the same distribution.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matquant import llama
from matquant.checkpoint import Checkpoint
from matquant.codes import Grid
from matquant.errors import InputError, PlanError, choices
from matquant.hf import choose
from matquant.kernels.step import Cache, Stepper
from matquant.plan import BitPlan
from matquant.search.plans import Wanted, resolve

HEAD_GROUPS = (64, 32)  # input channels that share a scale of the head: the first that divides them
PREFILL = 512  # tokens of a prompt that pass at once
DRAFT = 4  # tokens that are drafted at first
MOST_DRAFTED = 12


@dataclass
class Speculation:
    """What self-speculation did. drafted, accepted: tokens. passes: of the verifier."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that the verifier accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class Engine:
    """One model in memory. embeddings: [vocabulary, hidden], as stored, mapped from the file. kept: widths that each layer was packed for."""

    stepper: Stepper
    embeddings: Tensor
    checkpoint: Checkpoint
    shape: llama.Plan
    kept: Mapping[str, tuple[int, ...]]
    plan: BitPlan
    capacity: int
    exact: bool = False
    threads: int | None = None
    speculation: Speculation = field(default_factory=Speculation)

    @staticmethod
    def open(
        folder: str | Path,
        bits: Wanted = None,
        keep: int | None = None,
        *,
        capacity: int = 4096,
        head_bits: int = 8,
        exact: bool = False,
        threads: int | None = None,
        isa: str | None = None,
    ) -> "Engine":
        """Pack the layers of a checkpoint for the widths up to `keep` (None: each for the one that `bits` gives it; all if that is None too).

        bits: as for `matquant.from_pretrained`: a width, a BitPlan, the name of a plan, a plan file, or a mean width.
        capacity: tokens of a text, at most; less where the model has fewer positions. head_bits: what a head that is not quantized is rounded to.
        exact: products of floats instead of 8-bit inputs. Raises InputError for a model of another shape than Llama's; otherwise as `matquant.from_pretrained`.
        """
        checkpoint = Checkpoint.open(folder)
        bits = resolve(Path(folder), bits)
        plan, widest = choose(checkpoint, bits, keep)
        single = bits is not None and keep is None
        wide = tuple(r for r in checkpoint.widths if r <= widest)
        kept = {name: (plan.bits(name),) if single else wide for name in checkpoint.modules}
        skeleton = llama.skeleton_of(Path(folder))
        shape = llama.plan_of(skeleton)
        llama.try_out(skeleton.config)
        layers = range(len(skeleton.base_model.layers))
        missing = [name for i in layers for part in llama.PARTS if (name := shape.name(i, part)) not in checkpoint.modules]
        if missing:
            raise InputError(f"{missing[0]} is not quantized in {folder}, and the engine reads quantized layers alone; use matquant.from_pretrained")
        names = {id(module): name for name, module in skeleton.named_modules()}
        embedding, head = (names[id(module)] for module in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings()))
        base = checkpoint.base
        table = base[f"{embedding}.weight"]
        if head in checkpoint.modules:
            of_head = checkpoint.read(head)
        else:
            weight = base.get(f"{head}.weight", table)
            size = next((size for size in HEAD_GROUPS if weight.shape[1] % size == 0), -1)
            of_head = llama.rounded(weight, Grid(head_bits, size, symmetric=False, overlap=False))
        stepper = llama.stepper_of(shape, lambda name: checkpoint.read(name, kept[name]), base.__getitem__, kept, of_head, isa)
        return Engine(stepper, table, checkpoint, shape, kept, plan, min(capacity, shape.longest), exact, threads)

    def set_bits(self, bits: int | BitPlan) -> None:
        """Read at `bits` from the next token on. Raises PlanError for a width that was not kept."""
        plan = BitPlan(bits) if isinstance(bits, int) else bits.check(self.checkpoint.modules, self.checkpoint.layout.widths)
        self._widths(plan)
        self.plan = plan

    def _widths(self, plan: BitPlan) -> UInt8[Tensor, " widths"]:
        names = [{part: self.shape.name(i, part) for part in llama.PARTS} for i in range(len(self.stepper.blocks))]
        for name in (name for own in names for name in own.values()):
            if (width := plan.bits(name)) not in self.kept[name]:
                raise PlanError(f"{width} bits were not kept of {name}; {choices(width, self.kept[name])}, or open the checkpoint with keep={width}")
        return self.stepper.widths([{part: plan.bits(name) for part, name in own.items()} for own in names])

    def step(
        self, ids: Int[Tensor, " tokens"], sequence: Int[Tensor, " tokens"], position: Int[Tensor, " tokens"], cache: Cache, rows: Int[Tensor, " wanted"],
        plan: BitPlan | None = None,
    ) -> Float[Tensor, "wanted vocabulary"]:  # fmt: skip
        """Logits of some of the tokens, each given its sequence and its position in it."""
        widths = self._widths(plan or self.plan)
        return self.stepper.step(widths, self.embeddings[ids], sequence, position, cache, rows, self.exact, self.threads)

    def logits(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens vocabulary"]:
        """Of a whole text, at every position."""
        cache, places = self.stepper.cache(1, len(ids)), torch.arange(len(ids))
        return torch.cat([self.step(ids[p], torch.zeros_like(p), p, cache, torch.arange(len(p))) for p in places.split(PREFILL)])

    # --- one text ---------------------------------------------------------------------------------------------------

    def generate(
        self, ids: Sequence[int], new: int, temperature: float = 0.0, seed: int = 0, draft_bits: int | None = None, stop: Sequence[int] = ()
    ) -> Iterator[int]:
        """At most `new` tokens after `ids`, one by one; ends behind one of `stop`. Greedy at temperature 0.

        draft_bits: draft at this width. Raises InputError for an empty prompt, or one that leaves no room for new tokens.
        """
        if not ids:
            raise InputError("the prompt has no tokens; give at least one")
        if len(ids) + new > self.capacity:
            raise InputError(f"{len(ids)} tokens and {new} new ones are more than the {self.capacity} there is room for; ask for fewer")
        pick = _Picker(temperature, torch.Generator().manual_seed(seed))
        cache = self.stepper.cache(1, len(ids) + new)
        tokens = self._speculative(list(ids), new, pick, cache, BitPlan(draft_bits)) if draft_bits else self._plain(list(ids), new, pick, cache)
        for token in tokens:
            yield token
            if token in stop:
                return

    def _pass(self, ids: Sequence[int], start: int, cache: Cache, plan: BitPlan | None = None, last: int = 1) -> Float[Tensor, "last vocabulary"]:
        """Logits of the last tokens of `ids`, whose first has position `start`."""
        places = torch.arange(start, start + len(ids))
        found = []
        for part in places.split(PREFILL):
            done = int(part[-1]) - start + 1
            wanted = torch.arange(max(len(part) - max(last - (len(ids) - done), 0), 0), len(part))
            found.append(self.step(torch.tensor(ids)[part - start], torch.zeros_like(part), part, cache, wanted, plan))
        return torch.cat(found)

    def _plain(self, ids: list[int], new: int, pick: "_Picker", cache: Cache) -> Iterator[int]:
        logits = self._pass(ids, 0, cache)
        for count in range(new):
            token = pick.token(pick.probabilities(logits[-1]))
            yield token
            if count + 1 < new:
                logits = self._pass([token], len(ids) + count, cache)

    def _speculative(self, ids: list[int], new: int, pick: "_Picker", cache: Cache, draft: BitPlan) -> Iterator[int]:
        self._widths(draft)
        length, made = DRAFT, 1
        token = pick.token(pick.probabilities(self._pass(ids, 0, cache)[-1]))
        yield token
        place = len(ids)  # of `token`, which has passed neither reader
        while made < new:
            drafted, beliefs = self._draft(token, place, min(length, new - made - 1), pick, cache, draft)
            logits = self._pass([token, *drafted], place, cache, last=len(drafted) + 1)
            accepted, following = pick.verify(drafted, beliefs, logits)
            self.speculation.drafted += len(drafted)
            self.speculation.accepted += accepted
            self.speculation.passes += 1
            length = min(length + 2, MOST_DRAFTED) if accepted == len(drafted) else max(1, (length + accepted + 1) // 2)
            for found in [*drafted[:accepted], following][: new - made]:
                yield found
                made += 1
            token, place = following, place + accepted + 1

    def _draft(self, token: int, place: int, count: int, pick: "_Picker", cache: Cache, draft: BitPlan) -> tuple[list[int], list[Tensor]]:
        """(tokens that the narrow read would write, the probabilities that it drew them from)."""
        drafted: list[int] = []
        beliefs: list[Tensor] = []
        for index in range(count):
            logits = self._pass([drafted[-1] if drafted else token], place + index, cache, draft)
            beliefs.append(pick.probabilities(logits[-1]))
            drafted.append(pick.token(beliefs[-1]))
        return drafted, beliefs


@dataclass(frozen=True)
class _Picker:
    """How tokens are chosen from logits."""

    temperature: float
    generator: torch.Generator

    def probabilities(self, logits: Float[Tensor, " vocabulary"]) -> Float[Tensor, " vocabulary"]:
        """All on the most probable token at temperature 0."""
        if not self.temperature:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        return torch.softmax(logits.double() / self.temperature, 0).float()

    def token(self, probabilities: Float[Tensor, " vocabulary"]) -> int:
        if not self.temperature:
            return int(probabilities.argmax())
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def verify(self, drafted: Sequence[int], beliefs: Sequence[Tensor], logits: Float[Tensor, "drafted_and_one vocabulary"]) -> tuple[int, int]:
        """(how many drafted tokens stand, the token after them). Token t of belief q stands with probability min(1, p(t) / q(t)); else it is
        drawn anew from what p has over q."""
        for index, (token, q) in enumerate(zip(drafted, beliefs, strict=True)):
            p = self.probabilities(logits[index])
            if torch.rand((), generator=self.generator) * q[token] < p[token]:
                continue
            rest = (p - q).clamp(min=0)
            return index, self.token(rest if rest.sum() > 0 else p)
        return len(drafted), self.token(self.probabilities(logits[len(drafted)]))
