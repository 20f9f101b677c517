"""Self-speculative decoding: tokens are drafted cheaply, and one pass of the wide read verifies several of them (https://arxiv.org/abs/2211.17192).

    speed over plain decoding = (1 + a + ... + a^k) / (k c + 1 + k v)      k drafted tokens, each accepted with probability a,
                                                                           c: a draft's cost, v: a further row's in a pass, in plain steps

Drafts come from the text itself, where its last words have occurred before (https://github.com/apoorvumang/prompt-lookup-decoding: c = 0), or else
from a narrower read of the same weights (as QSpec's, https://arxiv.org/abs/2410.11305), whose keys and values the verifier's overwrite. Ours is
when to stop: no draft goes on once it stands as a whole with less than even odds, by the draft's own probabilities, or by how often drafts
have stood so far; and a read that costs more than it brings is not asked, but now and then. Nothing depends on the clock, so a seed gives one text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matquant.kernels.step import Stepper
from matquant.plan import BitPlan

ODDS = 0.5  # that a draft stands as a whole, below which it does not go on
MOST_DRAFTED = 12
FIRST_RATE, MEMORY = 0.8, 0.1  # of acceptance: what is believed at first, and what one more token counts
WORDS = 3  # tokens whose earlier occurrence is followed
ROW = 0.2  # v: what a further row costs a pass, in steps of one row
CALL = 0.1  # what a draft costs besides the bytes that it reads, in such steps
ASK_AGAIN = 24  # passes after which a read that did not pay is asked again
BLOCK = 256  # words of the vocabulary
HEAD_PART = 3  # a draft may read the first one of so many parts of the vocabulary


@dataclass
class Speculation:
    """What self-speculation did. drafted, accepted: tokens by the narrow read. copied, stood: of the text itself. made: all tokens. passes: of the verifier."""

    drafted: int = 0
    accepted: int = 0
    copied: int = 0
    stood: int = 0
    made: int = 0
    passes: int = 0

    @property
    def acceptance(self) -> float:
        """Share of tokens drafted by the narrow read that the verifier accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def repeated(self) -> float:
        """Share of all tokens that were copied from the text itself and stood."""
        return self.stood / self.made if self.made else 0.0

    @property
    def per_pass(self) -> float:
        """Tokens that a pass of the verifier led to."""
        return self.made / self.passes if self.passes else 0.0


@runtime_checkable
class Reader(Protocol):
    """A model that is read at `plan` (engine.Engine)."""

    stepper: Stepper
    plan: BitPlan
    speculation: Speculation

    def read_bytes(self, bits: BitPlan) -> int: ...


@runtime_checkable
class Text(Protocol):
    """A text that grows (engine.Session). passed: how many tokens have keys and values."""

    engine: Reader
    ids: list[int]
    passed: int

    def read(
        self, ids: Sequence[int], start: int, plan: BitPlan | None = None, last: int = 1, words: int | None = None
    ) -> Float[Tensor, "last words"]: ...

    def advance(self) -> Float[Tensor, " vocabulary"]: ...


@dataclass(frozen=True)
class Picker:
    """How tokens are chosen from logits: the most probable at temperature 0, else drawn."""

    temperature: float
    generator: torch.Generator

    def probabilities(self, logits: Float[Tensor, " vocabulary"]) -> Float[Tensor, " vocabulary"]:
        return torch.softmax(logits / self.temperature, 0)

    def draw(self, probabilities: Float[Tensor, " vocabulary"]) -> int:
        """By the inverse of the cumulated distribution: which block of the vocabulary, then which word of it. torch.multinomial takes as long as a third
        of a small model's step."""
        p = probabilities.numpy()
        sums = np.add.reduceat(p, np.arange(0, len(p), BLOCK), dtype=np.float64)
        edges = sums.cumsum()
        place = float(torch.rand((), generator=self.generator, dtype=torch.float64)) * edges[-1]
        block = min(int(np.searchsorted(edges, place, "right")), len(sums) - 1)
        own = p[block * BLOCK : (block + 1) * BLOCK]
        word = int(np.searchsorted(own.cumsum(dtype=np.float64), place - (edges[block] - sums[block]), "right"))
        return block * BLOCK + (word if word < len(own) else int(own.nonzero()[0][-1]))  # beyond the last by rounding: the last that is possible

    def choose(self, logits: Float[Tensor, " vocabulary"]) -> tuple[int, Tensor | None]:
        """(the next token, what it was drawn from; None if it was not drawn). numpy's argmax takes a twentieth of torch's time."""
        if not self.temperature:
            return int(logits.numpy().argmax()), None
        p = self.probabilities(logits)
        return self.draw(p), p

    def verify(
        self, drafted: Sequence[int], beliefs: Sequence[Tensor | None], logits: Float[Tensor, "drafted_and_one vocabulary"]
    ) -> tuple[int, int]:
        """(how many drafted tokens stand, the token after them). Token t of belief q stands with probability min(1, p(t) / q(t)); else it is
        drawn anew from what p has over q. A belief may be of the first words only, and None is one that was certain. At temperature 0 a token stands
        if it is the most probable."""
        if not self.temperature:
            best = logits.numpy().argmax(-1).tolist()
            standing = next((i for i, (a, b) in enumerate(zip(drafted, best, strict=False)) if a != b), len(drafted))
            return standing, best[standing]
        for index, (token, q) in enumerate(zip(drafted, beliefs, strict=True)):
            p = self.probabilities(logits[index])
            believed = 1.0 if q is None else q[token]
            if torch.rand((), generator=self.generator) * believed < p[token]:
                continue
            rest = p.clone()
            if q is None:
                rest[token] = 0
            else:
                rest[: len(q)] -= q
            rest.clamp_(min=0)
            return index, self.draw(rest if rest.sum() > 0 else p)
        return len(drafted), self.draw(self.probabilities(logits[len(drafted)]))


