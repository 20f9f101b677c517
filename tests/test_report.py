"""report.json both ways, the tables, the plot and the model card: equal runs give equal bytes, and nothing leaks."""

import builtins
import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant import plot
from matquant.card import base_license, model_card
from matquant.errors import CheckpointError
from matquant.evaluate import Protocol, Row
from matquant.plan import Shape
from matquant.recipe import Recipe
from matquant.report import LayerReport, Report, layer_rows, public, quality_rows, size, skipped_rows

ROWS = (
    Row("16", 16.0, 16.0, 16.0, 269_000_000, 17.4, 0.0, 0.0, 1.0),
    Row("8", 8.0, 8.25, 9.2, 144_000_000, 17.42, 0.0013, 0.026, 0.998),
    Row("4", 4.0, 4.5, 5.2, 92_000_000, 20.8, 0.183, 3.66, 0.977),
    Row("2", 2.0, 2.5, 3.2, 66_000_000, 2411.0, 4.9, 98.0, 0.387),
    Row("3.5", None, 3.6, 4.8, 80_000_000, 30.1, 0.5, 9.0, 0.8),
)
LAYERS = (
    LayerReport(
        "model.layers.0.self_attn.q_proj",
        Shape(64, 32),
        {2: 0.25, 8: 1.5e-6},
        ("more damping",),
        {"gptq": {8: 2e-6, 2: 0.5}, "sweeps": {8: 2e-6, 2: None}},
    ),
    LayerReport("model.layers.0.mlp.down_proj", Shape(64, 96), {2: 0.5, 8: None}),
)
REPORT = Report(
    model="org/tiny", base_model="org/tiny", recipe=Recipe(calibration="wiki.txt"), rows=ROWS, layers=LAYERS,
    protocol=Protocol(512, 512, 16352, 32, "token 1 leads every sequence", "wiki.test.raw"), skipped=(("lm_head", "tied to the embedding"),),
    outputs=({4: 1e-3, 2: 0.1}, {4: 2e-3, 2: 0.2}), tuned={2: (0.83, 0.64)}, overflow={4: (0.01, 4.12), 2: (0.05, 2.31)},
)  # fmt: skip


# --- report.json ------------------------------------------------------------------------------------------------------


def test_round_trip() -> None:
    assert Report.from_dict(json.loads(REPORT.to_json())) == REPORT
    unmeasured = replace(REPORT, rows=(), protocol=None, base_model=None, skipped=(), layers=(), outputs=())
    assert Report.from_dict(json.loads(unmeasured.to_json())) == unmeasured


def test_values_that_are_not_finite_become_null() -> None:
    odd = replace(REPORT, layers=(LayerReport("a", Shape(1, 1), {2: float("nan"), 3: float("inf"), 4: 1.0}),))
    assert json.loads(odd.to_json())["layers"][0]["errors"] == {"4": 1.0, "3": None, "2": None}
    assert Report.from_dict(odd.to_dict()).layers[0].errors == {4: 1.0, 3: None, 2: None}
    stages = replace(odd, layers=(replace(LAYERS[0], stages={"gptq": {2: float("nan"), 4: 1.0}}),), outputs=({4: float("inf"), 2: 0.5},))
    assert json.loads(stages.to_json())["layers"][0]["stages"] == {"gptq": {"4": 1.0, "2": None}}
    back = Report.from_dict(json.loads(stages.to_json()))
    assert back.layers[0].stages == {"gptq": {4: 1.0, 2: None}} and back.outputs == ({2: 0.5},)


def test_absolute_paths_are_cut_to_a_name() -> None:
    report = replace(
        REPORT,
        model="/home/me/models/tiny",
        base_model=None,
        recipe=Recipe(calibration="/home/me/wiki.txt"),
        protocol=replace(REPORT.protocol, text="/home/me/wiki.txt, the part not calibrated on"),  # type: ignore[type-var]
    )
    for written in (report.to_json().decode(), model_card(report)):
        assert "/home/me" not in written
        assert "wiki.txt, the part not calibrated on" in written
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()
    assert public("hf:org/data:test") == "hf:org/data:test" and public("org/model") == "org/model" and public("/") == "/"


