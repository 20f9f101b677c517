"""Texts: documents as a stream, and packed into sequences without padding, in an order that a seed fixes.

Of rows (JSONL, datasets) only a buffer is held, so they may be larger than memory. It holds some millions of tokens: of a text that is not longer, a
short training sees all parts, and not its beginning. The n-th sequence depends on the text and the seed
alone: a run that is resumed skips what it has seen, and several processes read the same stream and take different sequences of it.
"""

import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from matquant.errors import InputError

TEXT_KEYS = ("text", "content", "page", "messages")
SEPARATOR = "\n\n"  # between documents
PIECE = 2**16  # characters that are tokenized at once
BUFFER = 2**22  # tokens of the sequences that are shuffled among each other: 32 MiB

Stream = Callable[[], Iterator[Tensor]]
"""Sequences Int[Tensor, "length"] from the start."""


# --- documents ------------------------------------------------------------------------------------------------------


def documents(spec: str) -> Iterator[str]:
    """Of FILE.txt (one), FILE.jsonl (one a line) or hf:DATASET[:SPLIT]. Raises InputError when the fault is reached."""
    if spec.startswith("hf:"):
        yield from _rows_of_dataset(spec[3:])
        return
    if not Path(spec).is_file():
        raise InputError(f"no calibration file {spec}; give FILE.txt, FILE.jsonl, hf:DATASET[:SPLIT] or self")
    found = False
    try:
        with Path(spec).open("rb") as file:
            for text in _rows(spec, file) if Path(spec).suffix in (".jsonl", ".json") else [_decoded(spec, file.read(), 0)]:
                found = found or bool(text.strip())
                yield text
    except OSError as error:
        raise InputError(f"cannot read {spec}: {error}") from None
    if not found:
        raise InputError(f"{spec} is empty; give a file with text")


def _decoded(spec: str, data: bytes, start: int) -> str:
    """start: where in the file the bytes lie."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{spec} is not text: byte {start + error.start} is not UTF-8; give a text file") from None
    if "\0" in text:
        raise InputError(f"{spec} is not text: it holds zero bytes; give a text file")
    text = text.removeprefix("\ufeff") if start == 0 else text  # the byte order mark that some editors write
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _rows(spec: str, lines: Iterable[bytes]) -> Iterator[str]:
    start = 0
    for number, data in enumerate(lines, 1):
        line = _decoded(spec, data, start)
        start += len(data)
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{spec}, line {number}: not JSON ({error}); give one object a line") from None
            yield _document(row, f"{spec}, line {number}")


def _document(row: Any, where: str) -> str:
    for key in TEXT_KEYS:
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, str):
            return value
        if key == "messages" and isinstance(value, list):
            contents = [message.get("content") for message in value if isinstance(message, dict)]
            return "\n".join(content for content in contents if isinstance(content, str))
    raise InputError(f"{where}: no text found; a row needs one of the keys {', '.join(TEXT_KEYS)}")


def _rows_of_dataset(spec: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("hf:DATASET needs the datasets package; pip install 'matquant[data]', or give a text file") from None
    name, _, split = spec.partition(":")
    try:
        for row in load_dataset(name, split=split or "train", streaming=True):
            yield _document(row, f"hf:{spec}")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the dataset {name!r}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None


# --- sequences ------------------------------------------------------------------------------------------------------


def packed(tokenizer: Any, texts: Iterable[str], seq_len: int, bos: int | None) -> Iterator[Int[Tensor, " length"]]:
    """All texts, one after another with an empty line between, cut into sequences of `seq_len` tokens, each led by `bos` if there is one.

    The rest at the end is dropped.
    """
    step = seq_len - (bos is not None)
    lead = [] if bos is None else [bos]
    rest: list[int] = []
    parts = (SEPARATOR * (number > 0) + text for number, text in enumerate(texts))
    for piece in chain.from_iterable(map(_pieces, parts)):
        rest += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        whole = len(rest) // step * step
        for start in range(0, whole, step):
            yield torch.tensor(lead + rest[start : start + step])
        rest = rest[whole:]


def _pieces(text: str) -> Iterator[str]:
    """The text cut after line ends: a tokenizer's time may grow faster than the text, and a progress bar should move."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def without_last(sequences: Iterable[Int[Tensor, " length"]], count: int) -> Iterator[Int[Tensor, " length"]]:
    """All but the last `count`, which need not be known before."""
    held = deque[Tensor]()
    for sequence in sequences:
        held.append(sequence)
        if len(held) > count:
            yield held.popleft()


def shuffled(sequences: Iterable[Int[Tensor, " length"]], seed: int, buffer: int = BUFFER) -> Iterator[Int[Tensor, " length"]]:
    """The same sequences; each next one is drawn from those that are held, of `buffer` tokens together."""
    draw, held, tokens = random.Random(seed), list[Tensor](), 0

    def drawn() -> Tensor:
        place = draw.randrange(len(held))
        held[place], held[-1] = held[-1], held[place]
        return held.pop()

    for sequence in sequences:
        held.append(sequence)
        tokens += len(sequence)
        if tokens > buffer:
            yield (one := drawn())
            tokens -= len(one)
    while held:
        yield drawn()


def with_held_out(make: Callable[[], Iterator[Int[Tensor, " length"]]], held: int, seed: int) -> tuple[Int[Tensor, "held length"], Stream]:
    """(`held` sequences of a text, or an eighth of a short one; an endless stream of the others, in another order each time round).

    make: the text's sequences from its start. A text of one sequence serves for both. Raises InputError for one of none.
    """
    first = list(islice(shuffled(make(), seed), 8 * held))
    if not first:
        raise InputError("the text to train on is shorter than one sequence; give more text, or a smaller --seq-len")
    held = max(min(held, len(first) // 8), 1)
    skipped = held if len(first) > 1 else 0

    def others() -> Iterator[Tensor]:
        return islice(shuffled(make(), seed), skipped, None)

    def endless() -> Iterator[Tensor]:
        yield from others()
        for epoch in count(1):
            yield from shuffled(others(), seed + epoch)

    return torch.stack(first[:held]), endless
