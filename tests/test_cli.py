"""The command line as its users meet it: exit codes, one line an error, JSON that is only JSON, results that are right."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from building import build_checkpoint

from matquant import cli, doctor
from matquant.cli import flags, main, run
from matquant.errors import RecipeError, ResourceError
from matquant.recipe import Recipe

Tiny = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama rounded to nearest; its default width is 8."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    build_checkpoint(tiny("llama"), folder, Recipe(method="minmax", group_size=32))
    return folder


def fails(capture: Capture, code: int, *arguments: str) -> str:
    """The message of a command line that must fail with `code`, one line on stderr and nothing on stdout."""
    capture.readouterr()
    assert main(arguments) == code
    out, err = capture.readouterr()
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err
    return last


def answer(capture: Capture, *arguments: str) -> Any:
    """The JSON of a command line that must succeed."""
    capture.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capture.readouterr().out)


# --- the frame ------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys: Capture) -> None:
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in ("quantize", "eval", "generate", "chat", "bench", "inspect", "verify", "doctor", "tune"))


def test_module_and_entry_point_are_one() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '\nmatquant = "matquant.cli:main"\n' in pyproject  # what the installed script calls: sys.exit(main())
    result = subprocess.run([sys.executable, "-m", "matquant", "inspekt"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: No such command 'inspekt'. Did you mean 'inspect'?\n"


def test_usage_errors(capsys: Capture) -> None:
    assert "Missing argument" in fails(capsys, 2, "inspect")
    assert "--bits" in fails(capsys, 2, "quantize", "model", "-o", "out", "--bitz", "4")
    assert "Missing option" in fails(capsys, 2, "quantize", "model")
    assert "--group-size" in fails(capsys, 2, "quantize", "model", "-o", "out", "--group-size", "many")


@pytest.mark.parametrize("how", ["flag before", "flag after", "environment"])
def test_debug_shows_the_traceback(how: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["inspect", "/no/such"]
    if how == "environment":
        monkeypatch.setenv("MATQUANT_DEBUG", "1")
    else:
        arguments = ["--debug", *arguments] if how == "flag before" else [*arguments, "--debug"]
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


def test_a_bug_of_ours_is_called_one(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder: 1 / 0)
    message = fails(capsys, 1, "doctor")
    assert message == "error: ZeroDivisionError: division by zero (a bug in matquant: run again with --debug and report it)"
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    code = "import os, sys; os.close(1); os.open(os.devnull, os.O_WRONLY); from matquant.cli import main; sys.exit(main(['doctor']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    command = f"{sys.executable} -m matquant doctor | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr


def test_interrupted_says_how_to_continue(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(recipe: Any, model: str = cli.commands.typer.Argument(...), overwrite: bool = cli.commands.typer.Option(False)) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.commands.COMMANDS, "quantize", stopped)
    message = fails(capsys, 130, "quantize", "my model", "--overwrite", "--seed", "3")
    assert message == "error: interrupted; to continue: matquant quantize 'my model' --overwrite --seed 3 --resume"
    monkeypatch.setattr(doctor, "examine", stopped)
    monkeypatch.setitem(cli.commands.COMMANDS, "doctor", lambda: stopped(None))
    assert fails(capsys, 130, "doctor") == "error: interrupted"


# --- recipes from flags ---------------------------------------------------------------------------------------------


def recipe_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Recipe:
    """The recipe that a command line makes."""
    seen: list[Recipe] = []

    def quantize(recipe: Any, model: str = cli.commands.typer.Argument(...)) -> None:
        seen.append(recipe)

    monkeypatch.setitem(cli.commands.COMMANDS, "quantize", quantize)
    assert main(["quantize", "model", *arguments]) == 0
    return seen[0]


def test_no_flag_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_of(monkeypatch) == Recipe()


def test_every_field_has_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "method": "minmax", "bits": "4,2", "targets": "4:2.5,2:1", "parent_bits": "6", "group_size": "-1", "slicing": "round", "scale_dtype": "float32",
        "head_bits": "5", "refit_bits": "4", "feedback": "mean", "damping": "0.5", "calibration": "x.txt", "num_samples": "3", "seq_len": "9", "eval_samples": "0", "seed": "7",
        "favor": "4,2", "streams": "6", "stream_samples": "2", "asymmetric_calibration": "0.25", "sweeps": "1", "refine_steps": "5", "refine_tokens": "3", "refine_reach": "0.5",
        "refine_dtype": "bfloat16", "finetune_reads": "9", "finetune_rate": "0.01", "train_text": "y.txt", "train_tokens": "8", "batch_tokens": "4", "train_dtype": "bfloat16",
        "learning_rate": "0.1", "warmup": "0.5", "decay": "constant", "weight_decay": "0.2", "teachers": "2:4,4:0", "divergence": "mse", "temperature": "2", "epochs": "3", "clip_rate": "0.5", "transform_rate": "0.2", "token_power": "0.25",
    }  # fmt: skip
    switches = [
        "--no-symmetric", "--no-overlap", "--no-clip-search", "--no-act-order", "--no-static-groups", "--no-rotate", "--no-normalize",
        "--no-learn-scales", "--no-teachers-only", "--no-balance-gradients", "--no-random-width", "--no-transform",
    ]  # fmt: skip
    given = [word for name, value in values.items() for word in (flags.flag_name(name), value)]
    recipe = recipe_of(monkeypatch, *given, *switches, "--skip", "*.o_proj", "--skip", "lm_head")
    covered = {*values, "skip", *(switch[5:].replace("-", "_") for switch in switches)}
    assert covered == {field.name for field in fields(Recipe)}
    assert recipe == Recipe(
        method="minmax", bits=(4, 2), targets={4: 2.5, 2: 1.0}, normalize=False, favor=(4, 2), parent_bits=6, group_size=-1, symmetric=False, overlap=False,
        slicing="round", scale_dtype="float32", head_bits=5, refit_bits=4, clip_search=False, act_order=False, static_groups=False, feedback="mean", streams=(6,), stream_samples=2,
        asymmetric_calibration=0.25, sweeps=1, refine_steps=5, refine_tokens=3, refine_reach=0.5, refine_dtype="bfloat16", damping=0.5, skip=("*.o_proj", "lm_head"), calibration="x.txt",
        num_samples=3, seq_len=9, eval_samples=0, seed=7, finetune_reads=9, finetune_rate=0.01, train_text="y.txt", train_tokens=8, batch_tokens=4,
        train_dtype="bfloat16", learning_rate=0.1, warmup=0.5, decay="constant", weight_decay=0.2, teachers={4: 0, 2: 4}, divergence="mse", temperature=2.0,
        learn_scales=False,
        epochs=3, clip_rate=0.5, transform=False, transform_rate=0.2, token_power=0.25,
    )  # fmt: skip


def test_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("group_size: 32\nseed: 5\ntargets: {8: 1}\n")
    recipe = recipe_of(monkeypatch, "--recipe", str(file), "--seed", "6")
    assert recipe == Recipe(group_size=32, seed=6, targets={8: 1})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gptg"], "method is 'gptg'; choose from minmax, gptq, block, omniquant, qat (did you mean gptq?)"),
        (["--slicing", "flor"], "slicing is 'flor'; choose from floor, round, round-overflow (did you mean floor?)"),
        (["--feedback", "meen"], "choose from per-width, mean (did you mean mean?)"),
        (["--scale-dtype", "float61"], "did you mean float16?"),
        (["--bits", "8,x"], "bits is '8,x'; give whole numbers, for instance 8,6,4,3,2"),
        (["--bits", "9"], "cannot read 9 bits from a 8-bit parent; allowed: 2 to 8"),
        (["--bits", "1"], "cannot read 1 bits"),
        (["--bits", "4,4"], "give each read width once"),
        (["--parent-bits", "4"], "cannot read 8 bits from a 4-bit parent"),
        (["--targets", "8"], "targets is '8'; give BITS:WEIGHT pairs"),
        (["--targets", "8:1,8:2"], "name each width once"),
        (["--targets", "8:0"], "weights must be positive"),
        (["--group-size", "0"], "group_size is 0"),
        (["--recipe", "/no/such.yaml"], "cannot read the recipe /no/such.yaml"),
    ],
)  # fmt: skip
def test_bad_settings(arguments: list[str], words: str, capsys: Capture) -> None:
    assert words in fails(capsys, 2, "quantize", "model", "-o", "out", *arguments)


def test_an_unknown_setting_of_a_file_names_the_nearest(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("group_sise: 32\n")
    assert "did you mean group_size?" in fails(capsys, 2, "quantize", "model", "-o", "out", "--recipe", str(file))


def test_help_of_quantize_is_the_fields_of_the_recipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["quantize", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    default = Recipe()
    for field in fields(Recipe):
        assert flags.flag_name(field.name) in out
        assert field.metadata["help"].split(";")[0] in out
        assert f"[default: ({flags.value_text(getattr(default, field.name))})]" in out


# --- doctor, inspect, verify ----------------------------------------------------------------------------------------


def test_doctor(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "EXTRAS", {"plot": "no_such_module"})
    facts = answer(capsys, "doctor")
    assert facts["versions"]["torch"] and facts["threads"] >= 1 and facts["disk_free_bytes"] > 0
    assert facts["extras"] == {"plot": False}
    assert facts["advice"][0] == "the extra 'plot' is not installed: pip install 'matquant[plot]'"
    assert main(["doctor"]) == 0
    assert "note: HF_HUB_OFFLINE is set" in capsys.readouterr().out


def test_doctor_names_gpus(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    answers = {
        "is_available": True,
        "device_count": 1,
        "mem_get_info": (10**9, 2 * 10**9),
        "get_device_capability": (9, 0),
        "get_device_name": "H200",
    }
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert main(["doctor"]) == 0
    assert "CUDA: H200 (compute 9.0), 1 GB of 2 GB free" in capsys.readouterr().out


def test_doctor_of_a_poor_machine() -> None:
    facts = {"extras": {}, "environment": {}, "ram_free_bytes": 2**30}
    assert doctor.problems(facts) == ["less than 2 GiB of memory is free"]


def test_inspect(checkpoint: Path, capsys: Capture) -> None:
    found = answer(capsys, "inspect", str(checkpoint))
    assert found["widths"] == [8, 6, 4, 3, 2] and found["planes"] == 8 and found["missing"] == []
    assert found["modules"]["model.layers.0.mlp.down_proj"] == [64, 96]
    assert [row["bits"] for row in found["offered"]] == [8, 6, 4, 3, 2]
    assert Recipe.from_dict(found["recipe"]).hash == found["recipe_hash"]
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "14 quantized layers" in out and "planes 0-7 of 0-7 are here" in out


def test_inspect_of_a_part(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    part = tmp_path / "part"
    part.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file() and not any(f"plane{k}" in file.name for k in range(3, 8)):
            (part / file.name).write_bytes(file.read_bytes())
    assert answer(capsys, "inspect", str(part))["widths"] == [3, 2]
    assert main(["inspect", str(part)]) == 0
    assert "planes missing" in capsys.readouterr().out
    assert main(["verify", str(part)]) == 0
    capsys.readouterr()
    assert answer(capsys, "generate", str(part), "ab", "--bits", "3", "--max-new-tokens", "2")["bits"] == 3
    assert "plane" in fails(capsys, 3, "generate", str(part), "ab", "--bits", "4")


def test_verify(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert answer(capsys, "verify", str(checkpoint)) == {"folder": str(checkpoint), "sound": True, "problems": []}
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file():
            (damaged / file.name).write_bytes(file.read_bytes())
    victim = next(damaged.glob("model-plane5*"))
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    assert main(["verify", str(damaged)]) == 5
    out, err = capsys.readouterr()
    assert victim.name in out and "has 1 problem; fetch or quantize it again" in err
    assert main(["verify", str(damaged), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["sound"] is False


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_such_folder(command: str, capsys: Capture) -> None:
    assert "/no/such" in fails(capsys, 3, command, "/no/such")


# --- generate -------------------------------------------------------------------------------------------------------


def test_generate_says_what_transformers_says(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    import torch
    from transformers import AutoTokenizer

    import matquant

    folder = tmp_path / "checkpoint"
    build_checkpoint(tiny("gpt2"), folder, Recipe(method="minmax", group_size=32))
    command = ["generate", str(folder), "hello", "--bits", "4", "--max-new-tokens", "5"]
    found = answer(capsys, *command)
    model, tokenizer = matquant.from_pretrained(folder, bits=4, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert found["text"] == tokenizer.decode(ids[0, 5:], skip_special_tokens=True)
    assert (found["bits"], found["tokens"], found["prompt"], found["engine"]) == (4, 5, "hello", False)
    assert main([*command, "--threads", "1"]) == 0
    assert "GPT2LMHeadModel has other parts: transformers writes this" in capsys.readouterr().err
    assert "GPT2LMHeadModel has other parts" in fails(capsys, 3, *command, "--draft-bits", "2")


def test_generate_samples_by_seed(checkpoint: Path, capsys: Capture) -> None:
    texts = [
        answer(capsys, "generate", str(checkpoint), "hello", "--temperature", "1", "--seed", seed, "--max-new-tokens", "12")["text"]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generate_by_plan(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"default": 4, "layers": {"model.layers.0.mlp.down_proj": 8}}')
    assert answer(capsys, "generate", str(checkpoint), "hi", "--plan", str(plan), "--max-new-tokens", "1")["bits"] == "4-8 mixed"
    assert main(["generate", str(checkpoint), "hi", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.startswith("8 bits: 1 tokens")
    assert "give one" in fails(capsys, 2, "generate", str(checkpoint), "hi", "--plan", str(plan), "--bits", "4")
    plan.write_text('{"default": 4, "layers": {"model.layers.0.mlp.down_prog": 8}}')
    assert "down_proj" in fails(capsys, 3, "generate", str(checkpoint), "hi", "--plan", str(plan))


def test_generate_refuses(checkpoint: Path, tiny: Tiny, capsys: Capture) -> None:
    folder = str(checkpoint)
    assert "choose from 8, 6, 4, 3, 2" in fails(capsys, 3, "generate", folder, "hi", "--bits", "5")
    assert "dtype is 'int8'" in fails(capsys, 2, "generate", folder, "hi", "--dtype", "int8")
    assert "device is 'gpu0'" in fails(capsys, 2, "generate", folder, "hi", "--device", "gpu0")
    assert "the prompt has no tokens" in fails(capsys, 3, "generate", folder, "")
    assert "no folder" in fails(capsys, 3, "generate", "/no/such", "hi")
    assert "no matquant checkpoint" in fails(capsys, 3, "generate", str(tiny("llama")), "hi")


def test_an_absent_accelerator_is_a_matter_of_resources() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so no device is absent")
    with pytest.raises(ResourceError, match=r"device cuda:0 is not usable here .*; use --device cpu"):
        run.check_device("cuda:0")


def test_a_folder_without_tokenizer(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    for file in checkpoint.iterdir():
        if file.is_file() and "token" not in file.name and file.name != "MANIFEST.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "no usable tokenizer" in fails(capsys, 3, "generate", str(tmp_path), "hi")


# --- eval -----------------------------------------------------------------------------------------------------------


def test_eval_against_the_original(checkpoint: Path, tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    plan = tmp_path / "careful.json"
    plan.write_text('{"default": 4, "layers": {"model.layers.0.mlp.down_proj": 8}}')
    common = ["eval", str(checkpoint), "--bits", "8,2", "--plan", str(plan), "--text", str(text), "--seq-len", "32", "--max-tokens", "128"]
    rows = answer(capsys, *common, "--reference", str(tiny("llama")))
    assert [row["label"] for row in rows] == ["32", "8", "2", "careful"]
    assert [row["bits"] for row in rows] == [32, 8, 2, None]
    assert rows[0]["kl"] == 0 and rows[1]["kl"] < rows[3]["kl"] < rows[2]["kl"]
    assert rows[1]["bits_per_weight"] == pytest.approx(8.75) and 0 <= rows[2]["top1"] <= 1
    assert rows[0]["protocol"]["sequences"] == 4 and rows[0]["protocol"]["text"] == str(text)
    alone = answer(capsys, *common)
    assert [row["kl"] for row in alone] == [None] * 3
    assert [row["perplexity"] for row in alone] == [row["perplexity"] for row in rows[1:]]
    assert main(common) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "measured on 124 tokens in 4 sequences of 32, stride 32" in out


def test_eval_on_text_of_its_own(checkpoint: Path, tiny: Tiny, capsys: Capture) -> None:
    common = ["eval", str(checkpoint), "--seq-len", "16", "--max-tokens", "32"]
    rows = answer(capsys, *common)
    assert [row["bits"] for row in rows] == [8, 6, 4, 3, 2]
    assert rows[0]["protocol"]["text"] == "sampled from the checkpoint at its widest, seed 0"
    rows = answer(capsys, *common, "--bits", "4", "--reference", str(tiny("llama")))
    assert rows[0]["protocol"]["text"] == "sampled from the original, seed 0"


def test_eval_refuses(checkpoint: Path, tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    folder, short = str(checkpoint), tmp_path / "short.txt"
    short.write_text("too short")
    assert "fewer than one sequence of 512" in fails(capsys, 3, "eval", folder, "--text", str(short))
    assert "no calibration file" in fails(capsys, 3, "eval", folder, "--text", "/no/such.txt")
    assert "choose from" in fails(capsys, 3, "eval", folder, "--bits", "7", "--seq-len", "8", "--max-tokens", "16")
    assert "whole numbers" in fails(capsys, 2, "eval", folder, "--bits", "eight")
    assert "no such folder" in fails(capsys, 3, "eval", folder, "--reference", "/no/such", "--seq-len", "8")


def test_broken_values_are_refused_by_the_parsers() -> None:
    assert flags.parse_bits("8,4") == (8, 4)
    assert flags.parse_targets("8:100,2:.5") == {8: 100.0, 2: 0.5}
    with pytest.raises(RecipeError):
        flags.parse_bits("")
    with pytest.raises(RecipeError):
        flags.parse_targets("8:1:2")
    assert flags.value_text({8: 100.0, 2: 0.5}) == "8:100,2:0.5" and flags.value_text(()) == "none"


# --- quantize -------------------------------------------------------------------------------------------------------

SMALL = ["--group-size", "32", "--num-samples", "4", "--seq-len", "32", "--eval-samples", "2"]


def test_quantize(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = ["quantize", str(tiny("llama")), "-o", str(out), *SMALL, "--calibration", str(text)]
    assert main(command) == 0
    stdout, stderr = capsys.readouterr()
    assert "model.layers.1.mlp.down_proj" in stdout and "perplexity" in stdout and f"written to {out}" in stdout
    assert "peak memory" in stdout and "(" in stdout and "quantizing 0:" in stdout
    assert "quantizing 2/2" in stderr and "model.layers.0.mlp.gate_proj  8: " in stderr
    assert main(["verify", str(out)]) == 0
    assert answer(capsys, "inspect", str(out))["widths"] == [8, 6, 4, 3, 2]
    assert answer(capsys, "generate", str(out), "ab", "--bits", "4", "--max-new-tokens", "2")["tokens"] <= 2
    assert "exists already" in fails(capsys, 3, *command)
    report = answer(capsys, *command, "--overwrite")
    assert report["folder"] == str(out)
    assert report == {"folder": str(out)} | json.loads((out / "report.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["32", "8", "6", "4", "3", "2"]


def test_dry_run_writes_nothing(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    command = ["quantize", str(tiny("mixtral")), "-o", str(tmp_path / "out"), *SMALL, "--dry-run"]
    found = answer(capsys, *command)
    assert found["layers"] == 8 and found["seconds"] > 0 and found["memory_bytes"] > 0
    assert set(found["bits_per_weight"]) == {"8", "6", "4", "3", "2"} and found["skipped"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "8 layers to quantize" in out and "left as it is because" in out and "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_quantize_refuses(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    def refused(code: int, model: object, *more: str) -> str:
        message = fails(capsys, code, "quantize", str(model), "-o", str(tmp_path / "out"), *SMALL, *more)
        assert not (tmp_path / "out").exists()
        return message

    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(bytes(range(256)))
    empty.write_text("")
    llama = tiny("llama")
    assert "no model '/no/such'" in refused(3, "/no/such")
    assert "group size 40 does not divide 64 input channels of model.layers.0.self_attn.q_proj" in refused(3, llama, "--group-size", "40")
    assert "is not text" in refused(3, llama, "--calibration", str(binary), "--overwrite")
    assert "is empty" in refused(3, llama, "--calibration", str(empty), "--overwrite")
    assert "dtype is 'int7'" in refused(2, llama, "--dtype", "int7")
    assert "device is 'gpu'" in refused(2, llama, "--device", "gpu")


def test_flags_of_a_run_have_the_library_s_defaults() -> None:
    import inspect

    from matquant.pipeline import RunOptions

    parameters = inspect.signature(cli.commands.quantize).parameters
    defaults = {field.name: parameters[field.name].default.default for field in fields(RunOptions)}
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()} == vars(RunOptions())
