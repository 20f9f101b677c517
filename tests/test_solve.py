"""Solvers against every choice there is, tried one by one."""

import subprocess
import sys
import time
from itertools import combinations, product

import numpy as np
import pytest

from matquant.errors import PlanError
from matquant.search.solve import Choice, Problem, exact, front, quadratic, round_off, undominated


def random_problem(chance: np.random.Generator, units: int, widths: int, pairs: bool = False) -> Problem:
    """Losses mostly fall with the width, but not always; costs rise, with many ties."""
    costs = np.sort(chance.integers(1, 9, (units, widths)), 1) * int(chance.integers(1, 4))
    losses = np.sort(chance.exponential(1.0, (units, widths)), 1)[:, ::-1] * chance.choice([1e-6, 1e-3, 1.0])
    wild = chance.random((units, 1)) < 0.2
    losses = np.where(wild, chance.permuted(losses, axis=1), losses)
    size = float(losses.mean())
    found = {pair: chance.normal(0, 0.5 * size, (widths, widths)) for pair in combinations(range(units), 2) if chance.random() < 0.6} if pairs else {}
    return Problem(costs, losses, found)


def every_choice(problem: Problem) -> list[Choice]:
    units, widths = problem.costs.shape
    return list(product(range(widths), repeat=units))


def budget_of(problem: Problem, chance: np.random.Generator) -> int:
    return int(chance.integers(problem.least, int(problem.costs.max(1).sum()) + 2))


def test_exact_is_the_best_of_all_choices() -> None:
    chance = np.random.default_rng(0)
    for _ in range(1000):
        problem = random_problem(chance, int(chance.integers(1, 6)), int(chance.integers(1, 5)))
        budget = budget_of(problem, chance)
        found = exact(problem, budget)
        best = min(problem.loss(choice) for choice in every_choice(problem) if problem.cost(choice) <= budget)
        assert problem.cost(found) <= budget
        assert problem.loss(found) == pytest.approx(best, rel=1e-6, abs=1e-15)


def test_quadratic_is_the_best_of_all_choices() -> None:
    chance = np.random.default_rng(1)
    for _ in range(100):
        problem = random_problem(chance, int(chance.integers(2, 5)), 3, pairs=True)
        budget = budget_of(problem, chance)
        found, gap = quadratic(problem, budget)
        value = lambda choice: problem.loss(choice) + problem.loss_of_pairs(choice)  # noqa: E731, B023
        best = min(value(choice) for choice in every_choice(problem) if problem.cost(choice) <= budget)
        assert problem.cost(found) <= budget and gap <= 1e-3
        assert value(found) == pytest.approx(best, rel=1e-3, abs=1e-4 * abs(problem.losses).max())


def test_quadratic_without_pairs_is_exact() -> None:
    problem = random_problem(np.random.default_rng(2), 5, 3)
    assert quadratic(problem, problem.least + 5) == (exact(problem, problem.least + 5), 0.0)


def test_a_budget_is_met_to_the_last_bit() -> None:
    """A uniform width fits its own cost exactly, and one bit less is one bit too few."""
    costs = np.array([[2_000_000_001, 3_000_000_002]] * 3)
    problem = Problem(costs, np.array([[1.0, 0.0]] * 3))
    assert exact(problem, 9_000_000_006) == (1, 1, 1)
    assert sorted(exact(problem, 9_000_000_005)) == [0, 1, 1]
    assert exact(problem, 6_000_000_003) == (0, 0, 0)


