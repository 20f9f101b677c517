"""Compiles the kernels for GPUs that need not be here and prints facts about their machine code as JSON (test_triton_compiled.py)."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from matquant.codes import Grid
from matquant.kernels.gpu import jit, jit_mma, jit_weight
from matquant.kernels.gpu.launch import REPACK_ROWS
from matquant.kernels.gpu.layout import reading
from matquant.kernels.gpu.table import Config, untuned

TARGETS = {"sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"x": "*fp16", "y": "*fp16", "w": "*fp16", "scale": "*fp16", "bias": "*fp16", "fit": "*u8", "zero": "*u8", "partial": "*fp32",
            "words_out": "*i32", "upper": "*u8", "lower": "*u8"}  # fmt: skip
PLANES = {"pair": 2, "second": 3, "third": 4, "fourth": 5, "sixth": 7}  # argument -> the least width that has it


def build(kernel: Any, target: GPUTarget, constants: dict[str, Any], options: dict[str, Any], dtype: str = "fp16") -> Any:
    """The compiled kernel; sizes are multiples of 16, pointers aligned, as for the layers of a large model."""
    bits, names, signature = constants.get("BITS", 8), kernel.arg_names, {}
    for name in names:
        if name in PLANES and bits < PLANES[name]:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif name in PLANES:
            signature[name] = "*i32"
        else:
            signature[name] = POINTERS.get(name, "i32").replace("fp16", dtype if name in "xyw" else "fp16")
    aligned = [name for name in names if signature[name].startswith("*") or name in ("out", "in_features", "groups", "rows", "row_bytes")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if signature[name] != "constexpr"}
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def facts(compiled: Any, weights: int) -> dict[str, Any]:
    """weights: that a thread takes in one turn of the loop."""
    if "cubin" not in compiled.asm:
        return {"size": len(compiled.asm["hsaco"])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    count = lambda pattern: len(re.findall(rf"\s(?:{pattern})\b", code))  # noqa: E731
    return {
        "size": len(compiled.asm["cubin"]), "weights": weights, "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s", code)),
        "wide_loads": count(r"LDG\.E\.128\S*|LDGSTS\.E\S*\.128"), "tensor_core": count(r"HGMMA\S*|HMMA\S*"), "masks": count(r"LOP3\S*"),
        "conversions": count(r"I2F\S*"), "spilled": count(r"STL\S*"), "stored_shared": count(r"STS\S*"),
    }  # fmt: skip


def products() -> dict[str, dict[str, Any]]:
    """The untuned configurations at some widths: each costs seconds."""
    found = {}
    grid = Grid(8, 128, False, False)
    cases = [(2, "float16", "sm90"), (8, "bfloat16", "sm90"), (3, "float16", "sm80"), (4, "float16", "gfx942")]
    for bits, dtype, name in cases:
        read = {key.upper(): value for key, value in reading(bits, grid, bits <= 4)._asdict().items()}
        shared = {**read, "GROUP": 128, "PADDED": 128, "APPLY": 4, "PARTIAL": False, "bias": None, **({} if read["FITTED"] else {"fit": None})}
        for batch in (1, 8):
            config = untuned(bits, batch)
            own = {"BLOCK_K": config.block_k} if config.kind == "gemv" else {"KIND": int(dtype == "bfloat16"), "RUN": config.run}
            own |= {"BLOCK_N": config.block_n, "BLOCK_M": max(batch, 1 if config.kind == "gemv" else config.least_m), "STAGES": config.stages}
            kernel = build(getattr(jit, config.kind), TARGETS[name], shared | own, {"num_warps": config.warps, "num_stages": config.stages},
                           {"float16": "fp16", "bfloat16": "bf16"}[dtype])  # fmt: skip
            columns = 512 * (config.block_k if config.kind == "gemv" else 1)
            found[f"{config.kind}-{bits}-{dtype}-{name}"] = facts(kernel, config.block_n * columns // (32 * config.warps))
    return found


def spelled_out() -> dict[str, dict[str, Any]]:
    """The kernel of explicit layouts: for one row of x, copying ahead, and for 16, straight into registers."""
    found = {}
    for bits, dtype, name, group, config in (
        (2, "bfloat16", "sm90", 128, Config("mma", block_n=16, block_m=8, warps=4, stages=3)),
        (8, "float16", "sm90", 64, Config("mma", block_n=16, block_m=8, warps=2, stages=2)),
        (3, "bfloat16", "sm80", 32, Config("mma", block_n=16, block_m=16, warps=4, stages=1)),
    ):
        read = {key.upper(): value for key, value in reading(bits, Grid(8, group, False, False), bits <= 3)._asdict().items()}
        constants = read | ({} if read["FITTED"] else {"fit": None}) | {
            "GROUP": group, "APPLY": group // 32, "PARTIAL": False, "bias": None, "BFLOAT": dtype == "bfloat16", "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m, "W": config.warps, "STAGES": config.stages, "WHOLE": True, "ROWS": 1 if config.block_m == 8 else 16,
            "PDL": name == "sm90",
        }  # fmt: skip
        kernel = build(jit_mma.mma, TARGETS[name], constants, {"num_warps": config.warps}, {"float16": "fp16", "bfloat16": "bf16"}[dtype])
        found[f"mma-{bits}-{dtype}-{name}"] = facts(kernel, config.block_n * 512 // 32)
    return found


def rest() -> dict[str, dict[str, Any]]:
    """The other kernels."""
    read = {key.upper(): value for key, value in reading(8, Grid(8, 128, False, False), False)._asdict().items()}
    blocks = {"GROUP": 128, "PADDED": 128, "BLOCK_N": 64}
    return {
        "dense-8-sm90": facts(build(jit_weight.dense, TARGETS["sm90"], {**read, **blocks, "fit": None}, {}), 0),
        "tile_plane-sm90": facts(build(jit_weight.tile_plane, TARGETS["sm90"], {**blocks, "BLOCK_N": REPACK_ROWS, "PAIR": True}, {}), 0),
        "add_splits-sm90": facts(build(jit.add_splits, TARGETS["sm90"], {"BLOCK": 256}, {}), 0),
    }


if __name__ == "__main__":
    print(json.dumps(products() | spelled_out() | rest()))
