"""Plans: sizes by arithmetic, JSON both ways, refusals that name the line."""

import json
from pathlib import Path

import pytest
from grids import make_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.codes import Slicing
from matquant.errors import MatquantError, PlanError
from matquant.plan import BitPlan, Layout, Shape

SHAPES = {"a.q": Shape(64, 128), "a.down": Shape(128, 256), "b.q": Shape(64, 128)}
relaxed = settings(deadline=None, max_examples=150)


def layout(slicing: Slicing = "floor", symmetric: bool = True, refits: tuple[int, ...] = (), dtype: str = "float16", group: int = 64) -> Layout:
    return Layout(make_grid(8, group, symmetric), slicing, (8, 6, 4, 3, 2), refits, dtype)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "bits", "wanted"),
    [
        (layout(), 8, 8 + 16 / 64),
        (layout(), 3, 3 + 16 / 64),
        (layout(group=-1), 4, 4 + 16 / 128),
        (layout(dtype="float32"), 4, 4 + 32 / 64),
        (layout(symmetric=False), 4, 4 + 24 / 64),  # a byte of zero for every scale
        (layout(symmetric=False, dtype="float32"), 4, 4 + 40 / 64),
        (layout(refits=(3, 2)), 4, 4 + 16 / 64),
        (layout(refits=(3, 2)), 3, 3 + 32 / 64),  # the scale and the two bytes of the refit
        (layout(refits=(3, 2), dtype="float32"), 3, 3 + 48 / 64),
        (layout(symmetric=False, refits=(3, 2)), 3, 3 + 32 / 64),  # the refit replaces the zero
        (layout("round"), 4, 4 + 16 / 64),
        (layout("round-overflow"), 4, 5 + 16 / 64),  # codes up to 16
        (layout("round-overflow"), 8, 8 + 16 / 64),
    ],
)
def test_bits_per_weight_count_the_metadata(held: Layout, bits: int, wanted: float) -> None:
    shape = SHAPES["a.q"]
    assert held.read_bits(shape, bits) == wanted * shape.weights
    assert BitPlan(bits).mean_bits({"a.q": shape}, held) == wanted


def test_what_is_stored_counts_whole_bytes_every_refit_and_the_zero() -> None:
    """20 input channels take 3 bytes of each of the 8 planes; 5 groups of 4 hold a scale, a zero and 3 refits of 2 bytes."""
    held = layout(symmetric=False, refits=(4, 3, 2), group=4)
    assert held.stored_bits(Shape(7, 20)) == 7 * (8 * 3 * 8 + 5 * (16 + 8 + 3 * 16))
    assert layout(dtype="float32", group=-1).stored_bits(Shape(7, 16)) == 7 * (8 * 16 + 32)


def test_a_mixed_plan_is_the_mean_over_weights() -> None:
    plan = BitPlan(4, {"a.down": 2})
    total = sum(shape.weights * ((2 if name == "a.down" else 4) + 16 / 64) for name, shape in SHAPES.items())
    assert plan.read_bits(SHAPES, layout()) == total
    assert plan.mean_bits(SHAPES, layout()) == total / sum(shape.weights for shape in SHAPES.values())


def test_labels() -> None:
    assert BitPlan(4).label == "4"
    assert BitPlan(4, {"a.q": 4}).label == "4"
    assert BitPlan(4, {"a.q": 8, "b.q": 2}).label == "2-8 mixed"
    assert BitPlan(4, {"a.q": 8}).bits("a.q") == 8 and BitPlan(4, {"a.q": 8}).bits("b.q") == 4


# --- refusals -------------------------------------------------------------------------------------------------------


