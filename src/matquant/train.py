"""Training of a whole model, in one process or many (accelerate): sequences in, optimizer steps, and a state from which a killed run goes on.

Step n takes sequences n B to (n + 1) B of one stream that all processes read, each its own share of them; so the losses of a run depend
neither on how many processes there are nor on when it was interrupted. Gradients of a step are summed over its parts: the widths of the
joint loss one after another, and where a share is larger than a forward pass may be, its slices. Only the last part of a step
exchanges gradients between processes.

Nothing is saved but the last state. A step whose gradients are not finite is not made, and the training ends there: the parameters are then
those of the last good step.
"""

import importlib.util
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from matquant.corpus import Stream
from matquant.errors import InputError, RecipeError, choices
from matquant.joint import Joint
from matquant.recipe import Decay, decayed
from matquant.world import ALONE, World

BETAS = (0.9, 0.95)
STATE = "state"
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
BALANCED_EVERY = 50  # steps between two looks at the gradients of single widths
KEPT = 0.5  # of the former norms at each such look
FORWARD_TOKENS = 1024  # keep the cores of a CPU busy, and need little memory
TRACKERS = ("tensorboard", "trackio")


@dataclass(frozen=True)
class Schedule:
    """batch: sequences of a step, of all processes together. slice_size: sequences of one forward pass, at most. warmup: steps of linear rise.

    clip: norm above which gradients are scaled down to it. save_every: steps between two states; save_seconds: and seconds, at least.
    """

    steps: int
    batch: int
    slice_size: int
    warmup: int
    decay: Decay
    clip: float
    save_every: int
    save_seconds: float = 0.0

    def rate(self, step: int) -> float:
        """Share of the learning rate at `step`, counted from 0."""
        rise = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return rise if step < self.warmup else decayed(self.decay, (step - self.warmup) / max(self.steps - self.warmup, 1))


@dataclass(frozen=True)
class Trained:
    """steps: made. stopped: why not all of them were, or ""."""

    steps: int
    stopped: str


