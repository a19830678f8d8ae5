"""`linfusion info`: what is installed and what it runs on, for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from linfusion.cli.console import Json, emit_json, emit_table, working

_PACKAGES = (
    *("torch", "triton", "xformers", "numpy", "pillow", "safetensors", "huggingface_hub"),
    *("diffusers", "transformers", "accelerate", "peft", "datasets", "tensorboard"),
    "torch-fidelity",
)


def info(as_json: Json = False) -> None:
    """Print versions and devices, for a bug report."""
    import torch

    from linfusion import zoo
    from linfusion._version import __version__

    with working():
        result: dict[str, Any] = {
            "linfusion": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "devices": _devices(),
            "zoo": zoo.names(),
            "packages": {name: _version(name) for name in _PACKAGES},
        }
    if as_json:
        emit_json(result)
        return
    packages = result.pop("packages")
    rows = [[k, ", ".join(v) if isinstance(v, list) else str(v)] for k, v in result.items()]
    rows += [[name, version or "not installed"] for name, version in packages.items()]
    emit_table(["", "linfusion info"], rows)


def machine() -> str:
    """Name and cores of this machine's processor."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
