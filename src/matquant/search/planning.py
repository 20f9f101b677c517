"""From a budget to a plan by any of the solvers, and what there is to know about it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from matquant.errors import PlanError, choices
from matquant.plan import BitPlan
from matquant.search import evolve, solve
from matquant.search.budget import Budget, Model
from matquant.search.probe import Probe
from matquant.search.schedules import SCHEDULES, scheduled
from matquant.search.solve import Choice, Problem
from matquant.search.units import Unit, as_plan

SOLVERS = ("exact", "quadratic", "evolve", "round-off", *SCHEDULES)
LOSSES = ("kl", "fisher", "output-error", "round-off")
PAPER_WIDTHS = (8, 4, 2)  # of Mix'n'Match
CHILDREN, GENERATIONS = 16, 20  # of a search; EvoPress takes 64 to 128 and 100 on GPUs


@dataclass(frozen=True)
class Search:
    """How long to evolve: at most so many generations or seconds."""

    generations: int = GENERATIONS
    seconds: float = float("inf")
    children: int = CHILDREN
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What a solver chose. gap: how far above the optimum of its own objective it can be, where it knows; seconds: it took."""

    choice: Choice
    plan: BitPlan
    seconds: float
    gap: float = 0.0


@dataclass(frozen=True)
class Task:
    """What solvers are given. losses: of units at the model's widths, by LOSSES. pairs: for quadratic. probe: for evolve, opened when it is needed."""

    model: Model
    units: Sequence[Unit]
    budget: Budget
    losses: Mapping[str, Float[np.ndarray, "units widths"]]
    pairs: Mapping[tuple[int, int], Float[np.ndarray, "widths widths"]]
    probe: Callable[[], Probe] | None = None

    def problem(self, loss: str) -> Problem:
        if loss not in self.losses:
            raise PlanError(f"loss is {loss!r}; {choices(loss, self.losses)}")
        return Problem(self.budget.costs, self.losses[loss], self.pairs, self.budget.show)

    def solve(self, solver: str, loss: str = "kl", search: Search | None = None, tell: Callable[[str, int, int], None] = lambda *_: None) -> Found:
        """Raises PlanError for a solver or loss that is none, or a budget that nothing meets."""
        if solver not in SOLVERS:
            raise PlanError(f"solver is {solver!r}; {choices(solver, SOLVERS)}")
        problem, limit = self.problem("round-off" if solver == "round-off" else loss), self.budget.limit
        started, gap = time.perf_counter(), 0.0
        if solver == "exact":
            choice = solve.exact(problem, limit)
        elif solver == "quadratic":
            choice, gap = solve.quadratic(problem, limit)
        elif solver == "round-off":
            choice = solve.round_off(problem, limit)
        elif solver == "evolve":
            choice = self._evolve(problem, search or Search(), tell)[-1].choice
        else:
            choice = self._scheduled(solver, problem)
        return Found(choice, as_plan(self.units, [self.model.layout.widths[k] for k in choice]), time.perf_counter() - started, gap)

    def _evolve(self, problem: Problem, search: Search, tell: Callable[[str, int, int], None]) -> list[evolve.Step]:
        assert self.probe is not None  # whoever asks for it brings one
        probe, widths = self.probe(), self.model.layout.widths
        bits = lambda choice: {i: widths[k] for i, k in enumerate(choice)}  # noqa: E731
        starts = [solve.exact(problem, self.budget.limit), *((k,) * len(self.units) for k in self.budget.uniform[-1:])]
        few = max(1, probe.samples // 4)
        stages = [evolve.Stage(few, max(1, search.children // 4)), evolve.Stage(probe.samples, 1)]
        return evolve.evolve(
            problem, self.budget.limit, starts, lambda choice, samples: float(probe.kl(bits(choice), samples).double().mean()), stages,
            search.children, search.generations, search.seconds, search.seed,
            better=lambda choice: probe.rebase(bits(choice)), tell=lambda done, of: tell("generations", done, of),
        )  # fmt: skip

    def _scheduled(self, schedule: str, problem: Problem) -> Choice:
        """The counts of blocks at each of the paper's widths, of all that the budget allows, whose loss is least: hindsight that the paper did not have."""
        problem.check(self.budget.limit)
        widths = self.model.layout.widths
        names = [name for unit in self.units for name in unit.layers]
        blocks = len({unit.block for unit in self.units if unit.block >= 0})
        used = [r for r in widths if r in PAPER_WIDTHS] or list(widths)
        best: tuple[float, Choice] | None = None
        for counts in product(range(blocks + 1), repeat=len(used)):
            if sum(counts) != blocks:
                continue
            plan = scheduled(schedule, dict(zip(used, counts, strict=True)), names)
            choice = tuple(widths.index(plan.bits(unit.layers[0])) for unit in self.units)
            if problem.cost(choice) <= self.budget.limit and (best is None or problem.loss(choice) < best[0]):
                best = problem.loss(choice), choice
        if best is None:
            raise PlanError(f"no {schedule} of {', '.join(map(str, used))} bits meets {self.budget.show(self.budget.limit)}; choose another solver")
        return best[1]


def about(solver: str, loss: str, budget: str, predicted: float | None, measured: float | None, text: str) -> dict[str, Any]:
    """What a stored plan says of itself."""
    kl = {name: round(value, 6) for name, value in (("predicted_kl", predicted), ("measured_kl", measured)) if value is not None}
    return {"solver": solver, "loss": loss, "budget": budget, **kl, "text": text}
