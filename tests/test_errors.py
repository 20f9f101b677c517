"""Exit codes and the words of an error."""

import pytest

from matquant import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MatquantError, 1),
        (errors.RecipeError, 2),
        (errors.InputError, 3),
        (errors.PlanError, 3),
        (errors.MissingPlanesError, 3),
        (errors.ResumeError, 3),
        (errors.ResourceError, 4),
        (errors.CheckpointError, 5),
    ],
)
def test_exit_codes_are_fixed(error: type[errors.MatquantError], code: int) -> None:
    assert error.exit_code == code
    assert issubclass(error, errors.MatquantError)


def test_choices_lists_and_hints() -> None:
    assert errors.choices("gtpq", ["gptq", "minmax"]) == "choose from gptq, minmax (did you mean gptq?)"
    assert errors.choices("zzz", ["gptq", "minmax"]) == "choose from gptq, minmax"
    assert errors.choices(5, (8, 4, 2)) == "choose from 8, 4, 2"
