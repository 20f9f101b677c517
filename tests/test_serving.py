"""generate, chat and bench through the engine, as their users meet them: text that streams, turns that keep the cache, numbers that add up."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from building import build_checkpoint

from matquant import benchmark, plot
from matquant.cli import main, show, writing
from matquant.engine import Engine, Session
from matquant.recipe import Recipe

Tiny = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
Say = Callable[..., str]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama rounded to nearest; its default width is 8."""
    folder = tmp_path_factory.mktemp("serving") / "checkpoint"
    build_checkpoint(tiny("llama"), folder, Recipe(method="minmax", group_size=32))
    return folder


@pytest.fixture
def talking(checkpoint: Path, tmp_path: Path) -> Path:
    """The same with a chat template."""
    shutil.copytree(checkpoint, tmp_path / "talking")
    (tmp_path / "talking" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "talking"


@pytest.fixture
def say(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(folder, "hello", "/stats", flags=[...]) -> stdout of a chat whose input is these lines; stderr is in `say.err`."""

    def run(folder: Path, *lines: str, flags: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", str(folder), "--max-new-tokens", "6", "--temperature", "0", *flags]) == 0
        out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        return out

    return run


def answer(capture: Capture, *arguments: str) -> Any:
    capture.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capture.readouterr().out)


def fails(capture: Capture, code: int, *arguments: str) -> str:
    capture.readouterr()
    assert main(arguments) == code
    out, err = capture.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip().splitlines()[-1]


# --- generate -------------------------------------------------------------------------------------------------------


def test_generate_is_the_engine_s(checkpoint: Path, capsys: Capture) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = list(Engine.open(checkpoint, 4).generate(tokenizer("hello").input_ids, 8, stop=(257,)))
    found = answer(capsys, "generate", str(checkpoint), "hello", "--bits", "4", "--max-new-tokens", "8")
    assert found["engine"] and found["tokens"] == len(ids) and found["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert found["draft_bits"] is found["acceptance"] is None
    drafted = answer(capsys, "generate", str(checkpoint), "hello", "--bits", "4", "--max-new-tokens", "8", "--draft-bits", "3", "--threads", "1")
    assert drafted["text"] == found["text"] and drafted["draft_bits"] == 3
    assert 0 <= drafted["acceptance"] <= 1 <= drafted["tokens_per_pass"]
    assert main(["generate", str(checkpoint), "hello", "--max-new-tokens", "8", "--draft-bits", "2", "--head-bits", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("hello") and err.startswith("8 bits: 8 tokens in ") and "drafted at 2 bits: " in err and "tokens a pass" in err


def test_text_streams_to_a_terminal(checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", str(checkpoint), "hello", "--max-new-tokens", "12"]
    assert main(command) == 0
    whole = capsys.readouterr().out
    pieces: list[str] = []
    monkeypatch.setattr(show.Stream, "__init__", lambda self, as_json=False, always=False: setattr(self, "shows", not as_json))
    monkeypatch.setattr(show.Stream, "__call__", lambda self, text: pieces.append(text))
    assert main(command) == 0
    assert "".join(pieces) + capsys.readouterr().out == whole and len(pieces) == 14  # the prompt, each token, what was held back


def test_characters_of_several_tokens_come_whole(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)  # of bytes
    text = "naïve 日本 🙂!"
    words, ids = writing.Words(tokenizer), tokenizer(text).input_ids
    pieces = [words.add(token) for token in ids]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and "日" in pieces
    words = writing.Words(tokenizer)
    assert [words.add(token) for token in tokenizer("ï").input_ids[:1]] == [""] and words.rest() == "\ufffd"


def test_generate_ends_where_the_model_says(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    from transformers import AutoTokenizer

    ids = list(Engine.open(checkpoint).generate(AutoTokenizer.from_pretrained(checkpoint)("hello").input_ids, 8))
    assert answer(capsys, "generate", str(checkpoint), "hello", "--max-new-tokens", "8")["tokens"] == 8
    folder = tmp_path / "ends"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[2]}))
    assert answer(capsys, "generate", str(folder), "hello", "--max-new-tokens", "8")["tokens"] == ids.index(ids[2]) + 1


def test_drafts_that_are_refused(checkpoint: Path, capsys: Capture) -> None:
    command = ["generate", str(checkpoint), "hi", "--bits", "4"]
    message = "draft-bits is {}, and the text is read at 4 bits; a draft must be read at fewer: choose from 3, 2"
    for draft in ("4", "8", "5"):
        assert message.format(draft) in fails(capsys, 2, *command, "--draft-bits", draft)
    assert "there is none here" in fails(capsys, 2, *command[:3], "--bits", "2", "--draft-bits", "2")
    assert "not bfloat16 on cpu, and only the engine drafts; leave out --draft-bits" in fails(
        capsys, 2, *command, "--draft-bits", "2", "--dtype", "bfloat16"
    )


def test_another_type_is_written_by_transformers(checkpoint: Path, capsys: Capture) -> None:
    assert main(["generate", str(checkpoint), "hi", "--dtype", "bfloat16", "--max-new-tokens", "2"]) == 0
    assert "the engine computes in float32 on a CPU, not bfloat16 on cpu: transformers writes this" in capsys.readouterr().err


# --- chat -----------------------------------------------------------------------------------------------------------


def test_turns_keep_the_cache(talking: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    passed: list[int] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, ids, *rest: passed.append(len(ids)) or step(self, ids, *rest))
    out = say(talking, "hello", "and now?", flags=("--system", "be"))
    monkeypatch.setattr(Engine, "step", step)
    tokenizer, engine = AutoTokenizer.from_pretrained(talking), Engine.open(talking, 8)
    messages = [{"role": "system", "content": "be"}]
    replies = []
    for text in ("hello", "and now?"):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        replies.append(tokenizer.decode(list(engine.generate(ids, 6, stop=(257,))), skip_special_tokens=True))
        messages.append({"role": "assistant", "content": replies[-1]})
    assert out == "".join(f"{reply}\n" for reply in replies)
    first = len(tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False))
    assert passed[0] == first and sum(passed) < len(ids) + 12 + 6  # each token once, but for what decodes to other tokens than it was
    assert "/bits N" in say.err  # type: ignore[attr-defined]


def test_widths_change_between_turns_without_a_reload(checkpoint: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    original = Engine.open
    monkeypatch.setattr(Engine, "open", staticmethod(lambda *args, **kw: opened.append(args) or original(*args, **kw)))
    out = say(checkpoint, "hello", "/bits 4", "/draft 2", "hello", "/stats", "/draft 0", "/bits 2", "/reset", "hello", "/stats", "/quit", "not read")
    assert len(opened) == 1
    lines = out.splitlines()
    assert any(line.startswith("4 bits, ") for line in lines) and any(line.startswith("drafted at 2 bits: ") for line in lines)
    assert lines[-2].startswith("2 bits, 11 tokens of at most 128") and lines[-1].startswith("last reply: 5 tokens read, 6 written, ")
    assert "this model has no chat template: it continues the text plainly" in say.err  # type: ignore[attr-defined]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(list(Engine.open(checkpoint, 2).generate(tokenizer("hello").input_ids, 6)), skip_special_tokens=True) in out


def test_chat_says_what_is_wrong_and_goes_on(checkpoint: Path, say: Say) -> None:
    out = say(checkpoint, "/bits 5", "/bits many", "/draft 8", "/nothing", "", "x" * 130, "/bits 4", "/draft 3", "/bits 3", "/stats")
    err = say.err.splitlines()  # type: ignore[attr-defined]
    for words in (
        "error: 5 bits were not kept of model.layers.0.self_attn.q_proj; choose from 8, 6, 4, 3, 2",
        "error: /bits takes a whole number of bits, not 'many'",
        "error: draft-bits is 8, and the text is read at 8 bits",
        "error: no command '/nothing'; there are /bits N",
        "error: the conversation would have 130 tokens, and there is room for 128; /reset it",
        "no drafts any more: they were not narrower",
    ):
        assert any(line.startswith(words) for line in err), words
    assert "3 bits, 0 tokens of at most 128" in out and "last reply: 0 tokens read, 0 written" in out


def test_ctrl_c_stops_the_reply_alone(checkpoint: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = say(checkpoint, "hello", "/quit")
    reply = Session.reply

    def stopped(self: Session, *arguments: Any) -> Iterator[int]:
        tokens = reply(self, *arguments)
        yield next(tokens)
        yield next(tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "reply", stopped)
    out = say(checkpoint, "hello", "/stats")
    assert (
        " (stopped)\n" in out and "last reply: 5 tokens read, 2 written" in out and whole.startswith(out.partition(" (stopped)")[0].rstrip("\ufffd"))
    )


def test_ctrl_c_at_the_prompt_does_not_end_the_program(checkpoint: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([KeyboardInterrupt, "/stats", "hello", EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(Session, "rewind", lambda self, ids: [])
    monkeypatch.setattr(Session, "reply", lambda self, *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    out = say(checkpoint)
    assert out.startswith("\n(/quit ends)\n8 bits, 0 tokens") and out.endswith(" (stopped)\n")


# --- bench ----------------------------------------------------------------------------------------------------------

FEW = ("--prompt-tokens", "6", "--new-tokens", "5", "--repeats", "1")


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LEAST_PROBE", 2**20)
    monkeypatch.setattr(benchmark, "last_cache", lambda: 2**20)


@pytest.mark.usefixtures("small_probe")
def test_bench_numbers_add_up(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / "speed.svg"
    found = answer(
        capsys, "bench", str(checkpoint), "--bits", "2,8", "--draft-bits", "4,2", *FEW, "--no-memory", "--threads", "1", "--plot", str(picture)
    )
    engine = Engine.open(checkpoint, 8, 8)
    assert [row["bits"] for row in found["widths"]] == [8, 2] and found["threads"] == 1 and found["model"] == "checkpoint"
    for row in found["widths"]:
        assert row["read_bytes"] == engine.read_bytes(row["bits"]) and row["prefill"] > 0 and row["peak_bytes"] is None
        assert row["read_gb_s"] == pytest.approx(row["read_bytes"] * row["decode"] / 1e9)
        assert row["share"] == pytest.approx(row["read_gb_s"] / found["bandwidth_gb_s"])
    assert [(row["bits"], row["draft_bits"]) for row in found["drafts"]] == [(8, 4), (8, 2)]
    for row in found["drafts"]:
        assert row["speedup"] == pytest.approx(row["decode"] / found["widths"][0]["decode"]) and 0 <= row["acceptance"] <= 1
    shapes = {(row["out"], row["in"], row["bits"]) for row in found["latency"]}
    assert shapes == {(*shape, bits) for shape in ((64, 64), (32, 64), (96, 64), (64, 96)) for bits in (8, 2)}
    seconds = {(row["out"], row["in"], row["bits"]): row["seconds"] for row in found["latency"]}
    layers = [weight.shape for block in engine.stepper.blocks for weight in block.weights.values()]
    rest = [1 / row["decode"] - sum(seconds[(*shape, row["bits"])] for shape in layers) for row in found["widths"]]
    assert all(value >= 0 for value in seconds.values()) and found["overhead_seconds"] == pytest.approx(max(sum(rest) / 2, 0.0))
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.usefixtures("small_probe")
def test_bench_shows_tables_and_peaks(checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "peak_memory", lambda *arguments: 123_000_000)
    assert main(["bench", str(checkpoint), "--bits", "8,3", "--draft-bits", "2", *FEW, "--plot", str(tmp_path / "speed.png")]) == 0
    out = capsys.readouterr().out
    assert "123 MB" in out and "8 by 2" in out and "6 tokens of prompt, 5 new ones, medians of 1" in out and "read bandwidth" in out
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_bench_refuses(checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bench", str(checkpoint), "--no-memory"]
    assert "does not offer 5 bits" in fails(capsys, 3, *command, "--bits", "5")
    assert "a draft must be read at fewer" in fails(capsys, 2, *command, "--bits", "4,2", "--draft-bits", "6")
    assert "give a name that ends in .svg or .png" in fails(capsys, 3, *command, "--plot", "x.pdf")
    assert "is no folder; make it, or draw elsewhere" in fails(capsys, 3, *command, "--plot", str(tmp_path / "none" / "x.svg"))
    assert "there is room for; ask for fewer (--prompt-tokens, --new-tokens)" in fails(capsys, 3, *command, "--prompt-tokens", "900")
    monkeypatch.setattr(plot, "available", lambda: False)
    assert "without matplotlib; pip install 'matquant[plot]'" in fails(capsys, 3, *command, "--plot", str(tmp_path / "x.svg"))


def test_the_last_cache_is_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("48K", "2048K", "3M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(benchmark, "CACHE", tmp_path)
    assert benchmark.last_cache() == 3 * 2**20
    monkeypatch.setattr(benchmark, "CACHE", tmp_path / "none")
    assert benchmark.last_cache() == 0
