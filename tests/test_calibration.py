"""Text to tokens to windows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from matquant import calibration, models
from matquant.errors import InputError

Tiny = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("quick_collect")

# --- text -------------------------------------------------------------------------------------------------------------


def test_documents(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_bytes("\ufeffone\r\n\r\ntwo ü\n".encode())
    assert calibration.read_texts(str(plain)) == ["one\n\ntwo ü\n"]
    lines = tmp_path / "a.jsonl"
    talk = {"messages": [{"role": "user", "content": "hi"}, {"content": None}, "?", {"content": "yes"}]}
    rows = [{"text": "a"}, {"content": "b", "id": 1}, {"page": "line\u2028separator\x85"}, talk]
    lines.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert calibration.read_texts(str(lines)) == ["a", "b", "line\u2028separator\x85", "hi\nyes"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", r"empty.txt is empty; give a file with text"),
        ("blank.txt", b" \n\t\n", r"blank.txt is empty"),
        ("image.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", r"image.txt is not text: byte 0 is not UTF-8"),
        ("zeros.txt", b"abc\0\0def", r"zeros.txt is not text: it holds zero bytes"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3: not JSON \(.*\); give one object a line"),
        ("deep.jsonl", b"[" * 100_000, r"deep.jsonl, line 1: not JSON"),
        ("long.jsonl", b"9" * 5000, r"long.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "b"}\n', r"a.jsonl, line 2: no text found; a row needs one of the keys text, content, page, messages"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl, line 1: no text found"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl, line 1: no text found"),
    ],
)
def test_texts_that_are_none(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        calibration.read_texts(str(tmp_path / name))


def test_no_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "gone.txt", tmp_path):
        with pytest.raises(InputError, match=r"no calibration file .*; give FILE.txt, FILE.jsonl, hf:DATASET\[:SPLIT\] or self"):
            calibration.read_texts(str(place))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot read .*a.txt: .*Permission denied"):
        calibration.read_texts(str(tmp_path / "a.txt"))


def test_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("datasets")

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        if name == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist\nmore")
        if name == "silent":
            raise ValueError
        return ({"text": f"{name} {split} {i}"} for i in range(5000))

    fake.load_dataset = load_dataset  # pyright: ignore
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = calibration.read_texts("hf:owner/name:test")
    assert found[1] == "owner/name test 1" and len(found) == 2000
    assert calibration.read_texts("hf:name")[0] == "name train 0"
    with pytest.raises(InputError, match=r"cannot load the dataset 'gone': Dataset 'gone' doesn't exist$"):
        calibration.read_texts("hf:gone")
    with pytest.raises(InputError, match=r"cannot load the dataset 'silent': ValueError$"):
        calibration.read_texts("hf:silent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets package; pip install 'matquant\[data\]', or give a text file"):
        calibration.read_texts("hf:name")


def test_tokens(tiny: Tiny) -> None:
    tokenizer = models.open_source(str(tiny("llama"))).tokenizer()
    assert calibration.leading_token(tokenizer) is None
    stream = calibration.token_stream(tokenizer, ["ab", "", "c"])
    assert tokenizer.decode(stream) == "ab\n\n\n\nc" and stream.dtype == torch.long
    assert calibration.token_stream(tokenizer, [""]).shape == (0,)

    class WithStart:
        bos_token_id = 7

        def __call__(self, text: str) -> Any:
            return type("Encoding", (), {"input_ids": [7, 1]})

    assert calibration.leading_token(WithStart()) == 7


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 999])
def test_windows_are_disjoint(bos: int | None) -> None:
    tokens = torch.arange(1005)
    train, held = calibration.choose_windows(tokens, 10, 20, 4, seed=3, spec="text", bos=bos)
    assert train.shape == (20, 10) and held.shape == (4, 10)
    assert bos is None or bool((train[:, 0] == bos).all() and (held[:, 0] == bos).all())
    body = torch.cat([train, held]).flatten() if bos is None else torch.cat([train, held])[:, 1:].flatten()
    assert len(body.unique()) == len(body), "a token is in two windows"
    assert int(held.flatten()[-1]) == (999 if bos is None else 998), "the end of the text is held out"
    again, _ = calibration.choose_windows(tokens, 10, 20, 4, seed=3, spec="text", bos=bos)
    other, _ = calibration.choose_windows(tokens, 10, 20, 4, seed=4, spec="text", bos=bos)
    assert torch.equal(train, again) and not torch.equal(train, other)


@pytest.mark.parametrize(
    "length, train, held, found",
    [(50, 8, 2, (4, 1)), (50, 2, 8, (1, 4)), (20, 32, 8, (1, 1)), (1000, 0, 8, (0, 8)), (30, 0, 8, (0, 3)), (30, 8, 0, (3, 0)), (29, 8, 0, (2, 0))],
)
def test_short_texts_are_shared(length: int, train: int, held: int, found: tuple[int, int]) -> None:
    windows = calibration.choose_windows(torch.arange(length), 10, train, held, seed=0, spec="text", bos=None)
    assert tuple(map(len, windows)) == found and {part.shape[1] for part in windows} == {10}


@pytest.mark.parametrize("length, train, held", [(19, 1, 1), (9, 1, 0), (9, 0, 1), (0, 8, 8)])
def test_text_shorter_than_a_sequence(length: int, train: int, held: int) -> None:
    with pytest.raises(
        InputError,
        match=rf"text has {length} tokens, fewer than {1 + (train > 0 < held)} sequences of 10; give more text, or a smaller --seq-len",
    ):
        calibration.choose_windows(torch.arange(length), 10, train, held, seed=0, spec="text", bos=None)


def test_sampling(tiny: Tiny) -> None:
    """Equal for equal seeds, and every token drawn from the model's own distribution: a model sure of one token repeats it."""
    model = models.load_dense("it", tiny("llama"), None)
    seen: list[tuple[int, int]] = []
    one, same, other = (calibration.sample_windows(model, 256, 3, 12, seed, lambda *step: seen.append(step)) for seed in (1, 1, 2))
    assert one.shape == (3, 12) and bool((one[:, 0] == 256).all()) and len(one[:, 1:].unique()) > 5
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert seen[:11] == [(i, 12) for i in range(2, 13)]
    model.lm_head = nn.Linear(64, 258)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = 100.0 * (torch.arange(258) == 42)
    assert bool((calibration.sample_windows(model, 256, 2, 5, 0, lambda *step: None)[:, 1:] == 42).all())
    model.lm_head.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"the model predicts non-finite probabilities, so no text can be sampled"):
        calibration.sample_windows(model, 256, 2, 5, 0, lambda *step: None)
