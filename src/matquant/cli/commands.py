"""The commands. Each handler reads its flags, calls one library function and shows what came back.

`--json` prints JSON and nothing else on stdout; progress and warnings go to stderr.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from matquant.cli.bench import bench
from matquant.cli.chat import chat
from matquant.cli.options import BITS, DEVICE, DRAFT, DTYPE, FOLDER, GGUF, HEAD, JSON, PLAN, PLANS, REMOTE, SOURCE, THREADS
from matquant.cli.plans import plan
from matquant.cli.tune import tune
from matquant.errors import CheckpointError


def quantize(
    recipe: Any,
    model: str = typer.Argument(..., metavar="MODEL", help="folder or Hugging Face id of a causal LM", show_default=False),
    output: Path = typer.Option(..., "--output", "-o", metavar="DIR", help="folder to make; must not exist", show_default=False),
    device: str = DEVICE,
    dtype: str = DTYPE,
    gguf_file: str | None = GGUF,
    revision: str | None = typer.Option(None, metavar="NAME", help="branch, tag or commit on the hub", show_default=False),
    trust_remote_code: bool = REMOTE,
    dry_run: bool = typer.Option(False, "--dry-run", help="print layers, bytes, time and memory; write nothing"),
    resume: bool = typer.Option(False, "--resume", help="continue an interrupted run of the same recipe"),
    gradient_checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", help="of end-to-end training: compute activations twice instead of keeping them; saves memory"
    ),
    forward_tokens: int = typer.Option(
        1024, metavar="TOKENS", help="of one forward pass of end-to-end training, at most: with more a GPU is faster, and wants more memory"
    ),
    track: list[str] = typer.Option(
        [], "--track", metavar="NAME", help="follow trainings in OUT.logs with tensorboard or trackio", show_default=False
    ),
    streams_on_disk: bool = typer.Option(False, "--streams-on-disk", help="keep calibration activations in a file beside the output; saves memory"),
    overwrite: bool = typer.Option(False, "--overwrite", help="replace the output folder; start an interrupted run over, unless --resume"),
    eval_text: Path | None = typer.Option(None, metavar="FILE", help="text for the report instead of held-out calibration text", show_default=False),
    as_json: bool = JSON,
) -> None:
    """Quantize a model once into one nested checkpoint."""
    import torch

    from matquant import pipeline
    from matquant.cli import run, show
    from matquant.world import World

    run.prepare(device, dtype)
    saving = {"streams_on_disk": streams_on_disk, "gradient_checkpointing": gradient_checkpointing, "forward_tokens": forward_tokens}
    options = pipeline.RunOptions(device, dtype, gguf_file, revision, trust_remote_code, resume, overwrite, eval_text, **saving, track=tuple(track))
    if dry_run:
        return show.estimate(pipeline.estimate(model, recipe, options), as_json)
    world = World.join(torch.device(device))
    if not world.first:
        pipeline.quantize(model, output, recipe, options)
        return world.leave()
    with show.Progress() as progress:
        report = pipeline.quantize(model, output, recipe, options, progress)
    show.report(report, output, progress.summary(), as_json)
    world.leave()


def evaluate(
    folder: str = SOURCE,
    bits: str | None = typer.Option(None, metavar="BITS,...", help="widths to measure, for instance 8,6,4,3,2", show_default="all that are here"),
    plan: list[str] | None = PLANS,
    text: str | None = typer.Option(None, metavar="TEXT", help="FILE.txt, FILE.jsonl or hf:DATASET[:SPLIT]", show_default="sampled from the model"),
    reference: str | None = typer.Option(None, metavar="MODEL", help="the original model; adds its row, KL and top-1", show_default=False),
    gguf_file: str | None = GGUF,
    seq_len: int = typer.Option(512, min=2, help="tokens of a sequence"),
    max_tokens: int = typer.Option(16384, min=2, help="tokens of text to measure on, at most"),
    seed: int = typer.Option(0, help="of sampled text"),
    device: str = DEVICE,
    dtype: str = DTYPE,
    trust_remote_code: bool = REMOTE,
    as_json: bool = JSON,
) -> None:
    """Measure perplexity, KL and top-1 at several widths."""
    from matquant.cli import run, show

    setup = run.Setup(device, dtype, seq_len, max_tokens, seed, trust_remote_code)
    with show.Progress() as progress:
        protocol, rows = run.evaluate(folder, bits, plan or [], text, reference, gguf_file, setup, progress)
    show.rows(protocol, rows, as_json)


def generate(
    folder: str = SOURCE,
    prompt: str = typer.Argument(..., metavar="PROMPT", help="text to continue", show_default=False),
    bits: int | None = BITS,
    plan: str | None = PLAN,
    draft_bits: int | None = DRAFT,
    max_new_tokens: int = typer.Option(64, min=1, help="tokens to add at most"),
    temperature: float = typer.Option(0.0, min=0.0, help="0 = greedy"),
    seed: int = typer.Option(0, help="of sampling"),
    threads: int | None = THREADS,
    head_bits: int | None = HEAD,
    device: str = DEVICE,
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Continue a prompt at one width or plan."""
    from matquant.cli import show, writing

    where = writing.Where(folder, writing.width(bits, plan), draft_bits, device, dtype, threads, head_bits)
    how = writing.How(max_new_tokens, temperature, seed)
    show.completion(writing.complete(where, prompt, how, show.Stream(as_json)), as_json)


def inspect(folder: Path = FOLDER, as_json: bool = JSON) -> None:
    """Say what a checkpoint holds: widths, planes, layers, bytes, recipe."""
    from matquant import checkpoint
    from matquant.cli import show

    show.description(checkpoint.describe(folder), as_json)


def verify(folder: Path = FOLDER, as_json: bool = JSON) -> None:
    """Check every file, tensor and value of a checkpoint."""
    from matquant import checkpoint
    from matquant.cli import show

    problems = checkpoint.verify(folder)
    show.problems(folder, problems, as_json)
    if problems:
        raise CheckpointError(f"{folder} has {len(problems)} {'problem' if len(problems) == 1 else 'problems'}; fetch or quantize it again")


def doctor(as_json: bool = JSON) -> None:
    """Show versions, threads, memory, disk, GPUs and extras."""
    from matquant import doctor
    from matquant.cli import show

    show.facts(doctor.examine(Path.cwd()), as_json)


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "plan": plan,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "bench": bench,
    "inspect": inspect,
    "verify": verify,
    "doctor": doctor,
    "tune": tune,
}