@dataclass
class Rate:
    """How often drafted tokens stand: a running mean."""

    value: float = FIRST_RATE

    def learn(self, stood: int, of: int) -> None:
        """`stood` tokens of a draft of `of` did, and the next did not; those behind it were not tried."""
        for result in [1.0] * stood + [0.0] * (stood < of):
            self.value += MEMORY * (result - self.value)

    @property
    def length(self) -> int:
        """Tokens until the odds are gone."""
        return max(1, min(MOST_DRAFTED, math.ceil(math.log(ODDS) / math.log(min(max(self.value, 0.01), 0.99)))))


@dataclass
class Echo:
    """Where in a text its last words occurred before. places: of the token behind the last occurrence of WORDS tokens."""

    ids: list[int]
    places: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    known: int = WORDS
    rate: Rate = field(default_factory=Rate)

    def draft(self, most: int) -> list[int]:
        """Tokens that followed then."""
        for place in range(self.known, len(self.ids)):
            self.places[tuple(self.ids[place - WORDS : place])] = place
        self.known = max(self.known, len(self.ids))
        place = self.places.get(tuple(self.ids[-WORDS:]))
        return [] if place is None else self.ids[place : place + min(most, self.rate.length)]


@dataclass
class Narrow:
    """Drafts by a narrower read. words: of the vocabulary, the first so many, that it may draft. cost: of a token, in steps of the wide read."""

    plan: BitPlan
    words: int
    cost: float
    rate: Rate = field(default_factory=Rate)
    waited: int = 0

    @staticmethod
    def of(engine: Reader, bits: int, text: Sequence[int]) -> "Narrow":
        """In vocabularies of merged pairs common words come first. The rest of the head is not read if that saves more of a draft than the
        text has of rare words: half of the share of bytes, as a pass takes about as long as its drafts."""
        plan = BitPlan(bits)
        head, vocabulary = engine.stepper.head, engine.stepper.geometry.vocabulary
        whole, first = engine.read_bytes(plan), -(-vocabulary // HEAD_PART)
        saved = head.read_bytes(head.widths[0]) * (1 - 1 / HEAD_PART)
        rare = (sum(token >= first for token in text) + 1) / (len(text) + 2)  # Laplace's rule: a short text says little
        short = rare < saved / whole / 2
        return Narrow(plan, first if short else vocabulary, (whole - short * saved) / engine.read_bytes(engine.plan))

    def worth(self) -> int:
        """Tokens that are worth drafting at most: none where one brings less than it costs, but one now and then, to see whether it still does."""
        if self.rate.value > self.cost + CALL + ROW:
            return MOST_DRAFTED
        self.waited = (self.waited + 1) % ASK_AGAIN
        return 0 if self.waited else 1

    def draft(self, session: Text, most: int, pick: Picker) -> tuple[list[int], list[Tensor | None]]:
        """(tokens that the narrow read would write behind the text, what it drew them from)."""
        drafted: list[int] = []
        beliefs: list[Tensor | None] = []
        token, odds = session.ids[-1], 1.0
        while len(drafted) < most and odds >= ODDS:
            logits = session.read([token], session.passed + len(drafted), self.plan, words=self.words)[-1]
            token, belief = pick.choose(logits)
            drafted.append(token)
            beliefs.append(belief)
            odds *= self.rate.value if belief is not None else float(1 / (logits - logits[token]).exp_().sum())
        return drafted, beliefs


def speculate(session: Text, new: int, pick: Picker, bits: int) -> Iterator[int]:
    """At most `new` tokens behind the session's text, which its owner adds to the text one by one."""
    done = session.engine.speculation
    yield pick.choose(session.advance())[0]
    done.made, made = done.made + 1, 1
    echo, narrow = Echo(session.ids), Narrow.of(session.engine, bits, session.ids)
    while made < new:
        most = min(MOST_DRAFTED, new - made - 1)  # the verifier's own token is one more
        drafted, beliefs = echo.draft(most), []
        copied = bool(drafted)
        if copied:
            beliefs = [None] * len(drafted)
        elif worth := narrow.worth():
            drafted, beliefs = narrow.draft(session, min(most, worth), pick)
        place = session.passed  # of the one token of the text that has passed neither reader
        logits = session.read([session.ids[-1], *drafted], place, last=len(drafted) + 1)
        stood, following = pick.verify(drafted, beliefs, logits)
        session.passed = place + stood + 1
        (echo.rate if copied else narrow.rate).learn(stood, len(drafted))
        done.passes += 1
        if copied:
            done.copied, done.stood = done.copied + len(drafted), done.stood + stood
        else:
            done.drafted, done.accepted = done.drafted + len(drafted), done.accepted + stood
        for token in [*drafted[:stood], following][: new - made]:
            made += 1
            done.made += 1
            yield token
