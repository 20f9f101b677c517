"""Budgets by hand: every kind, met to the byte, and shown so that what is shown is met."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from grids import make_grid

from matquant.errors import InputError, PlanError
from matquant.plan import BitPlan, Layout, Shape
from matquant.search import budget
from matquant.search.budget import Latency, Model, parse_size
from matquant.search.solve import Problem, exact

SHAPES = {"a.q": Shape(64, 128), "a.k": Shape(32, 128), "a.o": Shape(128, 64)}
UNITS = [("a.q", "a.k"), ("a.o",)]
LAYOUT = Layout(make_grid(8, 64, True), "floor", (8, 4, 2), (2,), "float16")
MODEL = Model(UNITS, SHAPES, LAYOUT, 1000, 2000, ((64, None), (64, 100)), 640)
# bits of a weight: 8 and 4 with a scale of 16 bits for 64 weights, 2 with the two bytes of a refit besides
BITS = np.array([[12288 * 8.25, 12288 * 4.25, 12288 * 2.5], [8192 * 8.25, 8192 * 4.25, 8192 * 2.5]])


def problem(found: budget.Budget) -> Problem:
    return Problem(found.costs, np.array([[0.0, 1.0, 9.0], [0.0, 2.0, 5.0]]), show=found.show)


def shown_is_met(found: budget.Budget, again: object) -> None:
    """The smallest budget that a refusal names is one that can be met. again: the budget of the shown number."""
    with pytest.raises(PlanError, match="the smallest budget that one meets is") as refusal:
        exact(problem(found), 0)
    number = re.search(r"meets is ([\d.]+\w*)", str(refusal.value))
    assert number is not None
    found = again(number[1])  # type: ignore[operator]
    exact(problem(found), found.limit)


def test_mean_bits_count_the_metadata() -> None:
    found = budget.mean_bits(MODEL, 4.25)
    assert (found.costs == BITS).all()
    assert found.limit == 20480 * 4.25
    assert exact(problem(found), found.limit) == (1, 1)
    assert found.uniform == [2, 1] and budget.mean_bits(MODEL, 4.2499).uniform == [2]
    assert exact(problem(budget.mean_bits(MODEL, 4.2499)), budget.mean_bits(MODEL, 4.2499).limit) == (1, 2)
    assert found.show(found.limit) == "4.25 bits a weight of the quantized part, metadata counted"
    shown_is_met(found, lambda text: budget.mean_bits(MODEL, float(text)))


def test_mean_bits_of_the_whole_model() -> None:
    bits = (20480 * 4.25 + 16000) / 21480
    found = budget.mean_bits(MODEL, bits, whole=True)
    assert found.limit == 20480 * 4.25
    assert found.show(found.limit) == f"{np.ceil(bits * 1000) / 1000:g} bits a weight of the whole model"
    shown_is_met(found, lambda text: budget.mean_bits(MODEL, float(text), whole=True))


def test_bytes_of_a_file_are_those_of_the_plan_and_of_what_is_not_quantized() -> None:
    plan = BitPlan(4, {"a.o": 2})
    size = 2000 + plan.read_bits(SHAPES, LAYOUT) // 8
    found = budget.file_bytes(MODEL, size)
    assert exact(problem(found), found.limit) == (1, 2) != exact(problem(found), found.limit - 1)
    assert found.show(found.limit) == f"{np.ceil(size) / 1000:g}kB of file"
    shown_is_met(found, lambda text: budget.file_bytes(MODEL, parse_size(text)))


def test_memory_counts_keys_values_windows_and_the_head() -> None:
    """64 numbers of 4 bytes a token in two blocks, one of which keeps no more than 100 tokens; a head of 640 numbers at 8.375 bits."""
    assert MODEL.kv_bytes(50) == 2 * 64 * 4 * 50
    assert MODEL.kv_bytes(1000) == 64 * 4 * (1000 + 100)
    found = budget.memory(MODEL, 400_000, 1000)
    assert found.limit == 8 * (400_000 - 2000 - 64 * 4 * 1100 - 670)
    assert found.show(found.limit).endswith("of memory with a context of 1000 tokens")
    shown_is_met(found, lambda text: budget.memory(MODEL, parse_size(text), 1000))


def test_speed_follows_from_the_table(tmp_path: Path) -> None:
    rows = [{"out": s.out, "in": s.in_features, "bits": r, "seconds": r * 1e-3} for s in SHAPES.values() for r in (8, 4, 2)]
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"overhead_seconds": 0.004, "latency": rows, "machine": "mine"}))
    table = Latency.load(path)
    found = budget.speed(MODEL, table, 50.0)  # 16 ms for the products: 4 bits take 12, 4 and 8 take 16
    assert found.costs.tolist() == [[16_000_000, 8_000_000, 4_000_000], [8_000_000, 4_000_000, 2_000_000]]
    assert found.limit == 16_000_000
    assert exact(problem(found), found.limit) == (1, 0)
    assert found.show(12_000_000) == "62.5 tokens a second"
    shown_is_met(found, lambda text: budget.speed(MODEL, table, float(text)))
    with pytest.raises(PlanError, match="the latency table has no time of a 64 x 128 layer at 2 bits; measure this checkpoint"):
        budget.speed(MODEL, Latency(0.0, {key: value for key, value in table.seconds.items() if key != (64, 128, 2)}), 50.0)
    with pytest.raises(PlanError, match="the speed is -1 tokens a second; give a positive number"):
        budget.speed(MODEL, table, -1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no latency table"),
        ('{"latency": []}', "is no latency table .*overhead_seconds"),
        ('{"overhead_seconds": 0, "latency": [{"out": 1}]}', "is no latency table"),
        ('{"overhead_seconds": -1, "latency": []}', "has a time that is negative or no number; measure again"),
        ('{"overhead_seconds": 0, "latency": [{"out": 1, "in": 1, "bits": 2, "seconds": NaN}]}', "negative or no number"),
    ],
)
def test_other_files_are_no_table(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Latency.load(tmp_path / "x.json")


def test_sizes() -> None:
    sizes = {"6GiB": 6 * 2**30, "1.5 MB": 1_500_000, "7": 7, "2kB": 2000, "3KiB": 3072}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("6 gigs", "-1GB", "", "GiB", "1e9"):
        with pytest.raises(PlanError, match=r"the size is .*; give a number and one of B, kB, MB, GB, KiB, MiB, GiB, such as 6GiB"):
            parse_size(text)
    with pytest.raises(PlanError, match="the budget is 0 bits a weight; give a number between 2 and 16"):
        budget.mean_bits(MODEL, 0.0)
