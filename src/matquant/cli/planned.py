"""What `matquant plan` does and shows, step by step."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.cli import run, show
from matquant.errors import InputError, PlanError, choices
from matquant.plan import BitPlan
from matquant.report import Table, public, size
from matquant.search import charts, planning, plans, solve
from matquant.search.budget import Budget
from matquant.search.charts import Point
from matquant.search.session import Session, Source, written

if TYPE_CHECKING:
    from torch import Tensor

    from matquant.cli.plans import Ask

FRONT_EXACT = 8  # exact minima between those of the hull


@dataclass(frozen=True)
class Found:
    """A plan and what is known of it. kl: predicted and measured, None where it was not. place: the file it was written to.

    better: the uniform width within the same budget that was measured to lose less, if there is one.
    """

    name: str
    plan: BitPlan
    bits_per_weight: float
    weight_bytes: int
    predicted_kl: float | None
    measured_kl: float | None
    seconds: float
    place: str = ""
    better: int | None = None


def source(
    folder: Path, text: str | None, samples: int, seq_len: int, seed: int, reference: str | None, gguf_file: str | None, device: str, dtype: str
) -> Source:
    """What to measure with; nothing is read or sampled before it is needed."""
    from matquant import calibration, hf

    setup = run.Setup(device, dtype, seq_len, samples * seq_len, seed, False)

    def sequences() -> "tuple[Tensor, str]":
        tokenizer = run.load_tokenizer(str(folder))
        if text is not None:
            tokens = calibration.token_stream(tokenizer, calibration.read_texts(text))
            chosen, _ = calibration.choose_windows(tokens, seq_len, samples, 0, seed, text, calibration.leading_token(tokenizer))
            return chosen, f"{public(text)}, seed {seed}"
        model = hf.from_pretrained(folder, dtype=dtype, device_map=device).eval().dequantize()
        start = calibration.start_token(tokenizer)
        return calibration.sample_windows(model, start, samples, seq_len, seed, lambda *_: None), f"sampled from the checkpoint, seed {seed}"

    if reference is None:
        return Source(sequences)
    return Source(sequences, lambda: run.load_original(reference, gguf_file, setup), public(reference))


@dataclass(frozen=True)
class Way:
    """How to find a plan and what to do with it. output: a file for it; None = in the checkpoint, by its name."""

    solver: str
    loss: str
    search: planning.Search
    measure: bool
    name: str
    output: Path | None


def carry_out(
    session: Session, ask: "Ask", way: Way, pareto: Path | None, progress: Callable[[str, int, int], None]
) -> tuple[Found | None, list[Point]]:
    """(the plan, found and stored, if there is a budget; what was drawn). Raises PlanError, InputError."""
    found = None if ask.name is None else store(find(session, ask.of(session.model, session.device), way, progress), session, way.output)
    if pareto is None:
        return found, []
    points = front(session, found)
    charts.draw(pareto, points, None if found is None else found.plan, list(session.model.shapes))
    return found, points


def find(session: Session, budget: Budget, way: Way, progress: Callable[[str, int, int], None]) -> Found:
    """Raises PlanError, InputError."""
    for value, allowed, words in ((way.solver, planning.SOLVERS, "solver"), (way.loss, planning.LOSSES, "loss")):
        if value not in allowed:
            raise PlanError(f"{words} is {value!r}; {choices(value, allowed)}")
    solve.Problem(budget.costs, budget.costs * 0.0, {}, budget.show).check(budget.limit)  # before anything is measured
    loss = "round-off" if way.solver == "round-off" else way.loss
    losses = {loss: session.losses(loss)}
    pairs = session.measured(pairs=True).pair_terms(session.widths) if way.solver == "quadratic" else {}
    task = planning.Task(session.model, session.structure.units, budget, losses, pairs, session.probe)
    found = task.solve(way.solver, loss, way.search, progress)
    predicted = session.predicted(found.plan)
    measured = session.probe().kl_of_plan(found.plan) if way.measure else None
    text = "" if session.known is None else session.known.setting.text
    about = planning.about(way.solver, loss, budget.show(budget.limit), predicted, measured, text)
    plan = BitPlan(found.plan.default, found.plan.overrides, about)
    bits = plan.read_bits(session.model.shapes, session.model.layout)
    size = session.model.other_bytes + -(-bits // 8)
    better = better_uniform(session, budget, measured)
    return Found(way.name, plan, bits / session.model.weights, size, predicted, measured, found.seconds, better=better)


def better_uniform(session: Session, budget: Budget, measured: float | None) -> int | None:
    """Reads of one width are made for each other, which a sum over units does not see; so a plan can lose to a uniform width of its size."""
    if session.known is None or measured is None:
        return None
    within = [session.widths[k] for k in budget.uniform if session.widths[k] in session.known.uniform]
    best = min(within, key=session.known.uniform.__getitem__, default=None)
    return best if best is not None and session.known.uniform[best] < measured else None


def store(found: Found, session: Session, output: Path | None) -> Found:
    """Into the checkpoint, or to a file of its own. Raises InputError."""
    if output is None:
        files = written(session.checkpoint.folder, found.name, found.plan)
        return replace(found, place=str(session.checkpoint.folder / next(iter(files))))
    try:
        output.write_text(found.plan.to_json(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}; choose another file") from None
    return replace(found, place=str(output))


def front(session: Session, found: Found | None) -> list[Point]:
    """The predicted front, every uniform width as measured, and every plan of the checkpoint."""
    known, model = session.measured(), session.model
    problem = solve.Problem(model.bits(), known.losses(session.widths))
    points = [
        Point("", "front", problem.cost(choice) / model.weights, known.predict(problem.loss(choice)), False)
        for choice in solve.front(problem, FRONT_EXACT)
    ]
    for bits, kl in sorted(known.uniform.items()):
        points.append(Point(str(bits), "uniform", BitPlan(bits).mean_bits(model.shapes, model.layout), kl, True))
    named = plans.stored(session.checkpoint) | ({} if found is None else {found.name: found.plan})
    for name, plan in named.items():
        kl = plan.about.get("measured_kl")
        measured = isinstance(kl, float)
        if not measured and (kl := session.predicted(plan)) is None:  # it splits what has one width here
            kl, measured = session.probe().kl_of_plan(plan), True
        points.append(Point(name, "plan", plan.mean_bits(model.shapes, model.layout), kl, measured))
    return points


# --- shown ----------------------------------------------------------------------------------------------------------


def show_found(found: Found | None, points: Sequence[Point], as_json: bool, layers: Sequence[str]) -> None:
    if as_json:
        plan = None if found is None else asdict(found) | {"plan": {"default": found.plan.default, "layers": dict(found.plan.overrides)}}
        return show.emit({"found": plan, "points": [asdict(point) for point in points]})
    if points:
        shown = [point for point in points if point.kind != "front"]
        rows = [[point.label, f"{point.bits_per_weight:.2f}", f"{point.kl:.4f}", "measured" if point.measured else "predicted"] for point in shown]
        show.draw(Table(["plan", "bits/weight", "KL", ""], sorted(rows, key=lambda row: float(row[1]))))
    if found is None:
        return
    show.draw(widths_table(found.plan, layers))
    words = [f"{found.bits_per_weight:.3f} bits a quantized weight", size(found.weight_bytes)]
    words += [f"KL {value:.4f} {kind}" for kind, value in (("predicted", found.predicted_kl), ("measured", found.measured_kl)) if value is not None]
    show.say(f"{found.name}: {', '.join(words)}; solved in {found.seconds:.2f} s", f"written to {found.place}")
    if found.better is not None:
        show.say(
            f"note: uniform {found.better} bits are within this budget and lose less; read at --bits {found.better}, or search on (--solver evolve)"
        )


def widths_table(plan: BitPlan, layers: Sequence[str]) -> Table:
    """Blocks by modules."""
    blocks, modules, places = charts.grid(plan, layers)
    words: Callable[[Any], str] = lambda bits: "/".join(map(str, bits))  # noqa: E731
    return Table(["block", *modules], [[str(b) if b >= 0 else "head", *(words(places.get((b, m), ())) for m in modules)] for b in blocks])
