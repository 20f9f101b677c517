"""What `eval` does with a checkpoint, and what all commands do: load it, tokenize, measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.errors import InputError, RecipeError, ResourceError, choices

if TYPE_CHECKING:
    from matquant.evaluate import Protocol, Row
    from matquant.plan import BitPlan
    from matquant.search.plans import Wanted

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Setup:
    """How `evaluate` computes: where, in which type, on how much text."""

    device: str
    dtype: str
    seq_len: int
    max_tokens: int
    seed: int
    trust_remote_code: bool


def check_dtype(dtype: str) -> None:
    """Raises RecipeError."""
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}; {choices(dtype, DTYPES)}")


def check_device(device: str) -> None:
    """Raises RecipeError for no device at all, ResourceError for one that this machine lacks."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        kind = device.partition(":")[0]
        if kind in ("cuda", "mps", "xpu"):
            raise ResourceError(f"device {device} is not usable here ({str(error).splitlines()[0]}); use --device cpu") from None
        raise RecipeError(f"device is {device!r}; give cpu, cuda or cuda:N") from None


def prepare(device: str, dtype: str) -> None:
    """Check where and in which type to compute, and keep transformers' own bars and advice off stderr: what matters, we say."""
    from transformers.utils import logging

    check_dtype(dtype)
    check_device(device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(folder: str, bits: "Wanted", device: str, dtype: str) -> Any:
    """A checkpoint whose layers read their planes. Raises as matquant.from_pretrained."""
    import matquant

    prepare(device, dtype)
    return matquant.from_pretrained(folder, bits, dtype=dtype, device_map=device).eval()


def load_tokenizer(folder: str) -> Any:
    """Raises InputError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder} has no usable tokenizer ({reason}); copy the original model's tokenizer files into it") from None


def plan_label(bits: "int | BitPlan | None", model: Any) -> int | str:
    """The width, or the plan in words; what the checkpoint chose where nothing was asked for."""
    if bits is None:
        from matquant import hf

        return next(iter(hf.layers_of(model).values())).bits
    return bits if isinstance(bits, int) else bits.label


# --- eval -----------------------------------------------------------------------------------------------------------


def evaluate(
    source: str,
    bits: str | None,
    plans: Sequence[str],
    text: str | None,
    reference: str | None,
    gguf_file: str | None,
    setup: Setup,
    progress: Callable[[str, int, int], None],
) -> "tuple[Protocol, list[Row]]":
    """Rows of the checkpoint at each width and plan, led by the original where `reference` names it.

    text: as for calibration; None samples it from the original, or from the checkpoint at its widest. progress: called with
    (stage, steps done, of how many).
    """
    from matquant import evaluate as measure
    from matquant import hf, loading
    from matquant.checkpoint import Checkpoint
    from matquant.cli.flags import parse_bits
    from matquant.plan import BitPlan

    prepare(setup.device, setup.dtype)
    wanted = parse_bits(bits) if bits else ()
    folder = hf.locate(source, max(wanted, default=2 if plans else None), None)
    named = {str(r): BitPlan(r) for r in wanted}
    for name in plans:
        folder, plan = loading.locate(source, name, None)
        assert isinstance(plan, BitPlan)  # of a text it always is one
        named[Path(name).stem if name.endswith(".json") else name] = plan
    named = named or {str(r): BitPlan(r) for r in Checkpoint.open(folder).widths}
    tokenizer = load_tokenizer(str(folder))
    original = None if reference is None else load_original(reference, gguf_file, setup)
    sequences, protocol = sequences_for(text, tokenizer, original, str(folder), setup, progress)
    steps = lambda done, of: progress("measuring", done, of)  # noqa: E731
    rows = measure.evaluate(folder, named, sequences, original, dtype=setup.dtype, device_map=setup.device, progress=steps)
    return protocol, rows


def load_original(model: str, gguf_file: str | None, setup: Setup) -> Any:
    """The original model, dense. Raises as matquant.models."""
    from matquant import models

    folder = models.resolve(model, None)
    return models.load_dense(model, folder, gguf_file, setup.trust_remote_code, setup.dtype).to(setup.device)


def sequences_for(
    text: str | None, tokenizer: Any, original: Any, folder: str, setup: Setup, progress: Callable[[str, int, int], None]
) -> "tuple[Any, Protocol]":
    """(sequences Int[Tensor, "samples length"], protocol): cut from `text`, or sampled from the original or the checkpoint."""
    from matquant import calibration
    from matquant.evaluate import Protocol, windows

    count = max(1, setup.max_tokens // setup.seq_len)
    bos = calibration.leading_token(tokenizer)
    if text is not None:
        ids = calibration.token_stream(tokenizer, calibration.read_texts(text))
        sequences = windows(ids, setup.seq_len, bos, count)
        return sequences, Protocol.of(sequences, bos, text)
    model = original if original is not None else load_model(folder, None, setup.device, setup.dtype)
    start = calibration.start_token(tokenizer)
    sampling = lambda done, of: progress("sampling text", done, of)  # noqa: E731
    sequences = calibration.sample_windows(model, start, count, setup.seq_len, setup.seed, sampling)
    who = "the original" if original is not None else "the checkpoint at its widest"
    return sequences, Protocol.of(sequences, start, f"sampled from {who}, seed {setup.seed}")
