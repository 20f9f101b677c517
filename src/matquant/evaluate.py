"""Quality at every width, from one load: perplexity, KL divergence to the original, top-1 agreement.

Position i of a sequence predicts token i + 1, so a sequence of n tokens is scored n - 1 times and its first token never.
Over all scored positions, with p the original's distribution and q the checkpoint's at some width:

    perplexity   exp(mean of -log q[the token that came next])
    KL           mean of sum_v p[v] (log p[v] - log q[v]), in nats; also its 99.9 % quantile, the worst positions
    top-1        share of positions where the most probable token of p and q is the same

Perplexity alone hides damage: errors that make some tokens likelier and others less so cancel in it. KL does not cancel.

Batches are the outer loop and widths the inner one, so that the original runs once and its logits live for one batch only.
Probabilities are float32 and made a few positions at a time; sums are float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.plan import BitPlan, Layout, Shape, Table

Logits = Callable[[Tensor], Tensor]
"""ids Int[Tensor, "batch length"] -> logits Float[Tensor, "batch length vocab"]"""

ORIGINAL = "original"
BATCH_TOKENS = 1024  # enough to keep the matmuls busy on a CPU; two sets of logits of that many positions are held
# Positions x vocabulary turned into float32 probabilities at a time: 64 to 128 MiB an array. Below 32 MiB glibc would take such
# arrays from its heap, where aligned blocks of this size are not reused: memory then grew by 0.2 GB a batch.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Protocol:
    """How it was measured; stated beside every number.

    stride: equal to seq_len, that is, sequences do not overlap. tokens: scored positions. bos, text: in words.
    """

    seq_len: int
    stride: int
    tokens: int
    sequences: int
    bos: str
    text: str

    @staticmethod
    def of(sequences: Int[Tensor, "samples length"], bos_id: int | None, text: str) -> "Protocol":
        """bos_id: the token that leads every sequence, or None."""
        samples, length = sequences.shape
        bos = "none" if bos_id is None else f"token {bos_id} leads every sequence"
        return Protocol(length, length, samples * (length - 1), samples, bos, text)


@dataclass(frozen=True)
class Quality:
    """What `measure` found under one setting. kl, kl_p999 (nats) and top1 (0 to 1) are None without an original."""

    label: str
    perplexity: float
    kl: float | None
    kl_p999: float | None
    top1: float | None


@dataclass(frozen=True)
class Row:
    """One line of a report. bits: a uniform width, None for a mixed plan.

    bits_per_weight: of the quantized weights, metadata included. bits_per_weight_model: of all numbers of the model, those
    that are not quantized as they are stored. file_bytes: what a reader of that width must fetch.
    """

    label: str
    bits: float | None
    bits_per_weight: float
    bits_per_weight_model: float
    file_bytes: int
    perplexity: float
    kl: float | None = None
    kl_p999: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a row follow from, by arithmetic.

    other_weights, other_bytes: numbers and bytes of the tensors that are not quantized. original_bits: of a number in the
    original model. tables: embeddings and heads that are stored quantized, at a width of their own.
    """

    shapes: Mapping[str, Shape]
    layout: Layout
    other_weights: int
    other_bytes: int
    original_bits: int
    tables: Mapping[str, Table] = field(default_factory=dict[str, Table])

    @staticmethod
    def of(checkpoint: Checkpoint) -> "Sizes":
        weights = size = 0
        for name in checkpoint.base:
            tensor = checkpoint.base[name]
            weights, size = weights + tensor.numel(), size + tensor.nbytes
        dtype = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), None)
        original_bits = 8 * dtype.itemsize if isinstance(dtype, torch.dtype) else 16
        return Sizes(checkpoint.modules, checkpoint.layout, weights, size, original_bits, checkpoint.tables)

    @property
    def quantized_weights(self) -> int:
        return sum(shape.weights for shape in self.shapes.values())

    @property
    def table_weights(self) -> int:
        return sum(table.shape.weights for table in self.tables.values())

    @property
    def weights(self) -> int:
        """Of the whole model."""
        return self.quantized_weights + self.table_weights + self.other_weights

    def row(self, quality: Quality, plan: BitPlan, file_bytes: int) -> Row:
        """A line for the checkpoint read by `plan`."""
        bits = plan.read_bits(self.shapes, self.layout)
        other = self.other_bytes + sum(table.stored_bytes for table in self.tables.values())
        whole = (bits + 8 * other) / self.weights
        widths = {plan.bits(name) for name in self.shapes}
        uniform = float(widths.pop()) if len(widths) == 1 else None
        return _row(quality, quality.label, uniform, bits / self.quantized_weights, whole, file_bytes)

    def original(self, quality: Quality) -> Row:
        """A line for the original model, labelled by its bits; its size is that of its tensors."""
        bits = float(self.original_bits)
        size = (self.quantized_weights + self.table_weights) * self.original_bits // 8 + self.other_bytes
        whole = 8 * size / self.weights
        return _row(quality, str(self.original_bits), bits, bits, whole, size)


