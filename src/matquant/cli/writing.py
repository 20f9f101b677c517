"""What `generate` does: continue a text by the engine where it serves the model, else by transformers; and text as its tokens arrive."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.cli import run
from matquant.errors import InputError, RecipeError, ResourceError, UnservedError

if TYPE_CHECKING:
    from matquant.engine import Engine
    from matquant.plan import BitPlan
    from matquant.search.plans import Wanted


@dataclass(frozen=True)
class Completion:
    """bits: the width, or what tables call the plan. seconds: of generation alone, loading not counted. engine: whether the engine wrote it.

    acceptance: share of the tokens drafted at draft_bits that the verifier accepted. repeated: share of all tokens that were drafted from the text
    itself. tokens_per_pass: of the verifier. All None without drafts.
    """

    bits: int | str
    prompt: str
    text: str
    tokens: int
    seconds: float
    engine: bool = False
    draft_bits: int | None = None
    acceptance: float | None = None
    repeated: float | None = None
    tokens_per_pass: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Where:
    """What reads the text: a checkpoint, a width or plan as `from_pretrained` takes it, and how it computes."""

    source: str
    bits: "Wanted"
    draft_bits: int | None
    device: str
    dtype: str
    threads: int | None
    head_bits: int | None


@dataclass(frozen=True)
class How:
    """How tokens are chosen: at most `new` of them, greedy at temperature 0."""

    new: int
    temperature: float
    seed: int


@dataclass
class Words:
    """Text of tokens as they arrive: a character that several tokens spell is held back until it is whole."""

    tokenizer: Any
    ids: list[int] = field(default_factory=list[int])
    start: int = 0  # where decoding begins, so that it sees the token before
    done: int = 0  # tokens whose text is out

    def add(self, token: int) -> str:
        """The text that `token` completes; empty if it completes none."""
        self.ids.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return text

    def rest(self) -> str:
        """What was held back."""
        return self._new()

    def _new(self) -> str:
        before, whole = (self.tokenizer.decode(self.ids[self.start : end], skip_special_tokens=True) for end in (self.done, len(self.ids)))
        return whole[len(before) :]


def width(bits: int | None, plan: str | None) -> int | str | None:
    """What was asked for. Raises RecipeError for both."""
    if bits is not None and plan is not None:
        raise RecipeError("--bits and --plan both say at which width to read; give one")
    return bits if plan is None else plan


def open_engine(where: Where, keep_all: bool = False) -> "Engine":
    """keep_all: hold every width that is here, not only what `where` names. Raises UnservedError, ResourceError; RecipeError for a bad draft width."""
    from matquant.checkpoint import Checkpoint, choose
    from matquant.engine import Engine

    folder, bits = locate(where)
    if where.threads is not None:
        import torch

        torch.set_num_threads(where.threads)
    checkpoint = Checkpoint.open(folder)
    plan, widest = choose(checkpoint, bits, None)
    check_draft(where.draft_bits, plan, checkpoint.widths)
    keep = max(checkpoint.widths) if keep_all else None if where.draft_bits is None else widest
    return Engine.open(folder, plan, keep, head_bits=where.head_bits, threads=where.threads)


def locate(where: Where) -> "tuple[Path, int | BitPlan | None]":
    """(where the files are, fetched if `where` names a checkpoint on the hub; what to read it at). Raises InputError, PlanError."""
    if not Path(where.source).is_dir():
        from matquant import loading  # which takes seconds, for transformers

        return loading.locate(where.source, where.bits, None)
    if not isinstance(where.bits, str | float):
        return Path(where.source), where.bits
    from matquant.search.plans import resolve  # as slow

    return Path(where.source), resolve(Path(where.source), where.bits)


def check_draft(draft: int | None, plan: "BitPlan", widths: Sequence[int]) -> None:
    """Raises RecipeError for a draft width that is not narrower than what it drafts for."""
    read = max(plan.default, *plan.overrides.values()) if plan.overrides else plan.default
    narrower = [r for r in widths if r < read]
    if draft is not None and draft not in narrower:
        allowed = f"choose from {', '.join(map(str, narrower))}" if narrower else "there is none here; do without drafts"
        raise RecipeError(f"draft-bits is {draft}, and the text is read at {plan.label} bits; a draft must be read at fewer: {allowed}")


def complete(where: Where, prompt: str, how: How, tell: Callable[[str], None]) -> Completion:
    """Continue `prompt`. tell: called with the text as it comes, where the engine writes it."""
    run.check_dtype(where.dtype)
    reason = (
        "" if (where.device, where.dtype) == ("cpu", "float32") else f"the engine computes in float32 on a CPU, not {where.dtype} on {where.device}"
    )
    if where.draft_bits is not None and reason:
        raise RecipeError(f"{reason}, and only the engine drafts; leave out --draft-bits")
    if not reason:
        try:
            engine = open_engine(where)
        except (UnservedError, ResourceError) as error:
            if where.draft_bits is not None:
                raise
            reason = str(error).partition(";")[0]
        else:
            return by_engine(engine, run.load_tokenizer(str(locate(where)[0])), prompt, how, where.draft_bits, tell)
    run.check_device(where.device)
    sys.stderr.write(f"{reason}: transformers writes this\n")
    return by_transformers(where, prompt, how)


def by_engine(engine: "Engine", tokenizer: Any, prompt: str, how: How, draft: int | None, tell: Callable[[str], None]) -> Completion:
    """Ends at the tokens that generation_config.json names."""
    ids, words = list(tokenizer(prompt).input_ids), Words(tokenizer)
    if not ids:
        raise InputError("the prompt has no tokens; give some text")
    tell(prompt)
    started = time.perf_counter()
    for token in engine.generate(ids, how.new, how.temperature, how.seed, draft, engine.stop):
        tell(words.add(token))
    seconds = time.perf_counter() - started
    tell(words.rest())
    done = engine.speculation
    shares = {"acceptance": round(done.acceptance, 4), "repeated": round(done.repeated, 4), "tokens_per_pass": round(done.per_pass, 3)}
    drafted = {} if draft is None else {"draft_bits": draft} | shares
    label = engine.plan.label
    text = tokenizer.decode(words.ids, skip_special_tokens=True)
    return Completion(int(label) if label.isdigit() else label, prompt, text, len(words.ids), round(seconds, 3), True, **drafted)


def by_transformers(where: Where, prompt: str, how: How) -> Completion:
    """Weights made dense once, then ordinary generation."""
    import torch
    import transformers

    if where.threads is not None:
        torch.set_num_threads(where.threads)
    folder, bits = locate(where)
    model, tokenizer = run.load_model(str(folder), bits, where.device, where.dtype), run.load_tokenizer(str(folder))
    label = run.plan_label(bits, model)
    model = model.dequantize()
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if ids.numel() == 0:
        raise InputError("the prompt has no tokens; give some text")
    sampling = {"do_sample": True, "temperature": how.temperature} if how.temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    transformers.set_seed(how.seed)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=how.new, pad_token_id=pad, **sampling)
    seconds = time.perf_counter() - started
    added = out[0, ids.shape[1] :]
    return Completion(label, prompt, tokenizer.decode(added, skip_special_tokens=True), len(added), round(seconds, 3))
