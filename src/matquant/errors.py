"""One class per thing a user can fix.

Each carries the exit code that the command line returns for it (docs/CLI.md lists them). A message says
what is wrong (with the value), what is allowed, and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class MatquantError(Exception):
    """Base of every error that the caller can do something about."""

    exit_code = 1


class RecipeError(MatquantError):
    """A setting is outside what is allowed."""

    exit_code = 2


class InputError(MatquantError):
    """Something handed in (a model, a text, an output path) cannot be used."""

    exit_code = 3


class UnservedError(InputError):
    """A checkpoint that transformers can read and the engine cannot."""


class PlanError(InputError):
    """A plan names layers or widths that the checkpoint does not have."""


class MissingPlanesError(InputError):
    """A width was asked for whose planes are not here (not downloaded, or not loaded)."""


class ResumeError(InputError):
    """An interrupted run cannot be continued as asked."""


class ResourceError(MatquantError):
    """The machine has too little disk or memory."""

    exit_code = 4


class CheckpointError(MatquantError):
    """A checkpoint is not what its format promises: damaged, incomplete or of another version."""

    exit_code = 5


def choices(value: object, allowed: Iterable[object]) -> str:
    """Words for the end of an error: the allowed values, and the nearest one if `value` looks like a slip."""
    names = [str(name) for name in allowed]
    near = get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"choose from {', '.join(names)}{hint}"
