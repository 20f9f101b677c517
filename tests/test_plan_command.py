"""`matquant plan` as its users meet it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cli import answer, fails

from matquant import doctor
from matquant.checkpoint import Checkpoint, verify
from matquant.cli import main
from matquant.cli.plans import free_bytes
from matquant.errors import PlanError
from matquant.plan import BitPlan
from matquant.search import probe, session
from matquant.search.planning import SOLVERS
from matquant.search.sensitivity import FILE

Capture = pytest.CaptureFixture[str]
QUICK = ("--num-samples", "2", "--seq-len", "16")


@pytest.fixture(scope="module")
def measured(rounded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sensitivities of rounded("llama"), in a file beside it."""
    path = tmp_path_factory.mktemp("measured") / "sensitivity.json"
    assert (
        main(
            [
                "plan",
                str(rounded("llama")),
                "--budget",
                "4",
                "--solver",
                "quadratic",
                "-o",
                str(path.with_name("p.json")),
                "--sensitivity",
                str(path),
                *QUICK,
            ]
        )
        == 0
    )
    return path


def test_a_plan_is_stored_with_what_is_known_of_it(own: Path, capsys: Capture) -> None:
    said = answer(capsys, "plan", str(own), "--budget", "4.5", *QUICK)["found"]
    plan = BitPlan.load(own / "plans" / "4.5.json")
    assert said["place"] == str(own / "plans" / "4.5.json") and said["name"] == "4.5"
    assert plan == BitPlan(said["plan"]["default"], said["plan"]["layers"])
    checkpoint = Checkpoint.open(own)
    assert said["bits_per_weight"] == plan.mean_bits(checkpoint.modules, checkpoint.layout) <= 4.5
    assert plan.about["solver"] == "exact" and plan.about["loss"] == "kl"
    assert plan.about["measured_kl"] == pytest.approx(said["measured_kl"], abs=1e-6)
    assert said["predicted_kl"] == pytest.approx(said["measured_kl"], rel=1)
    assert verify(own) == [] and (own / FILE).is_file()
    rows = answer(capsys, "eval", str(own), "--plan", "4.5", "--bits", "2,8", "--seq-len", "16", "--max-tokens", "64")
    assert [row["label"] for row in rows] == ["2", "8", "4.5"]
    assert rows[0]["bits_per_weight"] < rows[2]["bits_per_weight"] < rows[1]["bits_per_weight"]
    assert answer(capsys, "generate", str(own), "hi", "--plan", "4.7", "--max-new-tokens", "1")["tokens"] == 1  # solved on the spot


