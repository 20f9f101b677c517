"""EvoPress-like search on the true loss (https://arxiv.org/abs/2410.14649; MatGPTQ's way to plans, https://arxiv.org/abs/2602.03537).

One parent, the best choice so far. A generation: children by mutation, a small part of the text to measure all of them on, a larger one for the best
of these, the whole for the last few; the best takes the parent's place if it is better on the whole. Theirs starts from the uniform width below the
budget and may lose budget with every mutation; this one starts from the best of what it is given (the exact solution, and that width), and a mutation
raises some units by a rung, lowers others until the budget is met and fills what is left.

Pure: what a choice loses is asked of the caller.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from matquant.search.solve import Choice, Problem

Loss = Callable[[Choice, int], float]
"""(choice, how many sequences) -> loss on the first of them"""

TRIES = 50  # of mutations for one child that was not tried before


@dataclass(frozen=True)
class Stage:
    """Children are measured on `samples` sequences, and the best `survivors` go on."""

    samples: int
    survivors: int


@dataclass(frozen=True)
class Step:
    """A generation that found something better. seconds: since the start."""

    generation: int
    seconds: float
    loss: float
    choice: Choice


def evolve(
    problem: Problem,
    budget: int,
    starts: Sequence[Choice],
    loss: Loss,
    stages: Sequence[Stage],
    children: int,
    generations: int,
    seconds: float = float("inf"),
    seed: int = 0,
    better: Callable[[Choice], None] = lambda choice: None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Step]:
    """Every improvement, the best start first; the last is the best. problem: its costs alone count. starts: each within the budget. better: called with every new parent, that start too.

    Raises PlanError for a budget that nothing meets.
    """
    problem.check(budget)
    chance, began = random.Random(seed), time.monotonic()
    whole, ladder = stages[-1].samples, Ladder.of(problem)
    filled = [fill(ladder, budget, start, chance) for start in starts]
    values = {choice: loss(choice, whole) for choice in dict.fromkeys((*starts, *filled))}
    tried, first = set(values), min(values, key=values.__getitem__)
    found = [Step(0, time.monotonic() - began, values[first], first)]
    better(first)
    for generation in range(1, generations + 1):
        if time.monotonic() - began > seconds:
            break
        alive = _children(ladder, budget, found[-1].choice, children, chance, tried)
        if not alive:
            break
        for stage in stages:
            values = {child: loss(child, stage.samples) for child in alive}
            alive = sorted(alive, key=values.__getitem__)[: stage.survivors]
        if values[alive[0]] < found[-1].loss:
            found.append(Step(generation, time.monotonic() - began, values[alive[0]], alive[0]))
            better(alive[0])
        tell(generation, generations)
    return found


def _children(ladder: "Ladder", budget: int, parent: Choice, count: int, chance: random.Random, tried: set[Choice]) -> list[Choice]:
    """New ones: as many as can be found."""
    found: list[Choice] = []
    for _ in range(TRIES * count):
        child = mutate(ladder, budget, parent, chance)
        if child not in tried:
            tried.add(child)
            found.append(child)
        if len(found) == count:
            break
    return found


@dataclass(frozen=True)
class Ladder:
    """The widths of every unit from cheap to dear, and what each rung costs."""

    widths: list[list[int]]
    costs: list[list[int]]

    @staticmethod
    def of(problem: Problem) -> "Ladder":
        order = np.argsort(problem.costs, 1, kind="stable")
        return Ladder(order.tolist(), np.take_along_axis(problem.costs, order, 1).tolist())

    def place(self, choice: Choice) -> list[int]:
        """On which rung every unit is."""
        return [rungs.index(k) for rungs, k in zip(self.widths, choice, strict=True)]

    def choice(self, place: list[int]) -> Choice:
        return tuple(rungs[p] for rungs, p in zip(self.widths, place, strict=True))

    def cost(self, place: list[int]) -> int:
        return sum(rungs[p] for rungs, p in zip(self.costs, place, strict=True))


def mutate(ladder: Ladder, budget: int, parent: Choice, chance: random.Random) -> Choice:
    """One to three units a rung up (EvoPress' count: the smaller of two dice), others down until the budget is met, what is left filled."""
    place = ladder.place(parent)
    raised = chance.sample(range(len(place)), min(len(place), chance.randint(1, 3), chance.randint(1, 3)))
    for unit in raised:
        place[unit] = min(place[unit] + 1, len(ladder.costs[unit]) - 1)
    while ladder.cost(place) > budget:
        lower = [unit for unit in range(len(place)) if place[unit] > 0]
        others = [unit for unit in lower if unit not in raised]
        place[chance.choice(others or lower)] -= 1
    return ladder.choice(_filled(ladder, budget, place, chance))


def fill(ladder: Ladder, budget: int, choice: Choice, chance: random.Random) -> Choice:
    """Units a rung up, in random order, until none fits any more."""
    return ladder.choice(_filled(ladder, budget, ladder.place(choice), chance))


def _filled(ladder: Ladder, budget: int, place: list[int], chance: random.Random) -> list[int]:
    place, spare, waiting = list(place), budget - ladder.cost(place), list(range(len(place)))
    while waiting:
        unit = waiting.pop(chance.randrange(len(waiting)))
        rungs, here = ladder.costs[unit], place[unit]
        if here + 1 < len(rungs) and rungs[here + 1] - rungs[here] <= spare:
            spare -= rungs[here + 1] - rungs[here]
            place[unit] += 1
            waiting.append(unit)
    return place
