"""One algorithm per file. A method maps (weight, second moments of its inputs, recipe) to a NestedWeight; nothing else tells methods apart.

METHODS names the function of each; it is imported when it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

from jaxtyping import Float
from torch import Tensor

from matquant.activations import Inputs
from matquant.recipe import Recipe
from matquant.weight import NestedWeight


@dataclass(frozen=True)
class Chosen:
    """What a method returns. notes: what the user should know about this layer (damping raised, fallbacks). stages: name of a
    stage of the method -> target width -> loss of every row after it."""

    weight: NestedWeight
    notes: tuple[str, ...] = ()
    stages: Mapping[str, Mapping[int, Float[Tensor, " out"]]] = field(default_factory=dict[str, Mapping[int, Tensor]])


Method = Callable[[Float[Tensor, "out in"], Inputs, Recipe], Chosen]

METHODS = {
    "minmax": "matquant.methods.minmax:quantize",
    "gptq": "matquant.methods.gptq:quantize",
    "block": "matquant.methods.gptq:quantize",  # then refine.py, once all layers of a block have their codes
    "omniquant": "matquant.methods.minmax:quantize",  # then omniquant.py
    "qat": "matquant.methods.minmax:quantize",  # where qat.py starts from
}


def load(name: str) -> Method:
    """The function behind a name of METHODS."""
    module, _, function = METHODS[name].partition(":")
    return getattr(import_module(module), function)
