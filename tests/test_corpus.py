"""Streams of text, cut and shuffled, against the same done at once."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant import corpus
from matquant.corpus import documents, packed, shuffled, with_held_out
from matquant.errors import InputError


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> Any:
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": list(text.encode())})


@settings(deadline=None)
@given(st.lists(st.text("ab\n", max_size=30), min_size=1, max_size=6), st.integers(2, 9), st.booleans(), st.integers(1, 12))
def test_packed_is_one_text_cut(texts: list[str], seq_len: int, led: bool, piece: int) -> None:
    whole = list("\n\n".join(texts).encode())
    step = seq_len - led
    want = [[7] * led + whole[i : i + step] for i in range(0, len(whole) - step + 1, step)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", piece)
        got = [sequence.tolist() for sequence in packed(Bytes(), texts, seq_len, 7 if led else None)]
    assert got == want


def test_streams_are_not_read_ahead() -> None:
    """A row is read when the sequences before it are used up, or they fill the buffer."""
    read: list[int] = []
    rows = ((read.append(i), "abcd" * 2)[1] for i in range(1000))
    sequences = packed(Bytes(), rows, 4, None)
    list(islice(sequences, 4))
    assert len(read) == 2
    list(islice(shuffled(sequences, 0, buffer=10 * 4), 1))
    assert len(read) < 12


def test_shuffled_is_a_permutation_that_a_seed_fixes() -> None:
    rows = [torch.tensor([i]) for i in range(100)]
    order = lambda seed, buffer=20: [int(x) for x in shuffled(rows, seed, buffer)]  # noqa: E731
    assert sorted(order(0)) == list(range(100)) and order(0) == order(0) != order(1) and order(0) != list(range(100))
    assert all(value <= place + 20 for place, value in enumerate(order(0)))
    assert order(0, 0) == list(range(100))


def test_short_trainings_see_all_parts_of_a_text() -> None:
    """So do the sequences that decide; these are never trained on, and each of the others is once in every round, in another order."""
    held, stream = with_held_out(lambda: (torch.tensor([i, i]) for i in range(1000)), 8, 3)
    rounds = [int(ids[0]) for ids in islice(stream(), 2 * 992)]
    first, second, kept = rounds[:992], rounds[992:], {int(ids[0]) for ids in held}
    assert len(kept) == 8 and sorted({*first, *kept}) == sorted({*second, *kept}) == list(range(1000)) and first != second
    for part in (kept, first[:32]):
        assert min(part) < 250 and max(part) > 750
    assert [int(ids[0]) for ids in islice(stream(), 50)] == rounds[:50]  # from the start again


def test_rows_before_a_fault_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\n{"text": "\xff"}\n')
    rows = documents(str(path))
    assert [next(rows), next(rows)] == ["a", "b"]
    with pytest.raises(InputError, match="byte 42 is not UTF-8"):
        next(rows)


def test_rows_without_text_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": " "}) + "\n\n")
    rows: Callable[[], list[str]] = lambda: list(documents(str(path)))  # noqa: E731
    with pytest.raises(InputError, match="a.jsonl is empty; give a file with text"):
        rows()
