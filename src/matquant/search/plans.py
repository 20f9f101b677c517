"""Which plan is meant: a width, a BitPlan, the name of a plan in the checkpoint, a file, or a mean width.

`3.5` is the plan stored as plans/3.5.json if there is one. Else it is solved here and now, from the sensitivities that `matquant plan` left in the
checkpoint, as the best plan of at most 3.5 bits a quantized weight, metadata counted; that takes milliseconds and loads no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from matquant.checkpoint import Checkpoint
from matquant.checkpoint.files import MAX_PLAN_BYTES, read_bytes
from matquant.errors import CheckpointError, PlanError, choices
from matquant.plan import BitPlan
from matquant.search import sensitivity, solve
from matquant.search.budget import Budget, Model, mean_bits
from matquant.search.sensitivity import Sensitivity
from matquant.search.units import Structure, Unit, as_plan

Wanted = int | float | str | BitPlan | None


def resolve(folder: Path, wanted: Wanted, fetched: bool = True) -> int | BitPlan | None:
    """A width or plan for this checkpoint. fetched: False = planes that are not here will be.

    Raises PlanError for a name, file or number that leads to none, InputError, CheckpointError.
    """
    if wanted is None or isinstance(wanted, BitPlan) or type(wanted) is int:
        return wanted
    checkpoint, text = Checkpoint.open(folder), str(wanted)
    named = stored(checkpoint)
    if text in named:
        return named[text].check(checkpoint.modules, checkpoint.layout.widths)
    if not isinstance(wanted, float) and Path(text).is_file():
        return BitPlan.load(Path(text)).check(checkpoint.modules, checkpoint.layout.widths)
    bits = _number(text)
    if bits is None:
        known = f"the plans of {folder}: {choices(text, named)}" if named else f"{folder} holds no plans"
        raise PlanError(f"no plan {text!r}: it is no file, no number, and {known}; make one with matquant plan")
    measured = sensitivity.load(folder / sensitivity.FILE, checkpoint)
    if measured is None:
        raise PlanError(f"{folder} holds no plan {text!r} and no sensitivities to find one by; run matquant plan {folder} --budget {text}")
    return within(checkpoint, measured, bits, checkpoint.widths if fetched else checkpoint.layout.widths)


def stored(checkpoint: Checkpoint) -> dict[str, BitPlan]:
    """The plans in the folder by name. Raises PlanError for a broken one."""
    found: dict[str, BitPlan] = {}
    for name in checkpoint.plans:
        try:
            text = read_bytes(checkpoint.folder, name, MAX_PLAN_BYTES).decode("utf-8")
        except (CheckpointError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {name}: {error}; give a JSON file") from None
        found[name.removeprefix("plans/").removesuffix(".json")] = BitPlan.from_json(text, str(checkpoint.folder / name))
    return found


def within(checkpoint: Checkpoint, measured: Sensitivity, bits: float, widths: tuple[int, ...]) -> BitPlan:
    """The best plan of at most `bits` bits a quantized weight, out of these widths. Raises PlanError, InputError."""
    found = model_of(checkpoint, Structure(measured.units, (), 0), widths)
    budget = mean_bits(found, bits)
    problem = problem_of(found, budget, measured.losses(found.layout.widths))
    choice = solve.exact(problem, budget.limit)
    about = {"solver": "exact", "budget": f"{bits:g} bits a weight", "predicted_kl": measured.predict(problem.loss(choice))}
    return plan_of(found, measured.units, choice, about)


# --- between a checkpoint and numbers -------------------------------------------------------------------------------


def model_of(checkpoint: Checkpoint, structure: Structure, widths: tuple[int, ...] | None = None) -> Model:
    """What budgets of this checkpoint are counted on. widths: to choose from; None = those here."""
    units = [unit.layers for unit in structure.units]
    layout = replace(checkpoint.layout, widths=checkpoint.widths if widths is None else widths)
    return Model(units, checkpoint.modules, layout, checkpoint.other_weights, checkpoint.other_bytes, structure.cache, structure.head)


def problem_of(model: Model, budget: Budget, losses: np.ndarray, pairs: Mapping[tuple[int, int], np.ndarray] | None = None) -> solve.Problem:
    return solve.Problem(budget.costs, losses, pairs or {}, budget.show)


def plan_of(model: Model, units: Sequence[Unit], choice: solve.Choice, about: Mapping[str, object]) -> BitPlan:
    plan = as_plan(units, [model.layout.widths[k] for k in choice])
    return BitPlan(plan.default, plan.overrides, about)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
