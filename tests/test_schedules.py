from itertools import product

import pytest

from matquant.errors import PlanError
from matquant.plan import BitPlan
from matquant.search.schedules import SCHEDULES, by_block, counts_within, scheduled, widths_by_depth


@pytest.mark.parametrize(
    ("schedule", "widths"),
    [
        ("pyramid", [2, 4, 8, 8, 8, 4, 2]),
        ("reverse-pyramid", [8, 4, 2, 2, 4, 8, 8]),
        ("increasing", [2, 2, 4, 4, 8, 8, 8]),
        ("decreasing", [8, 8, 8, 4, 4, 2, 2]),
    ],
)
def test_by_hand(schedule: str, widths: list[int]) -> None:
    assert widths_by_depth(schedule, {8: 3, 2: 2, 4: 2}) == widths


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shapes(schedule: str) -> None:
    """Along the way from where the narrowest are, widths never fall; and they are those that were counted."""
    for counts in product(range(4), repeat=3):
        widths = widths_by_depth(schedule, dict(zip((2, 4, 8), counts, strict=True)))
        half = widths[: (len(widths) + 1) // 2]
        rising = {"pyramid": half, "reverse-pyramid": half[::-1], "increasing": widths, "decreasing": widths[::-1]}[schedule]
        assert rising == sorted(rising)
        assert tuple(map(widths.count, (2, 4, 8))) == counts


def test_blocks_from_names() -> None:
    names = ["lm_head", "model.layers.10.mlp.experts.3.up", "model.layers.2.q", "model.layers.2.k", "model.layers.0.q"]
    assert by_block(names) == [["model.layers.0.q"], ["model.layers.2.q", "model.layers.2.k"], ["model.layers.10.mlp.experts.3.up"]]


def test_a_plan() -> None:
    names = [f"h.{block}.{layer}" for block in range(4) for layer in "ab"]
    plan = scheduled("pyramid", {2: 2, 8: 2}, [*names, "lm_head"])
    assert plan == BitPlan(8, {f"h.{block}.{layer}": bits for block, bits in enumerate([2, 8, 8, 2]) for layer in "ab"})
    assert plan.bits("lm_head") == 8


def test_counts_within_a_budget_against_all_there_are() -> None:
    widths, blocks = (8, 4, 2), 6
    for mean in (2.0, 2.4, 3.0, 4.5, 8.0, 9.0):
        found = [tuple(counts[r] for r in widths) for counts in counts_within(blocks, widths, mean)]
        budget = blocks * mean
        want: list[tuple[int, ...]] = []
        for counts in product(range(blocks + 1), repeat=3):
            total = 8 * counts[0] + 4 * counts[1] + 2 * counts[2]
            wider = [2] * bool(counts[2]) + [4] * bool(counts[1])  # what one more block a width up would add
            if sum(counts) == blocks and total <= budget and all(total + more > budget for more in wider):
                want.append(counts)
        assert sorted(found) == sorted(want) and found


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"schedule is 'piramid'; choose from pyramid.*did you mean pyramid"):
        widths_by_depth("piramid", {2: 1})
    with pytest.raises(PlanError, match="at least 0 blocks"):
        widths_by_depth("pyramid", {2: -1})
    with pytest.raises(PlanError, match="of 3 blocks, but the model has 2; count every block once"):
        scheduled("pyramid", {2: 3}, ["h.0.a", "h.1.a"])
    with pytest.raises(PlanError, match="1.5 bits a weight are too few: the narrowest width has 2"):
        next(counts_within(4, (8, 2), 1.5))
