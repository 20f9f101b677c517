"""The training loop: resumed, split among processes, sliced, stopped; always the same losses as the plain run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import SCHEDULE, codes, fit_of, stream

from matquant.errors import InputError, RecipeError
from matquant.losses import next_token
from matquant.train import Schedule, Trained
from matquant.trainable import read_at


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[list[float]]:
    return [[*row["loss"].values(), row["norm"]] for row in rows(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbs, without its state."""
    folder = tmp_path_factory.mktemp("plain")
    assert fit_of(folder, replace(SCHEDULE, save_every=100)).run() == Trained(6, "")
    return folder


def test_what_is_written_down(plain: Path) -> None:
    found = rows(plain)
    assert [row["step"] for row in found] == list(range(6)) and list(found[0]["loss"]) == ["8", "4", "2"]
    assert [row["rate"] for row in found] == pytest.approx([0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464], abs=1e-3)
    assert found[-1]["loss"]["8"] < found[0]["loss"]["8"] and not (plain / "state").exists()


def test_a_step_by_hand(plain: Path, tmp_path: Path) -> None:
    """The first losses, and the sum of the gradients of all widths, from one batch and one backward."""
    fit = fit_of(tmp_path)
    ids = torch.stack([s for _, s in zip(range(4), stream(), strict=False)])
    layers, model = fit.joint.layers, fit.model
    total, logits = torch.zeros(()), {}
    for bits, lam in ((8, 0.1), (4, 0.1), (2, 1.0)):
        read_at(layers, bits)
        logits[bits] = model(ids, use_cache=False).logits
        total = total + lam * next_token(logits[bits], ids)
    p, q = logits[8].detach().softmax(-1), logits[2].softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    grads = torch.autograd.grad(total + kl, [x for x in model.parameters() if x.requires_grad], allow_unused=True)
    first = rows(plain)[0]
    norm = torch.cat([g.flatten() for g in grads if g is not None]).norm().item()
    assert first["norm"] == pytest.approx(norm, rel=1e-3)
    assert first["loss"]["2"] == pytest.approx((next_token(logits[2], ids) + kl).item(), rel=1e-4)


def test_slices_of_a_batch_are_the_batch(plain: Path, tmp_path: Path) -> None:
    fit_of(tmp_path, replace(SCHEDULE, slice_size=3)).run()
    assert torch.allclose(torch.tensor(losses(tmp_path)), torch.tensor(losses(plain)), rtol=1e-3)


def test_weights_that_lie_transposed(plain: Path, tmp_path: Path) -> None:
    """As GPT-2's do. torch's fused AdamW takes every array to lie as its parameter does, and does not look."""
    fit = fit_of(tmp_path)
    for weight in [layer.weight for layer in fit.joint.layers.values()]:  # pyright: ignore
        weight.data = weight.data.t().contiguous().t()
        assert not weight.is_contiguous()
    fit.run()
    assert torch.allclose(torch.tensor(losses(tmp_path)), torch.tensor(losses(plain)), rtol=1e-4)


def test_young_states_are_not_replaced(tmp_path: Path) -> None:
    fit_of(tmp_path, replace(SCHEDULE, save_every=1, save_seconds=3600.0)).run()
    assert not (tmp_path / "state").exists()


def test_resumed_to_the_same_weights(plain: Path, tmp_path: Path) -> None:
    whole = fit_of(tmp_path / "whole")
    whole.run()

    class Killed(BaseException):
        pass

    def kill(done: int, of: int, words: str) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        fit_of(tmp_path / "cut", follow=kill).run()
    assert len(rows(tmp_path / "cut")) == 5
    resumed = fit_of(tmp_path / "cut")
    assert resumed.run() == Trained(6, "")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") == rows(plain)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_killed_while_a_state_takes_the_place_of_another(tmp_path: Path, plain: Path) -> None:
    fit_of(tmp_path).run()
    (tmp_path / "state").rename(tmp_path / "state.old")
    (tmp_path / "state.tmp").mkdir()
    fit_of(tmp_path).run()
    assert losses(tmp_path) == losses(plain)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(kind: str, plain: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    script = [str(Path(__file__).parent / "training.py"), str(tmp_path), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, *script], check=False, capture_output=True, text=True, env=environment)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert torch.allclose(torch.tensor(losses(tmp_path)), torch.tensor(losses(plain)), rtol=1e-3)
    one = fit_of(tmp_path / "one")
    one.run()
    for rank in (0, 1):
        assert (torch.load(tmp_path / f"codes-{rank}.pt") != codes(one)).float().mean() < 2e-3
    want = rows(tmp_path)
    again = subprocess.run([*command, *script], check=False, capture_output=True, text=True, env=environment)  # from the state after step 4
    assert again.returncode == 0, again.stderr[-3000:]
    assert rows(tmp_path) == want and (tmp_path / "state").exists()


def test_gradients_that_are_not_finite_end_the_training(tmp_path: Path) -> None:
    """The weights are those of the step before."""
    bad = fit_of(tmp_path, sequences=stream)
    forward, calls = bad.joint.parts, []

    def parts(*args: Any) -> Any:
        calls.append(args)
        for part in forward(*args):
            yield replace(part, weighted=part.weighted * torch.nan) if args[2] == 2 else part

    bad.joint.parts = parts  # pyright: ignore
    assert bad.run() == Trained(2, "gradients of step 2 were not finite")
    good = fit_of(tmp_path / "good", follow=lambda done, of, words: None)
    good.schedule = replace(SCHEDULE, steps=6)
    good.sequences = lambda: (s for _, s in zip(range(8), stream(), strict=False))  # two steps
    with pytest.raises(InputError, match="the text ends at step 2 of 6; give more text, or fewer tokens to train on"):
        good.run()
    for ours, theirs in zip(bad.model.parameters(), good.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_balanced_gradients(tmp_path: Path) -> None:
    """The norms of single widths are measured, weigh the loss, and are part of the state."""
    fit = fit_of(tmp_path, balance=True)
    fit.run()
    weights = rows(tmp_path)[0]["weights"]
    assert sum(weights.values()) == pytest.approx(1.2) and weights["8"] != 0.1 and set(fit.joint.norms) == {8, 4, 2}
    again = fit_of(tmp_path, balance=True)
    again.run()
    assert again.joint.norms == fit.joint.norms and rows(tmp_path)[-1]["weights"] == weights


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    fit = fit_of(tmp_path, replace(SCHEDULE, batch=3))
    fit.accelerator = type("Two", (), {"num_processes": 2})()  # pyright: ignore
    with pytest.raises(RecipeError, match="a batch of 3 sequences does not divide among 2 processes; use a multiple of 2"):
        fit.run()


def test_rates() -> None:
    steady = Schedule(10, 1, 1, 0, "constant", 1.0, 100)
    assert [steady.rate(step) for step in (0, 9)] == [1.0, 1.0]
    falling = replace(steady, decay="cosine", warmup=2)
    assert [falling.rate(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
