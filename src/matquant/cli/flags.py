"""Flags: from the fields of Recipe (name, type, help and default are the field's), and small parsers of values.

`--recipe FILE` gives values too; a flag on the command line overrides the file, and the file overrides the default.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import typer

from matquant.errors import RecipeError
from matquant.recipe import Recipe

EXAMPLES = {"targets": "8:.08,6:.05,4:.25,3:.5,2:1", "teachers": "2:8,4:8"}  # fields that map widths
FILE_HELP = "YAML or JSON file of recipe settings; flags override it"


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def value_text(value: Any) -> str:
    """A recipe value as one would write it after its flag."""
    if isinstance(value, Mapping):
        return ",".join(f"{r}:{lam:g}" for r, lam in value.items()) or "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_bits(text: str, name: str = "bits") -> tuple[int, ...]:
    """'8,4,2' -> (8, 4, 2). Raises RecipeError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"{name} is {text!r}; give whole numbers, for instance 8,6,4,3,2") from None


def parse_targets(text: str, name: str = "targets") -> dict[int, float]:
    """'8:.02,4:.25' -> {8: 0.02, 4: 0.25}. name: of the flag. Raises RecipeError."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        targets = {int(width): float(lam) for width, lam in pairs}
    except ValueError:
        raise RecipeError(f"{name} is {text!r}; give {METAVARS[name][:-4]} pairs, for instance {EXAMPLES[name]}") from None
    if len(targets) != len(pairs):
        raise RecipeError(f"{name} is {text!r}; name each width once")
    return targets


METAVARS = {
    "bits": "BITS,...",
    "favor": "BITS,...",
    "streams": "BITS,...",
    "targets": "BITS:WEIGHT,...",
    "teachers": "BITS:TEACHER,...",
    "skip": "PATTERN",
    "calibration": "TEXT",
    "train_text": "TEXT",
}


def _option(field: "Field[Any]", default: Any) -> inspect.Parameter:
    """The command-line option of one recipe field. None = not given."""
    names, kind = [flag_name(field.name)], type(default)
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    elif field.name == "skip":
        kind = list[str]
    elif kind not in (int, float):
        kind = str
    text = field.metadata["help"] + ("; may be given again" if kind == list[str] else "")
    option = typer.Option(None, *names, metavar=METAVARS.get(field.name), help=text, show_default=value_text(default))
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def build_recipe(file: Path | None, given: Mapping[str, Any]) -> Recipe:
    """Defaults, then `file`, then the flags that were `given`. Raises RecipeError."""
    base = Recipe.load(file) if file else Recipe()
    values = dict(given)
    for name in ("bits", "favor", "streams"):
        if name in values:
            values[name] = parse_bits(values[name], name)
    for name in EXAMPLES:
        if name in values:
            values[name] = parse_targets(values[name], name)
    return Recipe.from_dict(base.to_dict() | values)


def with_recipe_flags(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler(recipe=..., ...)` as a command with one flag for each field of Recipe, and --recipe."""
    default = Recipe()
    options = [_option(field, getattr(default, field.name)) for field in fields(Recipe)]
    file = inspect.Parameter(
        "recipe_file", inspect.Parameter.KEYWORD_ONLY, default=typer.Option(None, "--recipe", metavar="FILE", help=FILE_HELP), annotation=Path | None
    )
    signature = inspect.signature(handler)
    rest = [parameter for parameter in signature.parameters.values() if parameter.name != "recipe"]
    first = [parameter for parameter in rest if isinstance(parameter.default, typer.models.ArgumentInfo)]
    others = [parameter for parameter in rest if parameter not in first]

    @functools.wraps(handler)
    def command(**arguments: Any) -> Any:
        given = {field.name: arguments.pop(field.name) for field in fields(Recipe)}
        recipe = build_recipe(arguments.pop("recipe_file"), {name: value for name, value in given.items() if value is not None})
        return handler(recipe=recipe, **arguments)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*first, file, *options, *others]]
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
