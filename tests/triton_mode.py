"""Triton on whatever is here: compiled where CUDA is, else interpreted on the CPU (conftest.py sets TRITON_INTERPRET before Triton is imported).

The interpreter looks through the whole language at every call of a helper function, which takes most of its time; here, once a launch.
"""

import types
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float16, torch.float32]  # interpreted bfloat16 is wrong
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

_patch_lang = interpreter._patch_lang


class _Scope:
    """Remembers that a launch is under way."""

    active: Any = None

    def __call__(self, function: Any) -> Any:
        if self.active is not None:
            return None
        self.active = _patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        return self

    def restore(self) -> None:
        self.active.restore()
        self.active = None


if not CUDA:
    interpreter._patch_lang = _Scope()