def test_the_second_budget_measures_nothing(own: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(capsys, "plan", str(own), "--budget", "5", *QUICK)
    monkeypatch.setattr(session, "Probe", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    found = answer(capsys, "plan", str(own), "--budget", "4", "--no-measure", "--name", "small")["found"]
    assert found["measured_kl"] is None and found["predicted_kl"] > 0
    assert (own / "plans" / "small.json").is_file()


def test_a_uniform_width_that_is_better_is_named(rounded: Callable[[str], Path], measured: Path, tmp_path: Path, capsys: Capture) -> None:
    data = json.loads(measured.read_text())
    data["uniform"]["3"] = 0.0
    (tmp_path / "s.json").write_text(json.dumps(data))
    common = ["plan", str(rounded("llama")), "--sensitivity", str(tmp_path / "s.json"), "-o", str(tmp_path / "p.json")]
    assert answer(capsys, *common, "--budget", "4")["found"]["better"] == 3  # 3 bits and a bit of metadata
    assert main([*common, "--budget", "4"]) == 0
    assert "note: uniform 3 bits are within this budget and lose less; read at --bits 3" in capsys.readouterr().out
    assert answer(capsys, *common, "--budget", "3.9")["found"]["better"] is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(solver: str, rounded: Callable[[str], Path], measured: Path, tmp_path: Path, capsys: Capture) -> None:
    out, folder = tmp_path / "plan.json", rounded("llama")
    arguments = ["plan", str(folder), "--budget", "4.2", "--solver", solver, "--sensitivity", str(measured), "-o", str(out), "--generations", "3"]
    found = answer(capsys, *arguments)["found"]
    checkpoint = Checkpoint.open(folder)
    plan = BitPlan.load(out).check(checkpoint.modules, checkpoint.widths)
    assert 3 <= found["bits_per_weight"] <= 4.2 and found["measured_kl"] > 0
    exact = answer(capsys, "plan", str(folder), "--budget", "4.2", "--sensitivity", str(measured), "-o", str(tmp_path / "e.json"))["found"]
    if solver == "evolve":
        uniform = json.loads(measured.read_text())["uniform"]["3"]  # 4 bits with metadata: the widest within the budget
        assert found["measured_kl"] <= min(exact["measured_kl"], uniform) * (1 + 1e-5)
    elif solver != "quadratic":
        assert found["predicted_kl"] >= exact["predicted_kl"] * (1 - 1e-5)
    assert not list(folder.glob("plans/*")) and plan.about["solver"] == solver


@pytest.mark.parametrize("loss", ["fisher", "round-off"])
def test_every_loss(loss: str, rounded: Callable[[str], Path], measured: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "plan.json")
    found = answer(capsys, "plan", str(rounded("llama")), "--budget", "4.2", "--loss", loss, "--sensitivity", str(measured), "-o", out)["found"]
    assert found["bits_per_weight"] <= 4.2


def test_every_budget(rounded: Callable[[str], Path], measured: Path, tmp_path: Path, capsys: Capture) -> None:
    folder, out = rounded("llama"), tmp_path / "plan.json"
    table = tmp_path / "latency.json"
    shapes = {(s.out, s.in_features) for s in Checkpoint.open(folder).modules.values()}
    rows = [{"out": o, "in": i, "bits": r, "seconds": o * i * r * 1e-9} for o, i in shapes for r in (8, 6, 4, 3, 2)]
    table.write_text(json.dumps({"overhead_seconds": 1e-3, "latency": rows}))
    common = ["plan", str(folder), "--sensitivity", str(measured), "--no-measure", "-o", str(out)]
    wide = answer(capsys, *common, "--max-bytes", "1MB")["found"]
    assert (wide["bits_per_weight"], wide["name"]) == (8.75, "file-1MB")
    narrow = answer(capsys, *common, "--max-bytes", "160kB")["found"]
    assert narrow["weight_bytes"] <= 160_000 < wide["weight_bytes"]
    memory = answer(capsys, *common, "--max-memory", "200kB", "--ctx", "16")["found"]
    longer = answer(capsys, *common, "--max-memory", "200kB", "--ctx", "32")["found"]
    assert longer["bits_per_weight"] < memory["bits_per_weight"]
    fast = answer(capsys, *common, "--min-speed", "780", "--latency", str(table))["found"]
    slow = answer(capsys, *common, "--min-speed", "600", "--latency", str(table))["found"]
    assert fast["bits_per_weight"] < slow["bits_per_weight"] and fast["name"] == "speed-780.0"
    whole = answer(capsys, *common, "--budget", "14", "--whole-model")["found"]
    assert whole["name"] == "14-model" and 3 <= whole["bits_per_weight"] < 8.75
    assert answer(capsys, *common, "--fit", "--ctx", "64")["found"]["bits_per_weight"] == 8.75


def test_fit_takes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: 1000)
    assert free_bytes("cpu") == 900
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 2000))
    assert free_bytes("cuda:0") == 450
    monkeypatch.setattr(doctor, "free_memory", lambda: None)
    with pytest.raises(PlanError, match="does not say how much memory is free; give --max-memory instead of --fit"):
        free_bytes("cpu")


def test_units_take_one_width(rounded: Callable[[str], Path], tmp_path: Path, capsys: Capture) -> None:
    folder, table, out = str(rounded("llama")), tmp_path / "layers.json", tmp_path / "plan.json"
    fused = answer(
        capsys, "plan", folder, "--budget", "4", "--units", "fused", "--sensitivity", str(tmp_path / "units.json"), "-o", str(out), *QUICK
    )["found"]["plan"]
    widths = BitPlan(fused["default"], fused["layers"])
    for block in (0, 1):
        for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            module = "self_attn" if "q_proj" in parts else "mlp"
            assert len({widths.bits(f"model.layers.{block}.{module}.{part}") for part in parts}) == 1
    modules = answer(capsys, "plan", folder, "--budget", "4.3", "--no-measure", "--sensitivity", str(tmp_path / "m.json"), "-o", str(out), *QUICK)[
        "found"
    ]["plan"]
    widths = BitPlan(modules["default"], modules["layers"])
    assert len({widths.bits(f"model.layers.0.mlp.{part}") for part in ("gate_proj", "up_proj", "down_proj")}) == 1
    assert len(json.loads((tmp_path / "m.json").read_text())["units"]) == 4
    split = answer(capsys, "plan", folder, "--budget", "4", "--units", "layer", "--sensitivity", str(table), "-o", str(out), *QUICK)["found"]
    assert len(json.loads(table.read_text())["units"]) == 14 and split["measured_kl"] > 0
    message = fails(capsys, 3, "plan", folder, "--budget", "4", "--sensitivity", str(table), "-o", str(out))
    assert "was measured on other units of layers; measure again (--again)" in message


