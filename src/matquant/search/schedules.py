"""The layer schedules of MatQuant's Mix'n'Match (https://arxiv.org/abs/2502.06786, section 4.3): widths that go by a block's depth alone.

With the widths of all blocks in ascending order, the narrowest go

    pyramid             to both ends, the widest to the middle
    reverse-pyramid     to the middle, the widest to both ends
    increasing          to the first blocks
    decreasing          to the last blocks

The paper found pyramids best on Gemma-2 9B. They look at nothing, so they are a baseline for plans that do.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from matquant.errors import PlanError, choices
from matquant.plan import BitPlan

SCHEDULES = ("pyramid", "reverse-pyramid", "increasing", "decreasing")


def by_block(layers: Iterable[str]) -> list[list[str]]:
    """Names of layers, those of one block together, in order of depth. A block is the first number in a name; layers without one are left out."""
    deep = sorted(((depth, name) for name in layers if (depth := _depth(name)) is not None), key=lambda pair: pair[0])
    return [[name for _, name in block] for _, block in groupby(deep, key=lambda pair: pair[0])]


def _depth(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def widths_by_depth(schedule: str, counts: Mapping[int, int]) -> list[int]:
    """The width of every block, the first block first. counts: how many blocks are read at each width. Raises PlanError."""
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule is {schedule!r}; {choices(schedule, SCHEDULES)}")
    if any(count < 0 for count in counts.values()):
        raise PlanError(f"counts is {dict(counts)}; a width has at least 0 blocks")
    ascending = [bits for bits in sorted(counts) for _ in range(counts[bits])]
    blocks = len(ascending)
    from_ends = {  # where the narrowest goes, and so on
        "pyramid": lambda i: min(i, blocks - 1 - i),
        "reverse-pyramid": lambda i: -min(i, blocks - 1 - i),
        "increasing": lambda i: i,
        "decreasing": lambda i: -i,
    }[schedule]
    widths = [0] * blocks
    for bits, place in zip(ascending, sorted(range(blocks), key=from_ends), strict=True):
        widths[place] = bits
    return widths


def scheduled(schedule: str, counts: Mapping[int, int], layers: Iterable[str]) -> BitPlan:
    """A plan for all `layers`; what is in no block gets the widest of the widths. Raises PlanError where `counts` are not of all blocks."""
    blocks = by_block(layers)
    if sum(counts.values()) != len(blocks):
        raise PlanError(f"counts is {dict(counts)}, of {sum(counts.values())} blocks, but the model has {len(blocks)}; count every block once")
    widths = widths_by_depth(schedule, counts)
    return BitPlan(max(widths), {name: bits for block, bits in zip(blocks, widths, strict=True) for name in block})


def counts_within(blocks: int, widths: Sequence[int], mean_bits: float) -> Iterator[dict[int, int]]:
    """Every way to give `blocks` blocks widths of at most `mean_bits` code bits in the mean, which leaves no block that could be widened.

    Raises PlanError where even the narrowest width is more.
    """
    narrow, *wider = sorted(widths)
    budget = int(blocks * mean_bits + 1e-9)
    if narrow * blocks > budget:
        raise PlanError(f"{mean_bits} bits a weight are too few: the narrowest width has {narrow}; give at least {narrow}")
    for counts in _counts(blocks, wider):
        filled = {narrow: blocks - sum(counts.values()), **counts}
        total = sum(bits * count for bits, count in filled.items())
        least = min((b - a for a, b in zip(sorted(widths), wider, strict=False) if filled[a]), default=budget + 1)
        if total <= budget < total + least:
            yield filled


def _counts(blocks: int, widths: Sequence[int]) -> Iterator[dict[int, int]]:
    """Every way to give some of `blocks` blocks one of `widths`."""
    if not widths:
        yield {}
        return
    for count in range(blocks + 1):
        for rest in _counts(blocks - count, widths[1:]):
            yield {widths[0]: count, **rest}
