"""Recipes: both ways through JSON and YAML, a hash that does not move by accident, one refusal per way to be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from grids import make_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.errors import MatquantError, RecipeError
from matquant.recipe import ORIGINAL, Recipe

# A change here means that finished checkpoints name another recipe than a new run with the same words: say so in CHANGELOG.
DEFAULT_HASH = "a73b683885a76b76ea8483c8489a5155dbad10eecbc904ee5b90ff6608f73750"

OTHER = Recipe(
    method="minmax", bits=(2, 4), targets={4: 1, 2: 3}, parent_bits=4, group_size=-1, symmetric=True, slicing="round", scale_dtype="bfloat16",
    refit_bits=0, feedback="mean", streams=(4,), favor=(2,), normalize=False, sweeps=0, asymmetric_calibration=0.25, rotate=True, damping=0.5, skip=("lm_head", "*.gate"), calibration="a.txt", num_samples=4, seq_len=16, eval_samples=0, seed=3,
)  # fmt: skip


def test_streams_pass_as_many_sequences_as_their_method_needs() -> None:
    assert [Recipe().passed(count) for count in (1, 32, 128)] == [1, 32, 32]
    assert [Recipe(stream_samples=64).passed(count) for count in (16, 128)] == [16, 64]
    assert Recipe(method="block").passed(128) == 128 and Recipe(method="block", stream_samples=8).passed(128) == 8


@pytest.mark.parametrize("recipe", [Recipe(), OTHER], ids=["default", "other"])
def test_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    through_json = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert through_json == recipe and through_json.hash == recipe.hash
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.load(path) == recipe and Recipe.load(path).hash == recipe.hash


def test_the_hash_of_the_default_recipe_is_frozen() -> None:
    assert Recipe().hash == DEFAULT_HASH


def test_the_hash_does_not_depend_on_spelling() -> None:
    ours = Recipe(bits=(8, 4), targets={8: 1, 4: 2})
    assert ours.hash == Recipe(bits=(4, 8), targets={4: 2.0, 8: 1.0}).hash
    assert ours.hash == Recipe.from_dict({"bits": ["8", 4.0], "targets": {"4": "2", "8": 1}}).hash
    assert ours.hash != Recipe(bits=(8, 4), targets={8: 1, 4: 3}).hash


def test_differences_names_what_differs() -> None:
    assert Recipe().differences(Recipe()) == []
    assert Recipe().differences(Recipe(group_size=32, seed=1)) == ["group_size: 64 -> 32", "seed: 0 -> 1"]


def test_favoured_widths_weigh_three_times_as_much() -> None:
    assert Recipe(favor=(4,)).importance == {8: 0.08, 6: 0.05, 4: 0.75, 3: 0.5, 2: 1.0}
    assert Recipe().importance == Recipe().targets


@pytest.mark.parametrize(
    ("given_streams", "targets", "streams", "expected"),
    [
        ((), {8: 1, 4: 1, 3: 1, 2: 1}, (4, 3, 2), {8: ORIGINAL, 6: ORIGINAL, 4: 4, 3: 3, 2: 2}),
        ((8,), {8: 1, 4: 1, 2: 1}, (8,), {8: 8, 6: 8, 4: 8, 3: 8, 2: 8}),
        ((2, 4), {8: 1, 4: 1, 2: 1}, (4, 2), {8: ORIGINAL, 4: 4, 3: 4, 2: 2}),
        ((), {8: 1}, (), {8: ORIGINAL, 2: ORIGINAL}),
    ],
)
def test_a_width_takes_the_narrowest_stream_that_is_no_narrower_than_it(
    given_streams: tuple[int, ...], targets: dict[int, float], streams: tuple[int, ...], expected: dict[int, int]
) -> None:
    recipe = Recipe(streams=given_streams, targets=targets)
    assert recipe.stream_widths == streams
    assert {bits: recipe.stream_of(bits) for bits in expected} == expected


def test_grid_and_layout() -> None:
    assert OTHER.grid == make_grid(4, -1, symmetric=True)
    assert OTHER.bits == (4, 2) and list(OTHER.targets) == [4, 2]
    layout = Recipe().layout
    assert layout.widths == (8, 6, 4, 3, 2) and layout.refit_widths == (4, 3, 2) and layout.scale_dtype == "float16"
    assert OTHER.layout.refit_widths == ()


def test_every_field_says_what_it_is() -> None:
    from dataclasses import fields

    assert all(field.metadata.get("help") for field in fields(Recipe))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"metod": "gptq"}, r"a recipe has no setting 'metod'; choose from .*\(did you mean method\?\)"),
        ({"method": "gtpq"}, r"method is 'gtpq'; choose from minmax, gptq, block, omniquant, qat \(did you mean gptq\?\)"),
        ({"slicing": "flor"}, r"slicing is 'flor'; choose from floor, round, round-overflow \(did you mean floor\?\)"),
        ({"scale_dtype": "float8"}, r"scale_dtype is 'float8'; choose from float16, bfloat16, float32"),
        ({"feedback": "none"}, r"feedback is 'none'; choose from per-width, mean"),
        ({"bits": []}, r"bits is \[\]; give each read width once"),
        ({"bits": [8, 8]}, r"bits is \[8, 8\]; give each read width once"),
        ({"bits": [9]}, "cannot read 9 bits from a 8-bit parent; allowed: 2 to 8"),
        ({"bits": [1]}, "cannot read 1 bits"),
        ({"bits": [8, 4], "parent_bits": 4}, "cannot read 8 bits from a 4-bit parent; allowed: 2 to 4"),
        ({"bits": [4], "parent_bits": 4}, "cannot read 8 bits from a 4-bit parent"),  # the default targets name 8
        ({"bits": [2.5]}, r"bits is \[2.5\]; it must look like"),
        ({"bits": [True]}, r"bits is \[True\]"),
        ({"bits": "8,4"}, "bits is '8,4'; it must look like .*a list"),
        ({"bits": 8}, "bits is 8; it must look like .*a list"),
        ({"targets": {}}, "targets is empty; give at least one width and its weight, for instance 8:1"),
        ({"targets": {8: 0}}, "targets gives 8 bits the weight 0.0; weights must be positive"),
        ({"targets": {8: float("nan")}}, "targets gives 8 bits the weight nan"),
        ({"targets": {8: float("inf")}}, "targets gives 8 bits the weight inf"),
        ({"targets": {8: 10**400}}, "targets is .*it must look like"),
        ({"targets": {2.5: 1}}, "targets is {2.5: 1}; it must look like"),
        ({"targets": {9: 1}}, "cannot read 9 bits"),
        ({"targets": [8]}, "targets is "),
        ({"parent_bits": 9}, "parent_bits is 9; allowed: 2 to 8"),
        ({"parent_bits": None}, "parent_bits is None; it must look like 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 1.5}, "group_size is 1.5; it must look like 64"),
        ({"group_size": float("inf")}, "group_size is inf; it must look like 64"),
        ({"symmetric": 1}, "symmetric is 1; it must look like False"),
        ({"overlap": True, "slicing": "round"}, "overlap needs slicing floor, not round"),
        ({"overlap": True, "parent_bits": 4, "bits": [4], "targets": {4: 1}}, "overlap needs parent_bits 8, not 4"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"seq_len": 1}, "seq_len is 1; it must be at least 2"),
        ({"eval_samples": -1}, "eval_samples is -1; it must be at least 0"),
        ({"sweeps": -1}, "sweeps is -1; it must be at least 0"),
        ({"normalize": "yes"}, "normalize is 'yes'; it must look like True"),
        ({"streams": [1]}, "cannot read 1 bits"),
        ({"streams": [2.5]}, r"streams is \[2.5\]; it must look like"),
        ({"asymmetric_calibration": -0.1}, "asymmetric_calibration is -0.1"),
        ({"token_power": 1.01}, "token_power is 1.01; it must be from 0 to 1"),
        ({"asymmetric_calibration": float("nan")}, "asymmetric_calibration is nan"),
        ({"refit_bits": -1}, "refit_bits is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; it must be below 2\^63"),
        ({"damping": 0}, "damping is 0.0; it must be a positive number"),
        ({"damping": float("nan")}, "damping is nan; it must be a positive number"),
        ({"damping": True}, "damping is True; it must look like 0.01"),
        ({"asymmetric_calibration": 1.5}, "asymmetric_calibration is 1.5; it must be from 0 to 1"),
        ({"favor": [5]}, "favor names 5 bits, which is no target; choose from 8, 6, 4, 3, 2"),
        ({"favor": "4"}, "favor is '4'; it must look like .*a list"),
        ({"streams": [9]}, "cannot read 9 bits"),
        ({"streams": ["8"], "sweeps": -1}, "sweeps is -1; it must be at least 0"),
        ({"feedback": "mean"}, r"feedback mean keeps one running weight, which needs one stream for all targets, not that of 4 bits .*; name one"),
        ({"method": "block", "slicing": "round"}, "method block needs parent_bits 8 and slicing floor, not 8 and round"),
        ({"refine_reach": 0.0}, "refine_reach is 0.0; it must be above 0 and at most 128"),
        ({"refine_dtype": "float16"}, "refine_dtype is 'float16'; choose from float32, bfloat16"),
        ({"refine_steps": 0}, "refine_steps is 0; it must be at least 1"),
        ({"skip": "lm_head"}, "skip is 'lm_head'; it must look like .*a list"),
        ({"skip": [1]}, r"skip is \[1\]; it must look like .*text"),
        ({"calibration": None}, "calibration is None; it must look like 'self'"),
        ({"static_groups": False, "clip_search": False}, "act_order needs static_groups"),
        ({"static_groups": False, "act_order": False}, "clip_search needs static_groups"),
    ],
)
def test_refusals(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(given_settings)


def test_mean_feedback_needs_one_stream_for_all_targets() -> None:
    """The default streams of 8, 4 and 3 bits are three; also where only one of them is a width's own."""
    mean = {"feedback": "mean", "targets": {8: 1, 4: 1}}
    with pytest.raises(
        RecipeError, match=r"feedback mean keeps one running weight, which needs one stream for all targets, not that of 4 bits and the original's"
    ):
        Recipe.from_dict(mean)
    with pytest.raises(RecipeError, match=r"not that of 4 bits and that of 3 bits; name one, for instance --streams 4"):
        Recipe.from_dict({"feedback": "mean", "targets": {4: 1, 3: 1}, "parent_bits": 4, "bits": [4]})
    with pytest.raises(RecipeError, match=r"name one, for instance --streams 8"):
        Recipe.from_dict({"feedback": "mean", "streams": [8, 4]})
    for streams in ((8,), (6,)):
        Recipe.from_dict({"feedback": "mean", "targets": {6: 1, 4: 1}, "streams": streams})
    Recipe(feedback="mean", targets={8: 1})
    Recipe(feedback="mean", targets={3: 1})


