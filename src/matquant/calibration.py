"""Text -> windows of tokens to calibrate and to measure on."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from matquant.errors import InputError

TEXT_KEYS = ("text", "content", "page", "messages")


# --- text -----------------------------------------------------------------------------------------------------------


def read_texts(spec: str) -> list[str]:
    """Documents of FILE.txt (one), FILE.jsonl (one a line) or hf:DATASET[:SPLIT]. Raises InputError."""
    if spec.startswith("hf:"):
        return _read_dataset(spec[3:])
    path = Path(spec)
    if not path.is_file():
        raise InputError(f"no calibration file {spec}; give FILE.txt, FILE.jsonl, hf:DATASET[:SPLIT] or self")
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise InputError(f"{spec} is not text: byte {error.start} is not UTF-8; give a text file") from None
    except OSError as error:
        raise InputError(f"cannot read {spec}: {error}") from None
    if "\0" in text:
        raise InputError(f"{spec} is not text: it holds zero bytes; give a text file")
    if not text.strip():
        raise InputError(f"{spec} is empty; give a file with text")
    return _read_jsonl(spec, text) if path.suffix in (".jsonl", ".json") else [text]


def _read_jsonl(spec: str, text: str) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{spec}, line {number}: not JSON ({error}); give one object a line") from None
        documents.append(_document(row, f"{spec}, line {number}"))
    return documents


def _document(row: Any, where: str) -> str:
    for key in TEXT_KEYS:
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, str):
            return value
        if key == "messages" and isinstance(value, list):
            contents = [message.get("content") for message in value if isinstance(message, dict)]
            return "\n".join(content for content in contents if isinstance(content, str))
    raise InputError(f"{where}: no text found; a row needs one of the keys {', '.join(TEXT_KEYS)}")


def _read_dataset(spec: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("hf:DATASET needs the datasets package; pip install 'matquant[data]', or give a text file") from None
    name, _, split = spec.partition(":")
    try:
        rows = load_dataset(name, split=split or "train", streaming=True)
        return [_document(row, f"hf:{spec}") for _, row in zip(range(2000), rows, strict=False)]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the dataset {name!r}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None


def leading_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before every text by itself, or None."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def start_token(tokenizer: Any) -> int:
    """The token that sampled text starts from: <s> or what serves as such, else the end of the text before, else 0."""
    return next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)


def token_stream(tokenizer: Any, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    """All documents, one after another with an empty line between, without special tokens."""
    return torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)


def choose_windows(
    tokens: Int[Tensor, " tokens"], seq_len: int, train: int, held_out: int, seed: int, spec: str, bos: int | None
) -> tuple[Int[Tensor, "train length"], Int[Tensor, "held length"]]:
    """Disjoint windows of `seq_len` tokens: up to `train` of them to calibrate on, up to `held_out` others to report on.

    Each is led by `bos` where the tokenizer has one that it prepends itself. The last windows of the text are held out, the
    rest is sampled without repetition; a short text is split in the proportion asked for. Raises InputError if it is shorter
    than one sequence of each kind.
    """
    step = seq_len - (bos is not None)
    available, needed = len(tokens) // step, (train > 0) + (held_out > 0)
    if available < needed:
        raise InputError(f"{spec} has {len(tokens)} tokens, fewer than {needed} sequences of {seq_len}; give more text, or a smaller --seq-len")
    cut = tokens[: available * step].reshape(available, step)
    if bos is not None:
        cut = torch.cat([torch.full((available, 1), bos), cut], 1)
    held = min(held_out, max(available * held_out // (train + held_out), 1)) if held_out else 0
    pool = range(available - held)
    chosen = sorted(random.Random(seed).sample(pool, min(train, len(pool))))
    return cut[chosen], cut[available - held :]


def sample_windows(model: Any, start: int, count: int, seq_len: int, seed: int, on_token: Callable[[int, int], None]) -> Int[Tensor, "count length"]:
    """Text that the model makes itself: `count` sequences sampled at temperature 1 from `start`, deterministic for a seed.

    Raises InputError if the model's probabilities are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), start, dtype=torch.long, device=model.device)
    cache, step = None, ids
    with torch.inference_mode():
        for position in range(1, seq_len):
            output = model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(-1).cpu()
            if not probabilities.isfinite().all():
                raise InputError("the model predicts non-finite probabilities, so no text can be sampled; try --dtype float32 or another model")
            step = torch.multinomial(probabilities, 1, generator=generator).to(ids.device)
            ids = torch.cat([ids, step], 1)
            on_token(position + 1, seq_len)
    return ids.cpu()
