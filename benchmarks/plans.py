"""Plans of one checkpoint: every solver at every budget, scored on texts that no solver has seen.

    python benchmarks/plans.py CHECKPOINT --original MODEL --name WORDS --work DIR --out results.json --train FILE --text FILE [--text FILE ...]
        [--budgets 2.5 3 3.5 4 5 6] [--num-samples 4] [--seq-len 128] [--search-samples 16] [--search-seconds 120] [--score-samples 8]
        [--score-len 256] [--seed 0] [--only measure modules pairs solve evolve long score closer] [--long 3.5] [--long-seconds 1800]
        [--closer 3.5 4] [--closer-samples 32]

measure   sensitivities of all units at all widths, on --num-samples sequences of --train, compared with the checkpoint's own widest read
modules   the same with one width for the attention and one for the MLP of a block, as `matquant plan` has it by default
pairs     of units within a block and of neighbouring blocks
solve     exact, exact by modules, quadratic, fisher, output-error, round-off, the paper's four schedules (their counts of blocks chosen with hindsight)
evolve    from the exact solution or a uniform width, on --search-samples sequences of --train, --search-seconds a budget
long      the same with one width for the attention and one for the MLP of a block, --long-seconds at one budget
score     KL to the original of every plan and every uniform width, on --score-samples sequences of each --text
closer    the same of both exact plans and the long evolution's on --closer-samples sequences, against the widest uniform width within the budget

Sensitivities and results are kept and not made again. Seconds are of a machine as busy as it was; `load` says how busy, and `cpu_seconds` are the
processor's own.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import command
from quality import evaluation, machine

from matquant import calibration, models
from matquant.checkpoint import Checkpoint
from matquant.cli.planned import source
from matquant.errors import PlanError
from matquant.plan import BitPlan
from matquant.search import budget, planning
from matquant.search.planning import SCHEDULES, Search, Task
from matquant.search.probe import Probe
from matquant.search.session import Session
from matquant.search.units import Unit, as_plan

STAGES = ("measure", "modules", "pairs", "solve", "evolve", "long", "score", "closer")
CLOSER = ("module", "exact", "evolve-long")
SOLVERS: dict[str, tuple[str, str]] = {  # name -> (solver, loss)
    "exact": ("exact", "kl"),
    "quadratic": ("quadratic", "kl"),
    "fisher": ("exact", "fisher"),
    "output-error": ("exact", "output-error"),
    "round-off": ("round-off", "round-off"),
    **{schedule: (schedule, "kl") for schedule in SCHEDULES},
}


def now() -> tuple[float, float]:
    """(seconds on the wall, seconds of processor time of all threads)."""
    return time.perf_counter(), time.process_time()


class Bench:
    """One results file. Every step writes it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.checkpoint = options, Checkpoint.open(options.checkpoint)
        options.work.mkdir(parents=True, exist_ok=True)
        found = source(options.checkpoint, options.train, options.num_samples, options.seq_len, options.seed, None, None, "cpu", "float32")
        self.session = Session(self.checkpoint, found, options.work / "sensitivity.json", "fused", progress=self.tell)
        self.by_module = Session(self.checkpoint, found, options.work / "modules.json", "module", progress=self.tell)
        self.told = 0.0

    @property
    def results(self) -> dict[str, Any]:
        out = self.options.out
        return json.loads(out.read_text()) if out.exists() else {"plans": {}, "steps": {}, "uniform": {}}

    def add(self, section: str, key: str, value: Any) -> None:
        """Read before it is written: another process may have added to it."""
        data = self.results
        data.setdefault(section, {})[key] = value
        setting = {name: getattr(self.options, name) for name in ("num_samples", "seq_len", "search_samples", "score_samples", "score_len", "seed")}
        setting |= {"train": Path(self.options.train).name, "texts": [Path(text).name for text in self.options.text]}
        data |= {"name": self.options.name, "setting": setting, "units": len(self.session.structure.units)}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(data, indent=1) + "\n")

    def step(self, name: str, started: tuple[float, float], **more: Any) -> None:
        """started: `now` at the time."""
        seconds, cpu = (round(b - a, 2) for a, b in zip(started, now(), strict=True))
        self.add("steps", name, {"seconds": seconds, "cpu_seconds": cpu, "load": os.getloadavg(), "command": command(), "machine": machine(), **more})

    def tell(self, stage: str, done: int, of: int) -> None:
        if time.monotonic() - self.told > 20 or done == of:
            self.told = time.monotonic()
            print(f"{stage} {done}/{of}", flush=True)

    # --- stages -----------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        self.measured("measure", self.session)

    def modules(self) -> None:
        self.measured("modules", self.by_module)

    def measured(self, name: str, session: Session) -> None:
        started, known = now(), session.known
        before = 0 if known is None else sum(map(len, known.kl))
        found = session.measured()
        self.step(name, started, resumed_from=before, measured=sum(map(len, found.kl)), units=len(found.units))

    def pairs(self) -> None:
        started, before = now(), len(self.session.measured().pairs or ())
        found = self.session.measured(pairs=True)
        self.step("pairs", started, resumed_from=before, measured=len(found.pairs or ()), bits=found.pair_bits)

    def task(self, bits: float, probe: Callable[[], Probe] | None = None) -> Task:
        limit = budget.mean_bits(self.session.model, bits)
        losses = {"kl": self.session.losses("kl")}
        return Task(self.session.model, self.session.structure.units, limit, losses, {}, probe)

    def solve(self) -> None:
        losses = {}
        for loss in planning.LOSSES:
            started = now()
            losses[loss] = self.session.losses(loss)
            self.step(f"loss {loss}", started)
        known = self.session.measured()
        pairs = known.pair_terms(self.session.widths) if known.pairs_complete else {}
        for bits in self.options.budgets:
            task = replace(self.task(bits), losses=losses, pairs=pairs)
            for name, (solver, loss) in SOLVERS.items():
                if name == "quadratic" and not pairs:
                    continue
                try:
                    self.keep(name, bits, task.solve(solver, loss))
                except PlanError as error:
                    print(f"{name} at {bits}: {error}", flush=True)
            self.keep("module", bits, self.module_task(bits).solve("exact"))
        started = now()
        problem = self.task(self.options.budgets[0]).problem("kl")
        points = planning.solve.front(problem, 8)
        self.step("front", started, points=len(points))

    def module_task(self, bits: float, probe: Callable[[], Probe] | None = None) -> Task:
        """One width for the attention and one for the MLP of a block."""
        own = self.by_module
        return Task(own.model, own.structure.units, budget.mean_bits(own.model, bits), {"kl": own.losses("kl")}, {}, probe)

    def keep(self, name: str, bits: float, found: planning.Found, **more: Any) -> None:
        plan = found.plan
        entry = {"solver": name, "budget": bits, "bits": round(plan.mean_bits(self.checkpoint.modules, self.checkpoint.layout), 4)}
        entry |= {
            "choice": "".join(str(plan.bits(unit.layers[0])) for unit in self.session.structure.units),
            "seconds": round(found.seconds, 3),
            "gap": found.gap,
        }
        entry |= {"predicted_kl": self.session.predicted(plan), **more}
        before = self.results["plans"].get(f"{name}/{bits:g}", {})
        if before.get("choice") == entry["choice"] and "kl" in before:
            entry["kl"] = before["kl"]  # it was scored
        self.add("plans", f"{name}/{bits:g}", entry)
        print({key: entry[key] for key in ("solver", "budget", "bits", "seconds", "predicted_kl")}, flush=True)

    def search_probe(self, units: Sequence[Unit]) -> Probe:
        tokenizer = models.AutoTokenizer.from_pretrained(self.checkpoint.folder)
        tokens = calibration.token_stream(tokenizer, calibration.read_texts(self.options.train))
        bos = calibration.leading_token(tokenizer)
        chosen, _ = calibration.choose_windows(
            tokens, self.options.seq_len, self.options.search_samples, 0, self.options.seed + 1, self.options.train, bos
        )
        return Probe(self.checkpoint, units, chosen)

    def search(self, name: str, bits: float, task: Task, seconds: float) -> None:
        counted = [0]

        def tell(stage: str, done: int, of: int) -> None:
            counted[0] = done
            self.tell(stage, done, of)

        found = task.solve("evolve", "kl", Search(generations=10**6, seconds=seconds, seed=self.options.seed), tell)
        self.keep(name, bits, found, generations=counted[0], samples=self.options.search_samples, load=os.getloadavg())

    def evolve(self) -> None:
        probe = self.search_probe(self.session.structure.units)
        for bits in self.options.budgets:
            if f"evolve/{bits:g}" not in self.results["plans"]:
                self.search("evolve", bits, self.task(bits, lambda: probe), self.options.search_seconds)

    def long(self) -> None:
        probe = self.search_probe(self.by_module.structure.units)
        for bits in self.options.long:
            if f"evolve-long/{bits:g}" not in self.results["plans"]:
                self.search("evolve-long", bits, self.module_task(bits, lambda: probe), self.options.long_seconds)

    def probes(self, samples: int) -> Iterator[tuple[str, Probe]]:
        """Every text's name, and a probe of its first sequences against the original; one at a time."""
        source = models.open_source(self.options.original)
        original = models.load_dense(self.options.original, source.folder, None, dtype=torch.float32)
        for spec in self.options.text:
            sequences = evaluation(spec, source.tokenizer(), original, samples, self.options.score_len)
            yield Path(spec).name, Probe(self.checkpoint, self.session.structure.units, sequences, original)

    def chosen(self, entry: dict[str, Any]) -> BitPlan:
        return as_plan(self.session.structure.units, map(int, entry["choice"]))

    def closer(self) -> None:
        for text, probe in self.probes(self.options.closer_samples):
            for bits in self.options.closer:
                width = self.session.widths[budget.mean_bits(self.session.model, bits).uniform[-1]]
                named = {f"{width} bits": BitPlan(width)}
                for name in CLOSER:
                    entry = self.results["plans"].get(f"{name}/{bits:g}")
                    if entry:
                        named[name] = self.chosen(entry)
                kl = {name: probe.kl_of_plan_by_sequence(plan).double() for name, plan in named.items()}
                for name, found in kl.items():
                    more = found - kl[f"{width} bits"]
                    row = {"kl": float(found.mean()), "more": float(more.mean()), "error": float(more.std() / len(more) ** 0.5)}
                    row |= {"budget": bits, "plan": name, "text": text, "tokens": probe.samples * self.options.score_len}
                    self.add("closer", f"{name}/{bits:g}/{text}", row)
                    print(row, flush=True)
            del probe

    def score(self) -> None:
        started = now()
        for text, probe in self.probes(self.options.score_samples):
            known: dict[str, float] = {}
            for r in self.session.widths:
                row = self.results["uniform"].get(str(r), {"bits": BitPlan(r).mean_bits(self.checkpoint.modules, self.checkpoint.layout), "kl": {}})
                if text not in row["kl"]:
                    row["kl"][text] = probe.kl_of_plan(BitPlan(r))
                    self.add("uniform", str(r), row)
            for key, entry in self.results["plans"].items():
                scored = entry.setdefault("kl", {})
                if text in scored:
                    known[entry["choice"]] = scored[text]
                    continue
                if entry["choice"] not in known:
                    known[entry["choice"]] = probe.kl_of_plan(self.chosen(entry))
                scored[text] = known[entry["choice"]]
                self.add("plans", key, entry)
                print(key, text, round(scored[text], 4), flush=True)
            self.step(f"score {text}", started, tokens=probe.samples * self.options.score_len)
            started = now()
            del probe  # before the next text has one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--original", required=True)
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--work", type=Path, required=True, help="folder for sensitivities")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", required=True, help="text to measure and search on")
    parser.add_argument("--text", action="append", required=True, help="to score on; may be given again")
    parser.add_argument("--budgets", type=float, nargs="*", default=[2.5, 3, 3.5, 4, 5, 6])
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--search-samples", type=int, default=16)
    parser.add_argument("--search-seconds", type=float, default=120)
    parser.add_argument("--long", type=float, nargs="*", default=[3.5], help="budgets of the long search")
    parser.add_argument("--long-seconds", type=float, default=1800)
    parser.add_argument("--closer", type=float, nargs="*", default=[3.5, 4], help="budgets whose plans are scored on more text")
    parser.add_argument("--closer-samples", type=int, default=32)
    parser.add_argument("--score-samples", type=int, default=8)
    parser.add_argument("--score-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(STAGES), choices=STAGES)
    options = parser.parse_args()
    bench = Bench(options)
    for stage in options.only:
        getattr(bench, stage)()


if __name__ == "__main__":
    main()