def test_what_was_compared_with_is_remembered(
    rounded: Callable[[str], Path], tiny: Callable[[str], Path], tmp_path: Path, capsys: Capture, text: Path
) -> None:
    folder, table, out = str(rounded("llama")), str(tmp_path / "s.json"), str(tmp_path / "plan.json")
    common = ["plan", folder, "--budget", "4", "--sensitivity", table, "-o", out, "--text", str(text), *QUICK]
    answer(capsys, *common, "--reference", str(tiny("llama")))
    stored = json.loads(Path(table).read_text())
    assert stored["base"] > 0 and stored["text"] == f"{text.name}, seed 0" and len(stored["ids"]) == 2
    assert "sensitivities were measured against" in fails(capsys, 3, *common)
    answer(capsys, *common, "--again")
    assert json.loads(Path(table).read_text())["base"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_front_is_drawn(ending: str, own: Path, measured: Path, tmp_path: Path, capsys: Capture) -> None:
    image = tmp_path / f"front.{ending}"
    (own / "plans").mkdir()
    (own / "plans" / "mine.json").write_text(BitPlan(4, {"model.layers.0.mlp.down_proj": 2}).to_json())
    (own / "plans" / "even.json").write_text(BitPlan(3).to_json())
    common = ["plan", str(own), "--sensitivity", str(measured), "--pareto", str(image)]
    points = answer(capsys, *common, "--budget", "5", "-o", str(tmp_path / "p.json"))["points"]
    kinds = {kind: [p for p in points if p["kind"] == kind] for kind in ("uniform", "plan", "front")}
    assert [p["label"] for p in kinds["uniform"]] == ["2", "3", "4", "6", "8"] and {p["label"] for p in kinds["plan"]} == {"mine", "even", "5"}
    line = [(p["bits_per_weight"], p["kl"]) for p in kinds["front"]]
    assert line == sorted(line) and [kl for _, kl in line] == sorted((kl for _, kl in line), reverse=True)
    once = image.read_bytes()
    assert once[:5] == (b"<?xml" if ending == "svg" else b"\x89PNG\r")
    if ending == "svg":
        assert b"even (predicted)" in once and b"mine (predicted)" not in once and b"gate_proj" in once
        answer(capsys, *common, "--budget", "5", "-o", str(tmp_path / "p.json"))
        assert image.read_bytes() == once
    assert answer(capsys, *common)["found"] is None  # the front alone
    assert main(common) == 0
    assert "measured" in capsys.readouterr().out


def test_refusals(rounded: Callable[[str], Path], measured: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(rounded("llama"))
    monkeypatch.setattr(probe.Probe, "kl", lambda *args: pytest.fail("something was measured"))
    refused = lambda code, *arguments: fails(capsys, code, "plan", folder, *arguments)  # noqa: E731
    assert "there is no budget; give --budget" in refused(2)
    assert "there is more than one budget; give one of" in refused(2, "--budget", "4", "--fit")
    assert "--min-speed needs a latency table" in refused(3, "--min-speed", "10")
    assert "units is 'block'; choose from module, fused, layer" in refused(3, "--budget", "4", "--units", "block")
    assert "solver is 'exakt'; choose from exact" in refused(3, "--budget", "4", "--solver", "exakt")
    assert "loss is 'mse'; choose from kl" in refused(3, "--budget", "4", "--loss", "mse")
    assert "no plan meets 2 bits a weight of the quantized part, metadata counted; the smallest budget that one meets is 3 bits" in refused(
        3, "--budget", "2"
    )
    assert "the smallest budget that one meets is 1" in refused(3, "--max-bytes", "50kB")
    assert "no report of its layers' errors" in refused(3, "--budget", "4", "--loss", "output-error", "--no-measure")
    done = ("--budget", "4", "--sensitivity", str(measured), "--no-measure")
    assert "cannot write" in refused(3, *done, "-o", str(tmp_path / "no" / "x.json"))
    assert "the name must end in .svg or .png" in refused(3, *done, "-o", str(tmp_path / "x.json"), "--pareto", str(tmp_path / "x.gif"))
    monkeypatch.setattr("matquant.search.charts.available", lambda: False)
    assert "drawing needs matplotlib; pip install 'matquant[plot]'" in refused(
        3, *done, "-o", str(tmp_path / "x.json"), "--pareto", str(tmp_path / "x.svg")
    )