@dataclass(frozen=True)
class Means:
    """How to train, which the result does not depend on but for rounding.

    dtype: of the model's weights that are not trained. recompute: make a block's activations anew in its backward pass instead of keeping
    them. forward_tokens: of one forward pass, at most. trackers: of TRACKERS, that follow the losses too; tracks: where they write. logs: where
    the losses go, a JSON line a step.
    """

    device: torch.device
    dtype: torch.dtype
    logs: Path
    tracks: Path
    recompute: bool = False
    forward_tokens: int = FORWARD_TOKENS
    trackers: tuple[str, ...] = ()
    world: World = ALONE

    def slice_size(self, length: int) -> int:
        """Sequences of `length` tokens of one forward pass."""
        return max(self.forward_tokens // length, 1)

    def accelerator(self) -> Accelerator:
        """This process among those of the run."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # a width's read takes no part in the pass of another
        named: Any = list(self.trackers) or None
        return Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[unused], log_with=named, project_dir=self.tracks)


def check_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError for one that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"cannot track with {name!r}; {choices(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"{name} is not installed; pip install {name}, or leave --track out: the losses are logged as JSON anyway")


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Let each block keep its inputs alone for the backward pass."""
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def whole(module: nn.Module) -> nn.Module:
    """The module itself with its parameters whole, wherever they were; called in every process, once it is trained."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(part, name, nn.Parameter(parameter.full_tensor().detach(), requires_grad=False))
    return module


@dataclass
class Fit:
    """One training. groups: what AdamW takes. sequences: a new stream from its start. folder: for the state. log: the file of the losses.

    dtype: what products are made in. name: what trackers call it. follow: called with (steps done, of how many, words on the loss).
    """

    model: nn.Module
    groups: Sequence[Mapping[str, Any]]
    joint: Joint
    sequences: Stream
    schedule: Schedule
    folder: Path
    log: Path
    accelerator: Accelerator
    dtype: torch.dtype = torch.float32
    balance: bool = False
    name: str = "training"
    follow: Callable[[int, int, str], None] = lambda done, of, words: None
    prepared: nn.Module = field(init=False)  # the model as accelerate wraps it
    optimizer: Any = field(init=False)
    saved_at: float = field(init=False, default_factory=time.monotonic)

    def run(self) -> Trained:
        """Train to the end, or go on from the state in `folder`. Raises InputError for a stream that ends, RecipeError for a batch that does
        not divide."""
        world = self.accelerator.num_processes
        if self.schedule.batch % world:
            raise RecipeError(f"a batch of {self.schedule.batch} sequences does not divide among {world} processes; use a multiple of {world}")
        for place in (self.folder, self.log.parent):
            place.mkdir(parents=True, exist_ok=True)
        self.accelerator.init_trackers(self.name)
        one_pass = self.accelerator.device.type == "cpu"  # a third of the time there; gradients that autograd made lie as their parameters do
        optimizer = torch.optim.AdamW([dict(group) for group in self.groups], betas=BETAS, fused=one_pass or None)
        rates = [group["lr"] for group in optimizer.param_groups]
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        done = self._steps(rates)
        for tracker in self.accelerator.trackers:  # end_training would end all processes' group too, which the run still needs
            tracker.finish()
        return done

    def _steps(self, rates: Sequence[float]) -> Trained:
        """All that are left."""
        first = self._resume()
        for step, ids in enumerate(self._batches(first), first):
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.schedule.rate(step)
            if self.balance and step % BALANCED_EVERY == 0:
                self._look(ids, step)
            losses = self._backward(ids, step)
            norm = float(self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.schedule.clip))
            if not math.isfinite(norm):
                return Trained(step, f"gradients of step {step} were not finite")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._log(step, losses, norm, self.schedule.rate(step))
            if (step + 1) % self.schedule.save_every == 0 and self._due():
                self._save(step + 1)
                self.saved_at = time.monotonic()
        return Trained(self.schedule.steps, "")

    # --- a step -----------------------------------------------------------------------------------------------------

    def _batches(self, first: int) -> Iterator[Int[Tensor, "share length"]]:
        """This process's share of every step from `first` on."""
        batch, world = self.schedule.batch, self.accelerator.num_processes
        share = batch // world
        stream = islice(self.sequences(), first * batch, None)
        for step in range(first, self.schedule.steps):
            whole = list(islice(stream, batch))
            if len(whole) < batch:
                raise InputError(f"the text ends at step {step} of {self.schedule.steps}; give more text, or fewer tokens to train on")
            start = self.accelerator.process_index * share
            yield torch.stack(whole[start : start + share]).to(self.accelerator.device)

    def _forward(self, ids: Int[Tensor, "batch length"]) -> Tensor:
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.prepared(input_ids=ids, use_cache=False).logits

    def _backward(self, ids: Tensor, step: int) -> dict[int, Tensor]:
        """Add the gradients of a step. Returns the mean loss of every part; nothing waits for the device here."""
        pieces = ids.split(self.schedule.slice_size)
        losses: dict[int, Tensor] = {}
        for number, piece in enumerate(pieces):
            parts, weight = self.joint.parts(self._forward, piece, step), len(piece) / len(ids)
            for index in range(self.joint.passes):
                last = number == len(pieces) - 1 and index == self.joint.passes - 1
                with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                    part = next(parts)
                    self.accelerator.backward(part.weighted * weight)
                losses[part.bits] = losses.get(part.bits, 0.0) + part.value * weight
        return losses

    def _look(self, ids: Tensor, step: int) -> None:
        """Measure the norm of every width's own gradient, and let the joint loss weigh by it."""
        piece = ids[: self.schedule.slice_size]
        found: dict[int, float] = {}
        parts = self.joint.parts(self._forward, piece, step)
        for _ in range(self.joint.passes):
            part = next(parts)
            self.accelerator.backward(part.weighted)
            norm = float(self.accelerator.clip_grad_norm_(self.prepared.parameters(), math.inf))
            loss = part.loss
            found[part.bits] = norm / (part.weighted.item() / loss) if loss else norm
            self.optimizer.zero_grad()
        before = self.joint.norms
        if all(math.isfinite(norm) and norm > 0 for norm in found.values()):
            self.joint.norms = {bits: KEPT * before.get(bits, norm) + (1 - KEPT) * norm for bits, norm in found.items()}

    # --- log and state ----------------------------------------------------------------------------------------------

    def _log(self, step: int, losses: Mapping[int, Tensor], norm: float, rate: float) -> None:
        means = self.accelerator.reduce(torch.stack(list(losses.values())), "mean")
        values = dict(zip(map(str, losses), means.tolist(), strict=True))
        self.accelerator.log({f"loss/{bits}": value for bits, value in values.items()} | {"norm": norm, "rate": rate}, step)
        if self.accelerator.is_main_process:
            row = {"step": step, "loss": values, "norm": norm, "rate": rate, "weights": {str(r): w for r, w in self.joint.weights.items()}}
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.follow(step + 1, self.schedule.steps, "  ".join(f"{bits}: {value:.4g}" for bits, value in values.items()))

    def _due(self) -> bool:
        """Whether the last state, or the beginning, is old enough in every process."""
        old = torch.tensor(float(time.monotonic() - self.saved_at >= self.schedule.save_seconds), device=self.accelerator.device)
        return float(self.accelerator.reduce(old, "mean")) == 1.0

    def _save(self, done: int) -> None:
        """Only what is trained, and what AdamW knows of it; each process writes what it holds."""
        partial, state, old = (self.folder / name for name in (STATE + ".tmp", STATE, STATE + ".old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        self.accelerator.wait_for_everyone()
        with _alone():
            checkpoint.save(self._state(), checkpoint_id=partial)
        if self.accelerator.is_main_process:
            norms = {str(bits): norm for bits, norm in self.joint.norms.items()}
            (partial / "progress.json").write_text(json.dumps({"done": done, "norms": norms}))
            if state.exists():
                state.rename(old)
            partial.rename(state)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        parameters, moments = get_state_dict(self.prepared, self.optimizer, options=OPTIONS)
        return {"parameters": parameters, "moments": moments}

    def _resume(self) -> int:
        """Load the last state. Returns how many steps it had made; 0 if there is none."""
        state = next((self.folder / name for name in (STATE, STATE + ".old") if (self.folder / name / "progress.json").exists()), None)
        if state is None:
            if self.accelerator.is_main_process:
                self.log.unlink(missing_ok=True)
            return 0
        progress = json.loads((state / "progress.json").read_bytes())
        held = self._state()
        with _alone():
            checkpoint.load(held, checkpoint_id=state)
        parameters, moments = held["parameters"], held["moments"]
        set_state_dict(self.prepared, self.optimizer, model_state_dict=parameters, optim_state_dict=moments, options=OPTIONS)
        self.joint.norms = {int(bits): norm for bits, norm in progress["norms"].items()}
        if self.accelerator.is_main_process and self.log.exists():
            rows = [line for line in self.log.read_text().splitlines() if line and json.loads(line)["step"] < progress["done"]]
            self.log.write_text("".join(line + "\n" for line in rows))
        self.accelerator.wait_for_everyone()
        return progress["done"]


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns, whenever a single process saves, that it takes itself for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
