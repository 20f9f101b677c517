"""`matquant plan`: sensitivities once, then a plan for any budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from matquant.cli.options import DEVICE, DTYPE, FOLDER, GGUF, JSON
from matquant.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from matquant.search.budget import Budget, Model

CONTEXT = 4096  # tokens that memory is counted for
SPARE = 0.1  # of the free memory, left to activations and to others by --fit
SIZE = "SIZE"
PARETO = typer.Option(None, metavar="FILE", help="draw size against KL and the plan's widths, FILE.svg or FILE.png", show_default=False)


@dataclass(frozen=True)
class Ask:
    """What the plan may take, as flags say it; exactly one of these is given."""

    bits: float | None
    whole: bool
    file: str | None
    memory: str | None
    fit: bool
    context: int
    speed: float | None
    latency: Path | None

    @property
    def name(self) -> str | None:
        """Of the plan, unless it is given one. None: there is no budget. Raises RecipeError for more than one."""
        given = {
            "" if self.bits is None else f"{self.bits:g}" + "-model" * self.whole: self.bits is not None,
            f"file-{self.file}": self.file is not None,
            f"memory-{self.memory}": self.memory is not None,
            "fit": self.fit,
            f"speed-{self.speed}": self.speed is not None,
        }
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise RecipeError("there is more than one budget; give one of --budget, --max-bytes, --max-memory, --fit and --min-speed")
        return names[0].replace(" ", "") if names else None

    def of(self, model: "Model", device: str) -> "Budget":
        """Raises PlanError."""
        from matquant.search import budget

        if self.bits is not None:
            return budget.mean_bits(model, self.bits, self.whole)
        if self.file is not None:
            return budget.file_bytes(model, budget.parse_size(self.file))
        if self.speed is not None:
            if self.latency is None:
                raise PlanError("--min-speed needs a latency table; measure one with matquant bench and give it with --latency")
            return budget.speed(model, budget.Latency.load(self.latency), self.speed)
        size = free_bytes(device) if self.memory is None else budget.parse_size(self.memory)
        return budget.memory(model, size, self.context)


def free_bytes(device: str) -> int:
    """Memory of the device that may be filled. Raises PlanError where the system does not say."""
    import torch

    from matquant import doctor

    free = doctor.free_memory() if torch.device(device).type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if free is None:
        raise PlanError("this system does not say how much memory is free; give --max-memory instead of --fit")
    return int(free * (1 - SPARE))


def plan(
    folder: Path = FOLDER,
    budget: float | None = typer.Option(
        None, metavar="BITS", help="bits a quantized weight in the mean, metadata counted, for instance 3.5", show_default=False
    ),
    whole_model: bool = typer.Option(False, "--whole-model", help="the bits of --budget are the whole model's"),
    max_bytes: str | None = typer.Option(None, metavar=SIZE, help="bytes of a file of the plan, for instance 120MB", show_default=False),
    max_memory: str | None = typer.Option(
        None, metavar=SIZE, help="memory with the keys and values of --ctx tokens, for instance 6GiB", show_default=False
    ),
    fit: bool = typer.Option(False, "--fit", help="the memory that is free on --device now"),
    ctx: int = typer.Option(CONTEXT, min=0, help="tokens of context that memory is counted for"),
    min_speed: float | None = typer.Option(None, metavar="TOKENS/S", help="predicted tokens a second, from --latency", show_default=False),
    latency: Path | None = typer.Option(None, metavar="FILE", help="latency table that matquant bench wrote", show_default=False),
    solver: str = typer.Option(
        "exact", help="exact, quadratic (with pairs), evolve (on true KL), round-off (no data), pyramid, reverse-pyramid, increasing or decreasing"
    ),
    loss: str = typer.Option("kl", help="what is minimised: kl (measured), fisher, output-error (of the report) or round-off (no data)"),
    name: str | None = typer.Option(None, metavar="NAME", help="of the plan in the checkpoint", show_default="the budget's"),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="FILE", help="write the plan there, not into the checkpoint", show_default=False
    ),
    pareto: Path | None = PARETO,
    measure: bool = typer.Option(True, help="measure the plan's KL too; off = predict it only, and load no model if nothing has to be measured"),
    units: str = typer.Option(
        "module", help="what gets one width: module (attention or MLP of a block), fused (what engines fuse: q/k/v, gate/up, experts) or layer"
    ),
    text: str | None = typer.Option(
        None, metavar="TEXT", help="to measure on: FILE.txt, FILE.jsonl or hf:DATASET[:SPLIT]", show_default="sampled from the checkpoint"
    ),
    num_samples: int = typer.Option(4, min=1, help="sequences of it"),
    seq_len: int = typer.Option(128, min=2, help="tokens of a sequence"),
    seed: int = typer.Option(0, help="of their choice, and of the search"),
    reference: str | None = typer.Option(
        None, metavar="MODEL", help="the original model to compare with", show_default="the checkpoint's widest read"
    ),
    gguf_file: str | None = GGUF,
    sensitivity: Path | None = typer.Option(None, metavar="FILE", help="where measurements are kept", show_default="in the checkpoint"),
    again: bool = typer.Option(False, "--again", help="forget what was measured"),
    generations: int = typer.Option(20, min=1, help="of solver evolve"),
    device: str = DEVICE,
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Find the best width of every layer within a budget."""
    from matquant.checkpoint import Checkpoint
    from matquant.cli import planned, run, show
    from matquant.search.planning import Search
    from matquant.search.session import Session

    ask = Ask(budget, whole_model, max_bytes, max_memory, fit, ctx, min_speed, latency)
    if ask.name is None and pareto is None:
        raise RecipeError("there is no budget; give --budget, --max-bytes, --max-memory, --fit or --min-speed, or --pareto FILE for the whole front")
    run.prepare(device, dtype)
    source = planned.source(folder, text, num_samples, seq_len, seed, reference, gguf_file, device, dtype)
    with show.Progress() as progress:
        session = Session(Checkpoint.open(folder), source, sensitivity, units, again, device, dtype, progress)
        way = planned.Way(solver, loss, Search(generations, seed=seed), measure, name or ask.name or "", output)
        found, points = planned.carry_out(session, ask, way, pareto, progress)
    planned.show_found(found, points, as_json, list(session.model.shapes))
