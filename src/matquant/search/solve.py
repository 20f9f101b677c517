"""Budget -> the best width for every unit. Pure: numbers in, numbers out; no model, no torch.

Every unit i takes one width k; it costs c[i, k] of the budget B and adds l[i, k] to the loss, pairs of units Q[i, k, j, m] beyond that:

    exact       min sum_i l[i, k_i]                       over sum_i c[i, k_i] <= B: a multiple-choice knapsack, as a MILP (HiGHS, through scipy)
    quadratic   min sum_i l[i, k_i] + sum_ij Q[i, k_i, j, k_j]    over the same; products of choices are variables of their own, tied to both
                choices by their sums (CLADO's objective, https://arxiv.org/abs/2307.05657; the linearisation is the usual one)
    front       all minima of sum_i l + lambda c over lambda >= 0: the convex hull of the Pareto front in one sort, each with the least loss at its
                cost; exact minima may be laid between them
    round_off   the narrowest widths whose error is at most q times that of a reference width, the same q everywhere: MixQuant's rule
                (https://arxiv.org/abs/2309.17341), q the smallest that the budget allows

Costs are whole numbers (bits, bytes, nanoseconds), so that a budget is met to the last bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from matquant.errors import PlanError

Choice = tuple[int, ...]
"""The index of a width for every unit."""

SCALE = 1e4  # the largest loss as HiGHS sees it: its absolute gap of 1e-6 is then far below what any KL can tell
GAP = 1e-7  # relative, of the exact solver
LIMIT = 20.0  # seconds of the quadratic solver


@dataclass(frozen=True)
class Problem:
    """costs, losses: of each unit at each width. pairs: (i, j), i < j -> what both add together. show: a cost in the words of whoever asks."""

    costs: Int[np.ndarray, "units widths"]
    losses: Float[np.ndarray, "units widths"]
    pairs: Mapping[tuple[int, int], Float[np.ndarray, "widths widths"]] = field(default_factory=dict[tuple[int, int], Any])
    show: Callable[[float], str] = field(default="{:g}".format, compare=False)

    def cost(self, choice: Choice) -> int:
        return int(self.costs[np.arange(len(choice)), choice].sum())

    def loss(self, choice: Choice) -> float:
        """Without pairs."""
        return float(self.losses[np.arange(len(choice)), choice].sum())

    def loss_of_pairs(self, choice: Choice) -> float:
        return float(sum(terms[choice[i], choice[j]] for (i, j), terms in self.pairs.items()))

    @property
    def least(self) -> int:
        """The smallest budget that some choice meets."""
        return int(self.costs.min(1).sum())

    def check(self, budget: int) -> None:
        """Raise PlanError for a budget that nothing meets."""
        if not budget >= self.least:
            raise PlanError(f"no plan meets {self.show(budget)}; the smallest budget that one meets is {self.show(self.least)}")


# --- exact ----------------------------------------------------------------------------------------------------------


def exact(problem: Problem, budget: int) -> Choice:
    """The least loss within the budget, pairs not counted. Raises PlanError for a budget that nothing meets."""
    found, _ = _milp(replace(problem, pairs={}), budget, GAP, math.inf)
    assert found is not None  # feasible, and without a limit of time
    return found


def quadratic(problem: Problem, budget: int, seconds: float = LIMIT) -> tuple[Choice, float]:
    """(the least loss with pairs that was found, how far above the optimum it can be, as a share of it). Raises as `exact`."""
    start = exact(problem, budget)
    if not problem.pairs:
        return start, 0.0
    found, bound = _milp(problem, budget, 1e-4, seconds)
    both = [choice for choice in (found, start) if choice is not None]
    values = [problem.loss(choice) + problem.loss_of_pairs(choice) for choice in both]
    best = min(range(len(both)), key=values.__getitem__)
    return both[best], max(0.0, (values[best] - bound) / max(abs(values[best]), 1e-12))


def _milp(problem: Problem, budget: int, gap: float, seconds: float) -> tuple[Choice | None, float]:
    """(choice, a lower bound of the loss). None where time ran out before any was found."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    problem.check(budget)
    units, widths = problem.costs.shape
    chosen = units * widths
    count = chosen + len(problem.pairs) * widths**2
    unit = reduce(math.gcd, (int(c) for c in problem.costs.ravel()), 0) or 1
    rows, columns, values = [np.zeros(chosen, int)], [np.arange(chosen)], [problem.costs.ravel() / unit]
    rows += [1 + np.repeat(np.arange(units), widths)]  # one width for every unit
    columns += [np.arange(chosen)]
    values += [np.ones(chosen)]
    low, high = [-np.inf, *[1.0] * units], [budget // unit + 0.5, *[1.0] * units]  # whole costs: half a unit more lets nothing in
    objective = [problem.losses.ravel()]
    square = np.arange(widths**2).reshape(widths, widths)
    for number, ((i, j), terms) in enumerate(problem.pairs.items()):
        here = chosen + number * widths**2 + square
        objective.append(terms.ravel())
        for own, products in ((i, here), (j, here.T)):  # y[k, m] summed over the other's width is the own choice
            for k in range(widths):
                rows.append(np.full(widths + 1, len(low)))
                columns.append(np.append(products[k], own * widths + k))
                values.append(np.append(np.ones(widths), -1.0))
                low.append(0.0)
                high.append(0.0)
    c = np.concatenate(objective)
    scale = SCALE / max(float(np.abs(c).max()), 1e-300)
    matrix = coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (len(low), count)).tocsr()
    whole = np.concatenate([np.ones(chosen), np.zeros(count - chosen)])
    options = {"mip_rel_gap": gap} | ({"time_limit": seconds} if math.isfinite(seconds) else {})
    found = milp(c * scale, constraints=LinearConstraint(matrix, low, high), integrality=whole, bounds=Bounds(0, 1), options=options)
    bound = -math.inf if found.mip_dual_bound is None else found.mip_dual_bound / scale
    if found.x is None:
        return None, bound
    return tuple(int(k) for k in found.x[:chosen].reshape(units, widths).argmax(1)), bound