def test_check_returns_the_plan() -> None:
    plan = BitPlan(4, {"a.q": 8})
    assert plan.check(SHAPES, (8, 4)) is plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            BitPlan(4, {"a.p": 4}),
            r"the plan names layer 'a.p', which the checkpoint does not have; choose from a.q, a.down, b.q \(did you mean a.q\?\)",
        ),
        (BitPlan(5), "the plan gives default 5 bits; choose from 8, 4, 2"),
        (BitPlan(4, {"a.q": 6}), "the plan gives a.q 6 bits; choose from 8, 4, 2"),
    ],
)
def test_check_refuses(plan: BitPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan.check(SHAPES, (2, 4, 8))


def test_a_plan_read_from_a_file_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "edited.json"
    path.write_text('{\n "default": 4,\n "layers": {\n  "a.q": 4,\n  "a.k": 4,\n  "a.down": 6\n }\n}\n')
    with pytest.raises(PlanError, match=r"edited\.json, line 5: the plan names layer 'a\.k', which the checkpoint does not have"):
        BitPlan.load(path).check(SHAPES, (2, 4, 8))
    with pytest.raises(PlanError, match=r"edited\.json, line 6: the plan gives a\.down 6 bits; choose from 8, 4, 2"):
        BitPlan.load(path).check({**SHAPES, "a.k": SHAPES["a.q"]}, (2, 4, 8))
    with pytest.raises(PlanError, match=r"edited\.json, line 2: the plan gives default 4 bits; choose from 8, 6"):
        BitPlan.load(path).check({**SHAPES, "a.k": SHAPES["a.q"]}, (6, 8))


def test_what_a_plan_says_about_itself_stays_with_it() -> None:
    plan = BitPlan(4, {"a.q": 2}, {"solver": "exact", "predicted_kl": 0.5, "a.q": {"default": 3}})
    again = BitPlan.from_json(plan.to_json())
    assert again == plan == BitPlan(4, {"a.q": 2}) and again.about == plan.about


def test_check_does_not_list_hundreds_of_layers() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(100)]
    with pytest.raises(PlanError, match=r"have; did you mean model\.layers\.7\.mlp\.up_proj\?$"):
        BitPlan(4, {"model.layers.7.mlp.upproj": 4}).check(names, (4,))
    with pytest.raises(PlanError, match="have; see matquant inspect for the names"):
        BitPlan(4, {"zzz": 4}).check(names, (4,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"default": 4,\n "layers": {\n  "a": 9}}', "plan, line 3: 'a' has bits 9; allowed: whole numbers from 2 to 8"),
        ('{"default": 4,\n "layers": {\n  "a": "4"}}', "plan, line 3: 'a' has bits \"4\""),
        ('{"default": 4,\n "layers": {\n  "a": true}}', "plan, line 3: 'a' has bits true"),
        ('{"default": 4,\n "layers": {\n  "a": [4]}}', "plan, line 3: 'a' has bits that are no number"),
        ('{\n"default": 4.0}', "plan, line 2: 'default' has bits 4.0"),
        ('{"default": NaN}', "plan, line 1: 'default' has bits NaN"),
        ('{"default": 4,\n"layers": {"a": 4,}}', "plan, line 2: .*a plan is JSON such as"),
        ("", "plan, line 1: "),
        ("[]", 'plan must be an object with "default"'),
        ('{"layers": {}}', 'plan must be an object with "default"'),
        ('{"default": 4,\n"bits": 4}', 'plan, line 2: unknown key \'bits\'; a plan must be an object with "default" and, if wanted, "layers"'),
        ('{"default": 4,\n "layers": [1]}', 'plan, line 2: "layers" must map layer names to bits'),
        ('{"about": {"default": 9},\n"default": 4,\n"about": 1}', "line 3: the plan names 'about' twice, first in line 1; keep one"),
        ('{"default": 4,\n"about": 1}', 'plan, line 2: "about" must be an object'),
        ('{"default": 4, "layers": {"a": 4,\n "a": 2}}', "line 2: the plan names 'a' twice, first in line 1; keep one"),
        ('{"about": {"x": [{"b": 9}, {"b": 9}]},\n"default": 4, "layers": {"\\u0061": 4,\n "b": 9}}', "plan, line 3: 'b' has bits 9"),
        ("[" * 100_000, "plan is nested too deeply"),
        ('{"default": ' + "1" * 5000 + "}", "number too long"),
    ],
)
def test_from_json_refuses(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BitPlan.from_json(text)


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    with pytest.raises(PlanError, match=r"cannot read the plan .*mixed\.json"):
        BitPlan.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(PlanError, match="give a JSON file"):
        BitPlan.load(path)
    path.write_text('{"default": 1}')
    with pytest.raises(PlanError, match=r"mixed\.json, line 1: 'default' has bits 1"):
        BitPlan.load(path)
    path.write_text(BitPlan(3, {"b": 4, "a": 2}).to_json())
    assert BitPlan.load(path) == BitPlan(3, {"a": 2, "b": 4})


# --- round trip and fuzz --------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.dictionaries(st.text(max_size=8), st.integers(2, 8), max_size=6))
@relaxed
def test_round_trip(default: int, overrides: dict[str, int]) -> None:
    plan = BitPlan(default, overrides)
    assert BitPlan.from_json(plan.to_json()) == plan
    assert BitPlan.from_json(plan.to_json()).to_json() == plan.to_json()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["default", "layers", "a", ""]), inner, max_size=3),
    max_leaves=8,
)


@given(anything.map(json.dumps) | st.text(max_size=40) | st.text(alphabet='{}[]",:019.e-ndefaultlyrs \n', max_size=60))
@settings(deadline=None, max_examples=400)
def test_from_json_raises_nothing_else(text: str) -> None:
    try:
        plan = BitPlan.from_json(text)
    except MatquantError:
        return
    assert {plan.default, *plan.overrides.values()} <= set(range(2, 9))


@pytest.mark.parametrize("depth", [10, 300, 900, 5000, 50_000])
def test_no_depth_of_nesting_is_a_crash(depth: int) -> None:
    for left, right in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(PlanError):
            BitPlan.from_json('{"default": ' + left * depth + "1" + right * depth + "}")
