"""Text -> windows of tokens to calibrate and to measure on."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from matquant.corpus import SEPARATOR, documents
from matquant.errors import InputError

ROWS = 2000  # of a dataset: more than any calibration takes


# --- text -----------------------------------------------------------------------------------------------------------


def read_texts(spec: str) -> list[str]:
    """Documents of FILE.txt (one), FILE.jsonl (one a line) or hf:DATASET[:SPLIT] (the first 2000). Raises InputError."""
    return list(islice(documents(spec), ROWS if spec.startswith("hf:") else None))


def texts_beyond(spec: str) -> Iterator[str]:
    """All documents; of a dataset with more rows than `read_texts` reads, the rows after these."""
    rows = documents(spec)
    if not spec.startswith("hf:"):
        return rows
    first, later = list(islice(rows, ROWS)), next(rows, None)
    return iter(first) if later is None else chain([later], rows)


def leading_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before every text by itself, or None."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def start_token(tokenizer: Any) -> int:
    """The token that sampled text starts from: <s> or what serves as such, else the end of the text before, else 0."""
    return next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)


def token_stream(tokenizer: Any, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    """All documents, one after another with an empty line between, without special tokens."""
    return torch.tensor(tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)


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