def test_streams_are_kept_in_order_and_once() -> None:
    assert Recipe(streams=(2, 4, 2)).streams == (4, 2) and Recipe(streams=(2, 4)).hash == Recipe(streams=(4, 2)).hash
    assert Recipe().stream_widths == (4, 3, 2) and Recipe(streams=(6, 2)).stream_widths == (6, 2)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along_can_be_read(path: Path) -> None:
    assert Recipe.load(path).hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "cannot read the recipe"),
        (b"a: [", "cannot read the recipe"),
        (b"seed: 2020-13-45", "cannot read the recipe"),
        (b"- 1", "must map settings to values, such as `group_size: 64`"),
        (b"", "must map settings to values"),
        (b"[" * 5000, "cannot read the recipe"),
        (b"!!python/object/apply:os.system [echo]", "cannot read the recipe"),
        (b"1: 2", "a recipe has no setting 1"),
    ],
)
def test_load_refuses(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "absent.yaml")


scalars = st.none() | st.booleans() | st.integers(-3, 12) | st.integers() | st.floats() | st.sampled_from(["gptq", "floor", "8", "-1", "x", ""])
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(scalars, scalars, max_size=3)


@given(st.dictionaries(st.sampled_from([*Recipe().to_dict(), "zzz"]), values, max_size=6))
@settings(deadline=None, max_examples=600)
def test_from_dict_raises_nothing_else(data: dict[str, Any]) -> None:
    try:
        recipe = Recipe.from_dict(data)
    except MatquantError:
        return
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.layout.widths == recipe.bits
