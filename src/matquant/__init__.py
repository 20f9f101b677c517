"""matquant: quantize an LLM once into one nested integer checkpoint, read it at 8, 6, 4, 3 or 2 bits.

Importing this package initialises nothing and imports neither torch nor transformers. It registers the checkpoint format with
transformers as soon as (and only if) transformers' quantizers are imported, so that a plain
`AutoModelForCausalLM.from_pretrained(folder)` works.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matquant.checkpoint import Checkpoint
    from matquant.hf import MatquantConfig, set_bits
    from matquant.loading import from_pretrained
    from matquant.plan import BitPlan
    from matquant.recipe import Recipe

__all__ = ["BitPlan", "Checkpoint", "MatquantConfig", "Recipe", "from_pretrained", "set_bits"]

_HOME = {"BitPlan": "plan", "Checkpoint": "checkpoint", "MatquantConfig": "hf", "Recipe": "recipe", "from_pretrained": "loading", "set_bits": "hf"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'matquant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"matquant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers once, right after `transformers.quantizers` has been executed (any module of it would be too early)."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != "transformers.quantizers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("matquant.hf")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers.quantizers" in sys.modules:
    importlib.import_module("matquant.hf")
else:
    sys.meta_path.insert(0, _RegisterOnImport())