def test_the_front_is_monotone_and_holds_every_minimum_over_lambda() -> None:
    chance = np.random.default_rng(3)
    for _ in range(60):
        problem = random_problem(chance, int(chance.integers(1, 6)), 4)
        points = front(problem)
        costs, losses = [problem.cost(p) for p in points], [problem.loss(p) for p in points]
        assert costs == sorted(set(costs)) and losses == sorted(set(losses), reverse=True)
        everything = every_choice(problem)
        for point, cost, loss in zip(points, costs, losses, strict=True):  # none is dominated by any choice
            assert not any(problem.cost(c) <= cost and problem.loss(c) < loss - 1e-12 for c in everything), point
        for lam in (0.0, *chance.exponential(float(problem.losses.max()), 5)):
            best = min(problem.loss(c) + lam * problem.cost(c) for c in everything)
            assert min(loss + lam * cost for cost, loss in zip(costs, losses, strict=True)) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_exact_points_lie_on_the_front_of_all_choices() -> None:
    problem = random_problem(np.random.default_rng(5), 5, 4)
    more = front(problem, exact_points=6)
    want = undominated(problem, every_choice(problem))
    assert {(problem.cost(p), round(problem.loss(p), 9)) for p in more} <= {(problem.cost(p), round(problem.loss(p), 9)) for p in want}
    assert set(front(problem)) <= set(more)


def test_round_off_is_one_tolerance_for_all() -> None:
    chance = np.random.default_rng(4)
    for _ in range(200):
        problem = random_problem(chance, 4, 4)
        budget = budget_of(problem, chance)
        found = round_off(problem, budget)
        assert problem.cost(found) <= budget
        reference = problem.losses.min(1)
        q = max(problem.losses[i, k] / reference[i] for i, k in enumerate(found))
        tighter = [r for r in np.unique(problem.losses / reference[:, None]) if r < q * (1 - 1e-12)]
        for r in tighter[-1:]:  # the next smaller tolerance is either impossible, or more than the budget
            allowed = np.where(problem.losses / reference[:, None] <= r, problem.costs, 10**9)
            assert allowed.min(1).sum() > budget


def test_units_that_lose_nothing_take_the_cheapest() -> None:
    problem = Problem(np.array([[2, 3], [2, 3]]), np.array([[0.0, 0.0], [4.0, 0.0]]))
    assert round_off(problem, 5) == (0, 1) == exact(problem, 5)


@pytest.mark.parametrize("solver", [exact, quadratic, round_off])
def test_an_infeasible_budget_is_refused_with_the_smallest(solver) -> None:  # type: ignore[no-untyped-def]
    problem = Problem(np.array([[200, 300], [200, 400]]), np.ones((2, 2)), show=lambda cost: f"{cost / 100:.2f} bits")
    with pytest.raises(PlanError, match=r"no plan meets 3\.99 bits; the smallest budget that one meets is 4\.00 bits"):
        solver(problem, 399)
    solver(problem, 400)


def large(units: int = 120) -> Problem:
    """Shaped as SmolLM2-135M: 30 blocks of four units of four sizes, five widths."""
    chance = np.random.default_rng(6)
    weights = np.tile([552960, 331776, 1769472, 884736], units // 4)[:, None]
    costs = (weights * np.array([8.375, 6.375, 4.5, 3.5, 2.5])).astype(np.int64)
    losses = chance.lognormal(0, 1, (units, 1)) * np.array([0.0, 1e-4, 1e-3, 6e-3, 5e-2]) * chance.lognormal(0, 0.2, (units, 5))
    return Problem(costs, losses)


def test_a_real_size_in_time() -> None:
    """Limits are the issue's, with room for a busy machine: a second a solve, five for the front."""
    problem = large()
    total = int(problem.costs.sum(0)[3])
    started = time.process_time()
    assert problem.cost(exact(problem, total)) <= total
    assert time.process_time() - started < 1.0
    started = time.process_time()
    assert len(front(problem, exact_points=8)) > 100
    assert time.process_time() - started < 5.0


def test_solving_needs_neither_torch_nor_transformers() -> None:
    code = """
import sys
import matquant.search.solve, numpy
problem = matquant.search.solve.Problem(numpy.array([[1, 2]]), numpy.array([[1.0, 0.0]]))
assert matquant.search.solve.exact(problem, 2) == (1,)
import matquant.search.evolve
assert "torch" not in sys.modules
import matquant.search.schedules, matquant.search.budget, matquant.plan
print(sorted({"transformers", "accelerate", "typer", "rich", "triton"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