def test_nothing_in_it_depends_on_when_or_where() -> None:
    names: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            names.update(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            collect(item)

    collect(REPORT.to_dict())
    assert not [name for name in names if re.search("time|date|second|duration|host|memory|user", name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=4), "report.json has version 4; this matquant reads version 3; install a newer matquant"),
        (lambda d: d.pop("outputs"), "is not what matquant writes: KeyError"),
        (lambda d: d.update(outputs=[1.0]), "is not what matquant writes"),
        (lambda d: d.update(outputs=[{"x": 1.0}]), "is not what matquant writes"),
        (lambda d: d["outputs"][0].update({"2": "0.1"}), "'0.1' is not a finite number"),
        (lambda d: d["layers"][0].pop("stages"), "is not what matquant writes: KeyError"),
        (lambda d: d["layers"][0].update(stages=[]), "is not what matquant writes"),
        (lambda d: d["layers"][0].update(stages={"gptq": [1]}), "is not what matquant writes"),
        (lambda d: d["layers"][0]["stages"]["gptq"].update({"2": True}), "True is not a finite number"),
        (lambda d: d.pop("rows"), "report.json is not what matquant writes: KeyError.*run matquant eval for fresh numbers"),
        (lambda d: d.update(rows=[{}]), "a row has"),
        (lambda d: d["rows"][0].update(perplexity="17"), "'17' is not a finite number"),
        (lambda d: d["rows"][0].update(label=4), "4 is not text"),
        (lambda d: d["rows"][0].update(file_bytes=1.5), "1.5 is not a whole number"),
        (lambda d: d["rows"][0].update(perplexity=float("inf")), "inf is not a finite number"),
        (lambda d: d["rows"][0].update(kl=True), "True is not a finite number"),
        (lambda d: d.update(rows=None), "is not what matquant writes"),
        (lambda d: d["layers"][0].update(shape=[1]), "is not what matquant writes"),
        (lambda d: d["layers"][0].update(errors={"x": 1}), "is not what matquant writes"),
        (lambda d: d["recipe"].update(method="magic"), "method is 'magic'"),
        (lambda d: d.update(recipe=[]), "is not what matquant writes"),
        (lambda d: d["protocol"].pop("bos"), "is not what matquant writes"),
        (lambda d: d.update(tuned={"2": [0.5]}), "is not what matquant writes"),
        (lambda d: d.update(overflow={"2": [0.05, "2.3"]}), "'2.3' is not a finite number"),
        (lambda d: d.update(skipped=["lm_head"]), "is not what matquant writes"),
    ],
)
def test_from_dict_refuses(change: Any, message: str) -> None:
    data = json.loads(REPORT.to_json())
    change(data)
    with pytest.raises(CheckpointError, match=message):
        Report.from_dict(data, "report.json")


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({}) | st.just([1, "a"])


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_from_dict_raises_nothing_else(data: st.DataObject) -> None:
    """One value anywhere in a good report replaced by junk."""
    content = copy.deepcopy(REPORT.to_dict())
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            place[key] = data.draw(junk)
            break
        place = place[key]
    try:
        found = Report.from_dict(content)
    except CheckpointError:
        return
    assert quality_rows(found.rows).rows is not None and layer_rows(found.layers).headers
    model_card(found)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_quality_rows() -> None:
    table = quality_rows(ROWS)
    assert table.headers == ["bits", "bits/weight", "whole model", "to fetch", "perplexity", "KL", "KL 99.9 %", "top-1"]
    assert table.rows[0] == ["16", "16.00", "16.00", "269 MB", "17.40", "0", "0", "100.0 %"]
    assert table.rows[1] == ["8", "8.25", "9.20", "144 MB", "17.42", "0.0013", "0.0260", "99.8 %"]
    assert table.rows[3][4:7] == ["2411.00", "4.90", "98.0"]
    assert table.rows[4][0] == "3.5"
    alone = quality_rows([replace(row, kl=None, kl_p999=None, top1=None) for row in ROWS[1:]])
    assert alone.headers[-1] == "perplexity" and alone.rows[0] == ["8", "8.25", "9.20", "144 MB", "17.42"]
    half = quality_rows([ROWS[1], replace(ROWS[2], kl=None, kl_p999=None, top1=None)])
    assert half.rows[1][-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("kl", "shown"), [(0.0, "0"), (3.2e-6, "3.2e-06"), (0.00012, "0.0001"), (0.0557, "0.0557"), (0.5, "0.500"), (12.345, "12.3"), (1e6, "1.0e+06")]
)
def test_small_and_large_numbers(kl: float, shown: str) -> None:
    assert quality_rows([replace(ROWS[1], kl=kl)]).rows[0][5] == shown


