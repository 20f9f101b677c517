"""Evolution: budgets are kept, what is found is found again by others, and the parent never gets worse."""

import random
from dataclasses import replace

import numpy as np
import pytest
from test_solve import random_problem

from matquant.errors import PlanError
from matquant.search.evolve import Ladder, Stage, Step, evolve, fill, mutate
from matquant.search.solve import Choice, Problem, exact

STAGES = [Stage(1, 4), Stage(4, 1)]


def test_mutations_keep_the_budget_and_leave_nothing_that_fits() -> None:
    chance, numbers = random.Random(0), np.random.default_rng(0)
    for _ in range(200):
        problem = random_problem(numbers, 6, 4)
        budget = int(numbers.integers(problem.least, int(problem.costs.max(1).sum()) + 1))
        parent = exact(problem, budget)
        child = mutate(Ladder.of(problem), budget, parent, chance)
        assert problem.cost(child) <= budget
        rungs = [sorted(int(c) for c in row) for row in problem.costs]
        for i, k in enumerate(child):
            above = [c for c in rungs[i] if c > problem.costs[i, k]]
            assert not above or problem.cost(child) - problem.costs[i, k] + min(above) > budget


def test_mutations_differ_and_reach_every_unit() -> None:
    problem = Problem(np.tile([1, 2, 3], (8, 1)), np.zeros((8, 3)))
    chance, parent = random.Random(1), (1,) * 8
    children = [mutate(Ladder.of(problem), 16, parent, chance) for _ in range(300)]
    assert all(problem.cost(child) == 16 for child in children)
    assert {i for child in children for i, k in enumerate(child) if k != 1} == set(range(8))
    changed = [sum(k > 1 for k in child) for child in children]
    assert max(changed) == 3 and changed.count(1) > changed.count(2) > changed.count(3) > 0  # the smaller of two dice


def test_filling_is_maximal_and_only_widens() -> None:
    problem = Problem(np.array([[1, 4], [1, 2], [1, 2]]), np.zeros((3, 2)))
    assert fill(Ladder.of(problem), 5, (0, 0, 0), random.Random(0)) == (0, 1, 1)
    assert fill(Ladder.of(problem), 3, (0, 0, 0), random.Random(0)) == (0, 0, 0)


def test_it_finds_what_the_exact_solver_finds() -> None:
    """From the worst start, on a loss that is a sum and falls fourfold a rung: within 5 %, and never worse from one parent to the next."""
    weights, costs = np.random.default_rng(3).lognormal(0, 1, (10, 1)), np.array([[2, 3, 4]]) * np.array([[1], [3]] * 5)
    problem = Problem(costs, weights * np.array([[16.0, 4.0, 1.0]]))
    budget = (problem.least + int(problem.costs.max(1).sum())) // 2
    worst = tuple(int(k) for k in problem.costs.argmin(1))
    asked: list[tuple[Choice, int]] = []

    def loss(choice: Choice, samples: int) -> float:
        asked.append((choice, samples))
        return problem.loss(choice)

    parents: list[Choice] = []
    steps = evolve(problem, budget, [worst], loss, STAGES, 12, 60, seed=1, better=parents.append)
    assert all(problem.cost(choice) <= budget for choice, _ in asked)
    losses = [step.loss for step in steps]
    assert losses == sorted(losses, reverse=True) and parents == [step.choice for step in steps]
    assert losses[-1] <= 1.05 * problem.loss(exact(problem, budget)) + 1e-12
    assert sum(samples == 1 for _, samples in asked) > 2.5 * sum(samples == 4 for _, samples in asked)  # most are only looked at


def test_it_stays_where_it_cannot_be_better() -> None:
    problem = random_problem(np.random.default_rng(4), 6, 3)
    budget = problem.least + 4
    best = exact(problem, budget)
    steps = evolve(problem, budget, [best], lambda choice, _: problem.loss(choice), STAGES, 8, 30)
    assert steps[-1].loss == pytest.approx(problem.loss(best))


def test_the_best_of_several_starts_is_the_first_parent() -> None:
    """As it is or filled up, whichever loses less on the whole."""
    problem = Problem(np.array([[1, 2, 4]] * 4), np.array([[9.0, 3.0, 1.0]] * 4))
    starts = [(0, 0, 0, 0), (1, 1, 1, 1), (2, 1, 0, 0)]
    (step, *_) = evolve(problem, 8, starts, lambda choice, _: problem.loss(choice), STAGES, 4, 0)
    assert (step.generation, step.choice, step.loss) == (0, (1, 1, 1, 1), 12.0)


def test_limits_and_seeds() -> None:
    problem = random_problem(np.random.default_rng(5), 8, 4)
    budget = problem.least + 9
    run = lambda seed, **more: evolve(problem, budget, [exact(problem, budget)], lambda c, _: -problem.loss(c), STAGES, 6, 20, seed=seed, **more)  # noqa: E731
    path = lambda steps: [(step.generation, step.choice) for step in steps]  # noqa: E731
    assert path(run(1)) == path(run(1)) != path(run(2))
    told: list[tuple[int, int]] = []
    run(1, tell=lambda done, of: told.append((done, of)))
    assert told == [(n, 20) for n in range(1, 21)]
    assert len(run(1, seconds=0.0)) == 1  # the start, or the start filled up
    single = Problem(np.array([[3, 5]]), np.array([[1.0, 0.0]]))
    (step,) = evolve(single, 4, [(0,)], lambda c, _: 1.0, STAGES, 6, 20)  # there is no other choice
    assert replace(step, seconds=0.0) == Step(0, 0.0, 1.0, (0,))
    with pytest.raises(PlanError, match="no plan meets 2; the smallest budget that one meets is 3"):
        evolve(single, 2, [(0,)], lambda c, _: 1.0, STAGES, 6, 20)
