"""Builds libmatquant, the CPU kernels, when matquant is installed: a plain C library beside the Python files."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cmake
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

KERNELS = Path("src") / "matquant" / "kernels"


class Kernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, editable ones too."""
        kernels, program = Path(self.root) / KERNELS, str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        with tempfile.TemporaryDirectory() as build:
            subprocess.run([program, "-G", "Ninja", "-S", str(kernels / "csrc"), "-B", build], check=True)
            subprocess.run([program, "--build", build, "--target", "matquant"], check=True)
            for library in Path(build).glob("libmatquant.*"):
                shutil.copy2(library, kernels)
        build_data["artifacts"].append(f"{KERNELS}/libmatquant.*")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"  # the library knows nothing of Python