def test_a_hopeless_perplexity_is_short() -> None:
    assert quality_rows([replace(ROWS[1], perplexity=1.7e304)]).rows[0][4] == "1.7e+304"


def test_layer_and_skipped_rows() -> None:
    table = layer_rows(LAYERS)
    assert table.headers == ["layer", "shape", "8 bits", "2 bits", "notes"]
    assert table.rows[0] == ["model.layers.0.self_attn.q_proj", "64 x 32", "1.5e-06", "2.5e-01", "more damping"]
    assert table.rows[1][2:] == ["-", "5.0e-01", ""]
    assert layer_rows(LAYERS[1:]).headers == ["layer", "shape", "8 bits", "2 bits"]
    assert skipped_rows(REPORT.skipped).rows == [["lm_head", "tied to the embedding"]]
    assert layer_rows([]).rows == [] and quality_rows([]).rows == []


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1.25e9, "1.25 GB"),
        (999_600, "1 MB"),
        (123_456_789, "123 MB"),
        (1.5e12, "1500 GB"),
        (999.7e9, "1000 GB"),
    ],
)
def test_size(count: float, shown: str) -> None:
    assert size(count) == shown


# --- plot -------------------------------------------------------------------------------------------------------------


def test_the_plot_is_svg_with_equal_bytes_and_no_date() -> None:
    pytest.importorskip("matplotlib", reason="the plot is an extra: pip install 'matquant[plot]'")
    first = plot.quality_svg(ROWS)
    assert first is not None and first == plot.quality_svg(ROWS)
    root = ElementTree.fromstring(first)
    assert root.tag.endswith("svg")
    text = first.decode()
    words = ["KL to the original", "perplexity", "bits per quantized weight", "original", "2 bits", "4 bits", "8 bits", "3.5"]
    assert all(word in text for word in words)
    assert "<dc:date>" not in text and "<script" not in text and "<image" not in text
    assert not re.search(r'(href|src)="(?!#)', text)


def test_the_plot_without_an_original_has_one_panel() -> None:
    pytest.importorskip("matplotlib", reason="the plot is an extra: pip install 'matquant[plot]'")
    alone = plot.quality_svg([replace(row, kl=None, kl_p999=None, top1=None) for row in ROWS[1:]])
    assert alone is not None and b"KL to the original" not in alone and b">original<" not in alone and b"perplexity" in alone
    one = plot.quality_svg([ROWS[0], replace(ROWS[1], kl=0.0, perplexity=1.7e304)])
    assert one is not None and b"KL to" not in one
    assert plot.quality_svg([]) is None and plot.quality_svg(ROWS[:1]) is None


def test_errors_along_the_depth_are_drawn() -> None:
    pytest.importorskip("matplotlib", reason="the plot is an extra: pip install 'matquant[plot]'")
    both = plot.errors_svg(LAYERS, REPORT.outputs)
    assert both is not None and both == plot.errors_svg(LAYERS, REPORT.outputs) and b"<dc:date>" not in both
    words = ["relative output error of each layer", "relative error of each block", "8 bits", "2 bits"]
    assert all(word in both.decode() for word in words)
    layers_alone = plot.errors_svg(LAYERS, ({}, {}))
    assert layers_alone is not None and b"of each block" not in layers_alone
    assert plot.errors_svg([], REPORT.outputs) is None and plot.errors_svg([LayerReport("a", Shape(1, 1), {2: None, 8: 0.0})], ()) is None


def test_without_matplotlib_there_is_no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plot.available()
    assert plot.quality_svg(ROWS) is None and plot.errors_svg(LAYERS, REPORT.outputs) is None


# --- model card -------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:].partition("\n---\n")[0])


def test_the_card_says_what_the_hub_reads() -> None:
    data = front_matter(model_card(REPORT, {"license": "apache-2.0"}))
    assert data["base_model"] == "org/tiny" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "matquant" and data["license"] == "apache-2.0" and data["pipeline_tag"] == "text-generation"
    assert {"matquant", "quantized", "8-bit", "2-bit"} <= set(data["tags"])
    local = front_matter(model_card(replace(REPORT, base_model=None)))
    assert not {"base_model", "base_model_relation", "license"} & set(local)


