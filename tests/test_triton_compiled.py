"""What Triton's compiler makes of the kernels for GPUs that are not here: machine code for compute capability 8.0 and 9.0, and for AMD's gfx942.

Compiling needs no GPU. It shows what an interpreter cannot: that the types and layouts are legal, that nothing spills, how wide loads are, and that a
weight costs about one integer instruction. It runs in a process of its own, because here Triton is interpreted.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = str(tmp_path_factory.mktemp("triton"))
    import os

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT)], check=False, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout)


def test_every_kernel_compiles(compiled: dict[str, Any]) -> None:
    assert all(facts["size"] > 0 for facts in compiled.values())
    assert {name.split("-")[0] for name in compiled} == {"gemv", "dot", "mma", "dense", "tile_plane", "add_splits"}
    assert {name.split("-")[-1] for name in compiled} == {"sm80", "sm90", "gfx942"}


def test_weights_are_loaded_in_128_bits(compiled: dict[str, Any]) -> None:
    for name, facts in compiled.items():
        if name.startswith(("gemv", "dot", "mma")) and "sm" in name:
            assert facts["wide_loads"] > 0, name


def test_products_of_many_rows_run_on_tensor_cores(compiled: dict[str, Any]) -> None:
    for name, facts in compiled.items():
        if name.startswith(("dot", "mma")) and "sm" in name:
            assert facts["tensor_core"] > 0, name


def test_nothing_spills(compiled: dict[str, Any]) -> None:
    assert {name: facts["spilled"] for name, facts in compiled.items() if facts.get("spilled")} == {}


def test_a_pair_of_weights_costs_one_masking_instruction(compiled: dict[str, Any]) -> None:
    """Two bits on tensor cores: a shift and a (and, or) make two weights, so the loop of 256 weights a thread has about 128 of each."""
    facts = compiled["dot-2-float16-sm90"]
    assert facts["masks"] <= 1.7 * facts["weights"] / 2
    assert facts["conversions"] <= 40  # of scales and refits: none of weights


def test_spelled_out_layouts_cost_two_instructions_a_weight(compiled: dict[str, Any]) -> None:
    """Whole programs counted, of which the loop over tiles is two thirds; nothing but partial sums goes through shared memory by way of registers."""
    assert compiled["mma-2-bfloat16-sm90"]["instructions"] <= 3.2 * compiled["mma-2-bfloat16-sm90"]["weights"]
    assert compiled["mma-2-bfloat16-sm90"]["masks"] <= 1.5 * compiled["mma-2-bfloat16-sm90"]["weights"] / 2
    assert all(facts["stored_shared"] <= 16 for name, facts in compiled.items() if name.startswith("mma"))
