"""One algorithm per file. A method maps (weight, Hessian, recipe) to a NestedWeight; nothing else tells methods apart.

METHODS names the function of each; it is imported when it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from jaxtyping import Float
from torch import Tensor

from matquant.recipe import Recipe
from matquant.weight import NestedWeight


@dataclass(frozen=True)
class Chosen:
    """What a method returns: the weight, and what the user should know about this layer (damping raised, fallbacks)."""

    weight: NestedWeight
    notes: tuple[str, ...] = ()


Method = Callable[[Float[Tensor, "out in"], Float[Tensor, "in in"], Recipe], Chosen]

METHODS = {
    "minmax": "matquant.methods.minmax:quantize",
    "gptq": "matquant.methods.gptq:quantize",
}


def load(name: str) -> Method:
    """The function behind a name of METHODS."""
    module, _, function = METHODS[name].partition(":")
    return getattr(import_module(module), function)