def test_the_card_holds_table_protocol_usage_and_limits() -> None:
    card = model_card(REPORT, {"license": "mit"}, ["quality.svg"])
    assert "# tiny at 8, 6, 4, 3 and 2 bits" in card
    for row in quality_rows(ROWS).rows:
        assert f"| {' | '.join(row)} |" in card
    assert "![KL and perplexity against bits per weight](quality.svg)" in card
    assert (
        "Measured on 16352 tokens in 32 sequences of 512, stride 512; beginning-of-sequence: token 1 leads every sequence; text: `wiki.test.raw`"
        in card
    )
    assert 'matquant.from_pretrained("DIR", bits=4, keep=8)' in card and 'matquant generate DIR "Once upon a time" --bits 4' in card
    assert "To read at most 4 bits, only `model-base-*`, `model-plane2-*` and `model-plane3-*` are needed" in card
    assert "| lm\\_head | tied to the embedding |" in card and "more damping" in card
    assert "calibrated on 32 sequences of 512 tokens: `wiki.txt`, seed 0" in card
    assert "tokens: text sampled from the model itself" in model_card(replace(REPORT, recipe=Recipe()))
    assert "calibrated" not in model_card(replace(REPORT, recipe=Recipe(method="minmax")))
    assert "reads tuned end to end: KL on sequences held out went from 0.830 to 0.640 at 2 bits" in card
    assert "4.01 at 4 bits (4.12 stored sparsely), 2.05 at 2 bits (2.31 stored sparsely); from planes, as counted above, it is 3 at 2 bits" in card
    assert "## Limits" in card and "is not recorded here" not in card
    assert not re.search(r"https?://|<img|<script", card)
    assert model_card(REPORT, {"license": "mit"}, ["quality.svg"]) == card


def test_the_card_without_measurement_or_license() -> None:
    card = model_card(replace(REPORT, rows=(), protocol=None, skipped=(), layers=()))
    assert "Not measured" in card and "quality.svg" not in card and "The license of the base model applies; it is not recorded here." in card
    assert "Left as they are" not in card and "largest relative" not in card
    plain = model_card(replace(REPORT, tuned={}, overflow={}))
    assert "tuned" not in plain and "stored sparsely" not in plain
    assert "How it was measured is not recorded" in model_card(replace(REPORT, protocol=None))
    few = model_card(replace(REPORT, protocol=replace(REPORT.protocol, tokens=70)))  # type: ignore[type-var]
    assert "70 tokens are few" in few


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(bits=(8,), targets={8: 1}), "Every width needs all weight files."),
        (Recipe(bits=(8, 2)), "Every width needs all weight files."),
        (Recipe(bits=(4, 3, 2), slicing="round"), "`model-plane2-*` and `model-plane3-*` are needed"),
        (Recipe(bits=(3, 2)), "only `model-base-*` and `model-plane2-*` are needed"),
        (Recipe(bits=(2,)), "only `model-base-*` are needed"),
        (Recipe(bits=(8, 6, 2)), "only `model-base-*` and `model-plane2-*` to `model-plane5-*` are needed"),
    ],
)
def test_the_card_says_which_files_a_width_needs(recipe: Recipe, said: str) -> None:
    assert said in model_card(replace(REPORT, recipe=recipe))


def test_names_cannot_break_the_card() -> None:
    evil = "a|b\n---\n<script>x</script>[y](http://z)`"
    card = model_card(replace(REPORT, model=evil, base_model=None, skipped=((evil, evil),)))
    table = next(line for line in card.splitlines() if "script" in line and line.startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", table)) == 3 and "\\<script\\>" in table
    assert card.count("\n---\n") == 1
    assert front_matter(card)["library_name"] == "matquant"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"---\nlicense: apache-2.0\ntags: [a]\n---\n# x\n", {"license": "apache-2.0"}),
        (
            b"---\nlicense: other\nlicense_name: gemma\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "gemma", "license_link": "LICENSE"},
        ),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", {}),
        (b"---\nlicense_name: x\n---\n", {}),
        (b"---\nlicense: 2020-13-45\n---\n", {}),
        (b"---\n{{\n---\n", {}),
        (b"---\n- a\n---\n", {}),
        (b"# no front matter\nlicense: mit\n", {}),
        (b"---\n" + b"[" * 2000 + b"\n---\n", {}),
        (b"", {}),
        (b"\xff\xfe", {}),
    ],
)
def test_base_license(content: bytes, found: dict[str, str], tmp_path: Path) -> None:
    assert base_license(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(content)
    assert base_license(tmp_path) == found