def _row(quality: Quality, label: str, bits: float | None, per_weight: float, per_weight_model: float, file_bytes: int) -> Row:
    return Row(label, bits, per_weight, per_weight_model, file_bytes, quality.perplexity, quality.kl, quality.kl_p999, quality.top1)


# --- measuring ------------------------------------------------------------------------------------------------------


def windows(ids: Int[Tensor, " n"], seq_len: int, bos_id: int | None = None, limit: int | None = None) -> Int[Tensor, "samples length"]:
    """Cut a text into sequences of `seq_len` tokens that do not overlap; the rest at its end is dropped.

    bos_id: put this token first in each, in which case every token of the text is predicted once. limit: sequences at most.
    Raises InputError if the text is shorter than one sequence.
    """
    taken = seq_len - (bos_id is not None)
    if taken < 1 or seq_len < 2:
        raise InputError(f"sequences of {seq_len} tokens predict nothing; give at least 2 (--seq-len)")
    samples = min(len(ids) // taken, len(ids) if limit is None else limit)
    if samples < 1:
        raise InputError(f"the text has {len(ids)} tokens, fewer than one sequence of {seq_len}; give more text or a smaller --seq-len")
    body = ids[: samples * taken].reshape(samples, taken)
    return body if bos_id is None else torch.cat([body.new_full((samples, 1), bos_id), body], 1)


def measure(
    model: Logits,
    reference: Logits | None,
    sequences: Int[Tensor, "samples length"],
    settings: Sequence[tuple[str, Callable[[], None]]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """Quality of `model` under each setting (a label, and what to call to switch to it), led by ORIGINAL if there is a reference.

    progress: called with (forward passes done, of how many). Raises InputError for logits that are not finite, saying where.
    """
    samples, length = sequences.shape
    if samples < 1 or length < 2:
        raise InputError(f"{samples} sequences of {length} tokens predict nothing; give at least one of 2 tokens")
    original = _Tally(ORIGINAL)
    tallies = [_Tally(label) for label, _ in settings]
    batch = max(1, BATCH_TOKENS // length)
    total, done = -(-samples // batch) * (len(settings) + (reference is not None)), 0
    with torch.inference_mode():
        for start in range(0, samples, batch):
            ids = sequences[start : start + batch]
            truth = None if reference is None else reference(ids)
            if truth is not None:
                original.add(truth, truth, ids, start)
                done = _advance(done, total, progress)
            for (_, switch), tally in zip(settings, tallies, strict=True):
                switch()
                tally.add(model(ids), truth, ids, start)
                done = _advance(done, total, progress)
    return [tally.quality() for tally in ([original] if reference else []) + tallies]


def _advance(done: int, total: int, progress: Callable[[int, int], None] | None) -> int:
    if progress is not None:
        progress(done + 1, total)
    return done + 1


@dataclass(frozen=True)
class _Tally:
    """Per-position results of one setting, on the CPU: 12 bytes a position."""

    label: str
    nll: list[Float[Tensor, " positions"]] = field(default_factory=list[Tensor])
    kl: list[Float[Tensor, " positions"]] = field(default_factory=list[Tensor])
    agree: list[Float[Tensor, " positions"]] = field(default_factory=list[Tensor])

    @property
    def _name(self) -> str:
        return "the original" if self.label == ORIGINAL else f"the checkpoint ({self.label})"

    def add(
        self,
        logits: Float[Tensor, "batch length vocab"],
        truth: Float[Tensor, "batch length vocab_of_truth"] | None,
        ids: Int[Tensor, "batch length"],
        first: int,
    ) -> None:
        """first: index of the batch's first sequence, for messages."""
        vocab = logits.shape[-1]
        if truth is not None and truth.shape[-1] != vocab:
            raise InputError(f"the reference predicts {truth.shape[-1]} tokens, the checkpoint {vocab}; give the model that was quantized")
        if int(ids.max()) >= vocab:
            raise InputError(f"the text holds token {int(ids.max())}, but {self._name} predicts {vocab}; use the tokenizer that belongs to it")
        length = ids.shape[1]
        following = ids.roll(-1, 1).flatten().to(logits.device)  # the last position of a sequence predicts nothing, and is left out below
        predicts = (torch.arange(ids.numel(), device=logits.device) + 1) % length > 0
        flat, known = logits.flatten(0, 1), None if truth is None else truth.flatten(0, 1)
        chunks = min(ids.numel(), max(1, ids.numel() * vocab // CHUNK_ELEMENTS))
        for part in torch.arange(ids.numel()).tensor_split(chunks):
            here = slice(int(part[0]), int(part[-1]) + 1)
            where = f"sequence {first + here.start // length}, position {here.start % length}"
            self._add_positions(flat[here], None if known is None else known[here].to(logits.device), following[here], predicts[here], where)

    def _add_positions(
        self,
        logits: Float[Tensor, "positions vocab"],
        truth: Float[Tensor, "positions vocab"] | None,
        following: Int[Tensor, " positions"],
        predicts: Bool[Tensor, " positions"],
        where: str,
    ) -> None:
        log_q = logits.float().log_softmax(-1)
        found = [-log_q.gather(1, following[:, None]).squeeze(1)]
        if truth is not None:
            log_p = truth.float().log_softmax(-1)
            p = log_p.exp()
            # p = 0 counts 0, also where both are -inf, as for tokens that a model masks out
            found.append(torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(-1))
            found.append((truth.argmax(-1) == logits.argmax(-1)).float())
        found = [values[predicts] for values in found]
        if not all(bool(values.isfinite().all()) for values in found):
            raise InputError(
                f"the logits of {self._name} are not finite in {where} or soon after; try --dtype float32, or quantize with more samples"
            )
        for values, kept in zip(found, (self.nll, self.kl, self.agree), strict=False):
            kept.append(values.cpu())

    def quality(self) -> Quality:
        perplexity = math.exp(min(torch.cat(self.nll).double().mean().item(), 700.0))  # e^709 no longer fits a float
        if not self.kl:
            return Quality(self.label, perplexity, None, None, None)
        kl = torch.cat(self.kl).double().sort().values
        worst = kl[math.ceil(0.999 * len(kl)) - 1].item()  # nearest rank: one that occurred
        return Quality(self.label, perplexity, kl.mean().item(), worst, torch.cat(self.agree).double().mean().item())


# --- a checkpoint ---------------------------------------------------------------------------------------------------


def logits_of(model: Any) -> Logits:
    """`model`, a causal LM of transformers, as a function of ids alone."""

    def forward(ids: Tensor) -> Tensor:
        return cast(Tensor, model(ids.to(model.device), use_cache=False).logits)

    return forward


def check_fits(model: Any, sequences: Int[Tensor, "samples length"]) -> None:
    """Raise InputError where the model would index out of its tables: too long a sequence, an unknown token."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and sequences.shape[1] > longest:
        raise InputError(f"sequences of {sequences.shape[1]} tokens, but the model has {longest} positions; use --seq-len {longest} or less")
    known = model.get_input_embeddings().num_embeddings
    if int(sequences.max()) >= known:
        raise InputError(f"the text holds token {int(sequences.max())}, but the model knows {known}; use the tokenizer that belongs to it")


def evaluate(
    folder: Path,
    plans: Sequence[BitPlan | int] | Mapping[str, BitPlan],
    sequences: Int[Tensor, "samples length"],
    reference: Any = None,
    *,
    dtype: str | torch.dtype = "float32",
    device_map: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Rows of the checkpoint in `folder` read by each of `plans` (in a mapping: label -> plan), from one load.

    reference: the original model, loaded; its row comes first. dtype: float32 by default, because the rounding of 16-bit
    activations alone costs about as much KL as 8-bit weights do. Raises PlanError, MissingPlanesError, InputError, CheckpointError.
    """
    from matquant import hf  # transformers takes seconds to import; tables and reports do not need it

    named = _named(plans)
    checkpoint = Checkpoint.open(folder)
    for _, plan in named:
        plan.check(checkpoint.modules, checkpoint.layout.widths)
    if not named:
        raise InputError("no widths to measure; give at least one, for instance --bits 4")
    widest = [max(plan.bits(name) for name in checkpoint.modules) for _, plan in named]
    checkpoint.check_widths(*widest)
    model = hf.from_pretrained(folder, named[0][1], keep=max(widest), dtype=dtype, device_map=device_map)
    for fits in (model,) if reference is None else (model, reference):
        check_fits(fits, sequences)
    settings = [(label, _switch(model, plan)) for label, plan in named]
    found = measure(logits_of(model), None if reference is None else logits_of(reference), sequences, settings, progress)
    sizes = Sizes.of(checkpoint)
    rows = [sizes.original(found.pop(0))] if reference is not None else []
    files = [checkpoint.bytes_for(bits) for bits in widest]
    return rows + [sizes.row(quality, plan, size) for quality, (_, plan), size in zip(found, named, files, strict=True)]


def _named(plans: Sequence[BitPlan | int] | Mapping[str, BitPlan]) -> list[tuple[str, BitPlan]]:
    if isinstance(plans, Mapping):
        return list(plans.items())
    uniform = [BitPlan(plan) if isinstance(plan, int) else plan for plan in plans]
    return [(plan.label, plan) for plan in uniform]


def _switch(model: Any, plan: BitPlan) -> Callable[[], None]:
    from matquant import hf

    return lambda: hf.set_bits(model, plan)
