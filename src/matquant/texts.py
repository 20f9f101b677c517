"""Which sequences a run calibrates on, trains on and reports on; none serves for two of these, where there is text enough."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from matquant import calibration
from matquant.blocks import Progress
from matquant.corpus import Stream, documents, packed, with_held_out, without_last
from matquant.evaluate import windows
from matquant.models import Source
from matquant.recipe import Recipe

HELD_OUT = 8  # sequences of the text to train on that decide whether training helped
SLACK = 2  # sequences by which a text may be longer or shorter when it is tokenized piece by piece


@dataclass(frozen=True)
class Chosen:
    """train: to calibrate on. held: to report on. leads: the token that every sequence starts with, if any. words: what is reported on."""

    train: Int[Tensor, "train length"]
    held: Int[Tensor, "held length"]
    leads: int | None
    words: str


def choose(source: Source, recipe: Recipe, train_count: int, eval_text: Path | None, load_dense: Callable[[], Any], follow: Progress) -> Chosen:
    """`train_count` sequences to calibrate on and those of the report, from eval_text if it is given. Raises InputError."""
    wanted = recipe.eval_samples
    empty = torch.zeros(0, recipe.seq_len, dtype=torch.long)
    if not wanted and not train_count:
        return Chosen(empty, empty, None, "")
    tokenizer = source.tokenizer()
    bos = calibration.leading_token(tokenizer)
    external = _first_of(eval_text, tokenizer, recipe, bos) if eval_text and wanted else None
    held_count = 0 if external is not None else wanted
    if external is not None and not train_count:
        return Chosen(empty, external, bos, str(eval_text))
    if recipe.calibration == "self":
        start = calibration.start_token(tokenizer)
        told = lambda done, of: follow("sampling text", done, of)  # noqa: E731
        sampled = calibration.sample_windows(load_dense(), start, train_count + held_count, recipe.seq_len, recipe.seed, told)
        train, held, leads = sampled[:train_count], sampled[train_count:], start
        words = f"sampled from the original, seed {recipe.seed}, not calibrated on"
    else:
        tokens = calibration.token_stream(tokenizer, calibration.read_texts(recipe.calibration))
        train, held = calibration.choose_windows(tokens, recipe.seq_len, train_count, held_count, recipe.seed, recipe.calibration, bos)
        leads, words = bos, f"{recipe.calibration}, the part not calibrated on"
    return Chosen(train, held, leads, words) if external is None else Chosen(train, external, bos, str(eval_text))


def _first_of(text: Path, tokenizer: Any, recipe: Recipe, bos: int | None) -> Tensor:
    tokens = calibration.token_stream(tokenizer, calibration.read_texts(str(text)))
    return windows(tokens, recipe.seq_len, bos, recipe.eval_samples)


def training_text(
    recipe: Recipe, tokenizer: Any, calibrated: Int[Tensor, "samples length"], reported: int
) -> tuple[Int[Tensor, "held length"], Stream]:
    """(sequences that decide, an endless stream of others), none of which the report is measured on.

    calibrated: the sequences to calibrate on, which serve where text is sampled from the model. reported: how many of the calibration text's
    last sequences the report takes; of a dataset, whose first rows these are from, the later rows are trained on.
    """
    spec = recipe.train_text or recipe.calibration
    if spec == "self":
        return with_held_out(lambda: iter(calibrated), HELD_OUT, recipe.seed)
    bos, shared = calibration.leading_token(tokenizer), spec == recipe.calibration

    def make() -> Iterator[Tensor]:
        texts = calibration.texts_beyond(spec) if shared else documents(spec)
        return without_last(packed(tokenizer, texts, recipe.seq_len, bos), reported + SLACK if shared and reported else 0)

    return with_held_out(make, HELD_OUT, recipe.seed)
