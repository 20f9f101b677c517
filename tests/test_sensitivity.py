"""Sensitivities: what they say, that an interrupted measurement goes on, and that no other file passes for one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Crash, crash_at

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.search import sensitivity
from matquant.search.probe import Probe
from matquant.search.sensitivity import Sensitivity, Setting, identity, load, measure, measure_pairs, start
from matquant.search.units import Unit, examine

Rounded = Callable[[str], Path]
IDS = (torch.arange(3 * 16).reshape(3, 16) * 31 + 7) % 250
WIDTHS = (8, 4, 2)


@pytest.fixture(scope="module")
def probe(rounded: Rounded) -> Probe:
    checkpoint = Checkpoint.open(rounded("llama"))
    return Probe(checkpoint, examine(checkpoint).units, IDS)


@pytest.fixture(scope="module")
def fresh(probe: Probe) -> Sensitivity:
    ids = tuple(tuple(row) for row in IDS.tolist())
    return start(Setting(identity(probe.checkpoint), "numbers", "itself", ids), probe.units)


@pytest.fixture(scope="module")
def found(probe: Probe, fresh: Sensitivity) -> Sensitivity:
    return measure_pairs(probe, measure(probe, fresh, WIDTHS, lambda _: None), 2, None, lambda _: None)


def kl(probe: Probe, widths: dict[int, int]) -> float:
    return float(probe.kl(widths).double().mean())


def test_every_unit_at_every_width(probe: Probe, found: Sensitivity) -> None:
    assert [set(own) for own in found.kl] == [{4, 2}] * len(probe.units)
    for i in (0, 3, 7):
        assert found.kl[i] == {r: kl(probe, {i: r}) for r in (4, 2)}
    assert found.uniform == {8: found.base} | {r: kl(probe, dict.fromkeys(range(8), r)) for r in (4, 2)}
    losses = found.losses(WIDTHS)
    assert losses.shape == (8, 3) and (losses[:, 0] == 0).all() and (losses[:, 2] > losses[:, 1]).all()


def test_pairs_within_and_between_neighbouring_blocks(probe: Probe, found: Sensitivity) -> None:
    assert found.pairs is not None and found.pair_bits == 2 and found.pairs_complete
    assert set(found.pairs) == {(i, j) for i in range(8) for j in range(i + 1, 8)}
    for i, j in ((0, 1), (2, 6)):
        want = kl(probe, {i: 2, j: 2}) - found.kl[i][2] - found.kl[j][2] + found.base
        assert found.pairs[i, j] == pytest.approx(want, abs=1e-9)
    far = replace(found, units=tuple(replace(unit, block=3 * unit.block) for unit in found.units))
    assert len(far.wanted_pairs) == 12  # six within each of two blocks that are no neighbours


def test_pairs_at_other_widths_scale_with_both_effects(found: Sensitivity) -> None:
    terms, losses = found.pair_terms(WIDTHS), found.losses(WIDTHS)
    assert found.pairs is not None
    for (i, j), table in terms.items():
        assert table[2, 2] == pytest.approx(found.pairs[i, j], rel=1e-6)
        assert (table[0] == 0).all() and (table[:, 0] == 0).all()
        assert table[1, 1] == pytest.approx(found.pairs[i, j] * (losses[i, 1] * losses[j, 1] / losses[i, 2] / losses[j, 2]) ** 0.5, rel=1e-6)
        # what makes up for another at its own width does not at others
        assert table[1, 2] == pytest.approx(max(found.pairs[i, j], 0) * (losses[i, 1] / losses[i, 2]) ** 0.5, rel=1e-6)
    assert min(found.pairs.values()) < 0 < max(found.pairs.values())


def test_predictions_are_exact_for_uniform_widths_and_monotone_between(found: Sensitivity) -> None:
    losses = found.losses(WIDTHS)
    for k, r in enumerate(WIDTHS):
        assert found.predict(float(losses[:, k].sum())) == pytest.approx(found.uniform[r], rel=1e-6, abs=1e-9)
    totals = np.linspace(0, 2 * float(losses[:, 2].sum()), 50)
    predicted = [found.predict(float(total)) for total in totals]
    assert predicted == sorted(predicted)
    assert replace(found, uniform={}).predict(0.25) == found.base + 0.25


@pytest.mark.parametrize("stop", [1, 2, 3, 9, 20, 22, 35])
def test_an_interrupted_measurement_goes_on(stop: int, probe: Probe, fresh: Sensitivity, found: Sensitivity, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [fresh]
    crash_at(Probe, "kl", stop, monkeypatch)

    def everything(known: Sensitivity) -> Sensitivity:
        return measure_pairs(probe, measure(probe, known, WIDTHS, kept.append), 2, None, kept.append)

    with pytest.raises(Crash):
        everything(fresh)
    monkeypatch.undo()
    again = Sensitivity.from_json(kept[-1].to_json())
    asked: list[object] = []
    whole = Probe.kl
    monkeypatch.setattr(Probe, "kl", lambda self, widths, samples=None: asked.append(widths) or whole(self, widths, samples))
    assert everything(again) == found
    done = sum(map(len, again.kl))
    assert len(asked) <= 3 * (not again.uniform) + (16 - done) + 1 + 8 + 28 - len(again.pairs or ())


def test_json_round_trip_and_the_same_bytes(found: Sensitivity) -> None:
    text = found.to_json()
    assert Sensitivity.from_json(text) == found
    assert Sensitivity.from_json(text).to_json() == text
    assert len(text.splitlines()) < 150  # a row of numbers is a line
    json.loads(text)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"units": 3},
        {"base": float("nan")},
        {"base": True},
        {"ids": [[1, 2], [3]]},
        {"ids": []},
        {"ids": [["a"]]},
        {"pairs": [[0, 99, 0.5]]},
        {"pairs": [[1, 0, 0.5]]},
        {"uniform": {"x": 1.0}},
        {"text": 5},
        {"pair_bits": "2"},
    ],
)
def test_damaged_files_are_refused(change: dict[str, Any], found: Sensitivity) -> None:
    data = json.loads(found.to_json()) | change
    with pytest.raises(InputError, match=r"here\.json holds no sensitivities that this matquant understands .*; delete it and measure again"):
        Sensitivity.from_json(json.dumps(data), "here.json")
    with pytest.raises(InputError, match="holds no sensitivities"):
        Sensitivity.from_json("{")


def test_only_sensitivities_of_this_checkpoint_are_taken(found: Sensitivity, rounded: Rounded, own: Path, tmp_path: Path) -> None:
    checkpoint, path = Checkpoint.open(rounded("llama")), tmp_path / "s.json"
    assert load(path, checkpoint) is None
    path.write_text(found.to_json())
    assert load(path, checkpoint) == found
    with pytest.raises(InputError, match="was measured on other weights than those of"):
        load(path, Checkpoint.open(rounded("qwen2")))
    path.write_text(replace(found, units=(Unit(("a.0.b",), 0), *found.units[1:])).to_json())
    with pytest.raises(InputError, match="names layers that .* does not have"):
        load(path, checkpoint)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot read"):
        load(path, checkpoint)
    (own / "MANIFEST.json").unlink()
    assert identity(Checkpoint.open(own)) != identity(checkpoint)  # nothing vouches for its bytes


def test_what_is_missing_is_named(found: Sensitivity) -> None:
    with pytest.raises(InputError, match=r"8 sensitivities are missing, model\.layers\.0\..* at 3 bits the first; run matquant plan"):
        found.losses((8, 3, 2))
    with pytest.raises(InputError, match="no pairs of units were measured; run matquant plan --solver quadratic"):
        replace(found, pairs=None).pair_terms(WIDTHS)


def test_a_file_too_long_is_not_read(found: Sensitivity, rounded: Rounded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.json").write_text(found.to_json())
    monkeypatch.setattr(sensitivity, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="is longer than 10 bytes"):
        load(tmp_path / "s.json", Checkpoint.open(rounded("llama")))
