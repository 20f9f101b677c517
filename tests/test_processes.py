"""One run in two processes: what it makes, what it shares, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import Tiny

from matquant.checkpoint import Checkpoint, verify
from matquant.moments import Moments, of_all
from matquant.pipeline import RunOptions, quantize
from matquant.recipe import Recipe
from matquant.world import ALONE, World

pytestmark = pytest.mark.usefixtures("no_plots")


def launch(model: Path, out: Path, recipe: Recipe, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `matquant quantize`."""
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone", "-m", "matquant"]
    arguments = ["quantize", str(model), "-o", str(out), "--recipe", str(file), *flags]
    return subprocess.run(
        [*command, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(out.parent)},
    )


def codes(folder: Path) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    return torch.cat([checkpoint.read(name).codes.flatten() for name in sorted(checkpoint.modules)])


BATCH = 16 * 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("llama", {"num_samples": 5, "stream_samples": 3}),  # shares of 3 and 2; of these, 2 and 1 have streams
    "block": (
        "gpt2",
        {"method": "block", "parent_bits": 8, "bits": (8, 4, 2), "targets": {8: 0.1, 4: 0.5, 2: 1.0}, "refine_steps": 4, "num_samples": 16},
    ),  # with half as many, the single sequence held out decides otherwise in one run than in the other
    "omniquant": ("llama", {"method": "omniquant", "epochs": 2, "num_samples": 6, "refine_tokens": 32}),
    "qat": ("llama", {"method": "qat", "train_tokens": BATCH * 4, "batch_tokens": BATCH, "finetune_reads": BATCH * 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_what_one_makes(case: str, tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    asked = replace(recipe, **changes)
    alone = quantize(str(tiny(kind)), tmp_path / "alone", asked, RunOptions())
    run = launch(tiny(kind), tmp_path / "out", asked, "--json", "--streams-on-disk")
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)  # of one process, once
    assert verify(tmp_path / "out") == [] and not (tmp_path / "out.partial").exists()
    if case in ("gptq", "qat"):  # the other two draw and hold out sequences within each share
        assert (codes(tmp_path / "out") != codes(tmp_path / "alone")).float().mean() < 0.02
    for ours, theirs in zip(alone.rows, report["rows"], strict=True):
        assert theirs["perplexity"] == pytest.approx(ours.perplexity, rel=0.01)
    for ours, theirs in zip(alone.outputs, report["outputs"], strict=True):
        assert theirs == pytest.approx({str(r): error for r, error in ours.items()}, rel={"gptq": 0.02, "block": 0.05}.get(case, 0.2))
    if case == "qat":
        losses = [[json.loads(line)["loss"] for line in (tmp_path / made / "training.jsonl").read_text().splitlines()] for made in ("alone", "out")]
        assert len(losses[0]) == 4
        for one, two in zip(*losses, strict=True):
            assert two == pytest.approx(one, rel=1e-3)
        for one, two in zip(alone.tuned.values(), report["tuned"].values(), strict=True):
            assert two == pytest.approx(one, rel=0.02)


def test_refusals_come_from_all_and_leave_nothing(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    run = launch(tiny("llama"), tmp_path / "out", replace(recipe, num_samples=1))
    assert run.returncode != 0 and "1 sequences do not go round among 2 processes; start fewer, or give more --num-samples" in run.stderr
    assert 'Traceback (most recent call last):\n  File "/' not in run.stderr.partition("torch.distributed")[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


class Two(World):
    """Two processes of which the other's values are known."""

    other: Any

    def gather(self, value: Any) -> list[Any]:
        return [value, {key: (len(m.total), m.symmetric, m.tokens) for key, m in self.other.items()}]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(self.queue.pop(0))

    queue: list[torch.Tensor]


def test_moments_of_layers_that_one_process_never_saw() -> None:
    """Experts b and c: the first saw only b, the second only c, both saw a."""
    g = torch.Generator().manual_seed(0)

    def seen(*names: str) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for name in names:
            x = torch.randn(7, 4, generator=g)
            found[name] = Moments(torch.zeros(4, 4), symmetric=True)
            found[name].add(x, x)
        return found

    first, second = seen("a", "b"), seen("a", "c")
    want = {"a": first["a"].total + second["a"].total, "b": first["b"].total.clone(), "c": second["c"].total.clone()}
    two = Two(0, 2)
    object.__setattr__(two, "other", second)
    object.__setattr__(two, "queue", [second["a"].total, torch.zeros(4, 4), second["c"].total])
    found = of_all(first, two, torch.device("cpu"))
    assert {name: own.tokens for name, own in found.items()} == {"a": 14, "b": 7, "c": 7}
    for name, total in want.items():
        assert torch.equal(found[name].total, total)
    assert of_all(second, ALONE, torch.device("cpu")) is second


def test_alone() -> None:
    assert World.join(torch.device("cpu")) == ALONE and ALONE.first and ALONE.count(5) == 5
    assert World(1, 2).count(5) == 2 and World(0, 2).count(5) == 3
    assert World(1, 2, 1).place(torch.device("cuda")) == torch.device("cuda", 1)
    assert World(1, 2, 1).place(torch.device("cuda:0")) == torch.device("cuda", 0)
    assert ALONE.place(torch.device("cuda")) == torch.device("cuda")
    assert ALONE.same(3) == 3 and ALONE.gather("x") == ["x"] and ALONE.total(2) == 2.0 and ALONE.once(lambda: 4) == 4


def test_left_without_a_shutdown_of_the_interpreter() -> None:
    """In which threads of gloo abort the process now and then."""
    script = (
        "import atexit, os, torch; from matquant.world import World; atexit.register(os.abort); print('report');"
        "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1); World(0, 2).leave()"
    )
    run = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "report\n"), run.stderr[-3000:]
