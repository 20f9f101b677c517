"""`import matquant`: nothing heavy, lazy names, and one registration whenever transformers comes."""

import subprocess
import sys

import pytest

import matquant


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_leaves_one_finder() -> None:
    code = """
import sys, matquant
assert not {"torch", "transformers", "numpy", "matquant.hf"} & set(sys.modules)
import email.mime.text, transformers.utils  # other imports pass by
assert "transformers.quantizers" not in sys.modules
print([type(finder).__name__ for finder in sys.meta_path].count("_RegisterOnImport"))
"""
    assert run(code) == "1"


def test_registration_at_once_where_transformers_is_there_already() -> None:
    """The other order, transformers after matquant, is in test_hf with a real load."""
    code = """
import sys
from transformers.quantizers import auto
import matquant
print("matquant" in auto.AUTO_QUANTIZER_MAPPING, [type(finder).__name__ for finder in sys.meta_path].count("_RegisterOnImport"))
"""
    assert run(code) == "True 0"


def test_names_are_lazy_and_listed() -> None:
    assert set(matquant.__all__) <= set(dir(matquant))
    for name in matquant.__all__:
        assert getattr(matquant, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'matquant' has no attribute 'quantise'"):
        matquant.quantise  # noqa: B018
