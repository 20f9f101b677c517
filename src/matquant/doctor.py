"""What matquant finds on this machine: versions, threads, memory, disk, accelerators, extras, network settings."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

EXTRAS = {"plot": "matplotlib", "data": "datasets", "gguf": "gguf"}
PACKAGES = ("matquant", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "numpy")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_ENDPOINT")


def examine(folder: Path) -> dict[str, Any]:
    """JSON-ready facts; free disk space is that of `folder`. Nothing is written, and nothing is fetched."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "ram_free_bytes": free_memory(),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "extras": {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()},
        "environment": {name: os.environ[name] for name in OFFLINE if name in os.environ},
    }


def problems(facts: dict[str, Any]) -> list[str]:
    """What the user may want to do about these facts, a line each."""
    lines = [f"the extra {name!r} is not installed: pip install 'matquant[{name}]'" for name, there in facts["extras"].items() if not there]
    if facts["environment"].get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        lines.append("HF_HUB_OFFLINE is set: models must be local folders or in the cache")
    if facts["ram_free_bytes"] is not None and facts["ram_free_bytes"] < 2 * 2**30:
        lines.append("less than 2 GiB of memory is free")
    return lines


def free_memory() -> int | None:
    """Bytes that a new process can have, where the system says so (Linux), else None."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}", "free_bytes": free, "total_bytes": total}