# --- the whole front ------------------------------------------------------------------------------------------------


def front(problem: Problem, exact_points: int = 0) -> list[Choice]:
    """Choices of ascending cost and strictly descending loss, pairs not counted: the convex hull, and exact minima at as many budgets between."""
    choice = [min(range(problem.costs.shape[1]), key=lambda k, i=i: (problem.costs[i, k], problem.losses[i, k])) for i in range(len(problem.costs))]
    steps = [step for i, first in enumerate(choice) for step in _steps(problem, i, first)]
    points = [tuple(choice)]
    for _, _, i, k in sorted(steps, key=lambda step: step[:2]):
        choice[i] = k
        points.append(tuple(choice))
    low, high = problem.cost(points[0]), problem.cost(points[-1])
    points += [exact(problem, low + (high - low) * n // (exact_points + 1)) for n in range(1, exact_points + 1)]
    return undominated(problem, points)


def _steps(problem: Problem, unit: int, first: int) -> list[tuple[float, int, int, int]]:
    """The lower convex hull of one unit's (cost, loss) from its cheapest width on: (slope, order, unit, width) of every step."""
    costs, losses = problem.costs[unit], problem.losses[unit]
    found: list[tuple[float, int, int, int]] = []
    while True:
        wider = [k for k in range(len(costs)) if costs[k] > costs[first] and losses[k] < losses[first]]
        if not wider:
            return found
        slope, _, following = min(((losses[k] - losses[first]) / float(costs[k] - costs[first]), -int(costs[k]), k) for k in wider)
        found.append((float(slope), len(found), unit, following))
        first = following


def undominated(problem: Problem, points: list[Choice]) -> list[Choice]:
    """Those that no other point is both cheaper and better than, by ascending cost."""
    kept: list[Choice] = []
    for choice in sorted(set(points), key=lambda choice: (problem.cost(choice), problem.loss(choice))):
        if not kept or problem.loss(choice) < problem.loss(kept[-1]):
            kept.append(choice)
    return kept


# --- a rule that needs no data --------------------------------------------------------------------------------------


def round_off(problem: Problem, budget: int) -> Choice:
    """losses: errors of rounding. Each unit's reference is its smallest error that is not 0. Raises PlanError for a budget that nothing meets."""
    problem.check(budget)
    errors = problem.losses
    reference = np.where(errors > 0, errors, np.inf).min(1, keepdims=True)
    ratios = np.where(np.isfinite(reference), errors / reference, 0.0)

    def choice(q: float) -> Choice:
        """The cheapest width of every unit whose error is within q times its reference; the cheapest of all where q is infinite."""
        allowed = np.where(ratios <= q, problem.costs, np.iinfo(np.int64).max)
        return tuple(int(k) for k in allowed.argmin(1))

    tried = [q for q in np.unique(ratios) if (ratios <= q).any(1).all()]
    low, high = 0, len(tried) - 1  # cost falls as q grows, and is least at the largest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.cost(choice(tried[middle])) <= budget else (middle + 1, high)
    return choice(tried[low])
