"""Seconds and peak memory of one piece of work, on the device it runs on."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def measure(work: Callable[[], Any], device: str = "cpu") -> tuple[Any, float, int | None]:
    """Run `work` once.

    Returns:
        What it returned, its seconds, and the peak of memory in bytes above what was in use before:
        of the GPU on CUDA, of this process on Linux, None elsewhere.
    """
    before = _reset_peak(device)
    if device != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - start
    return result, seconds, None if before is None else max(0, _peak(device) - before)


def peak_rss() -> int | None:
    """Most bytes of memory that this process has held so far; None where that is not Linux."""
    return _status("VmHWM") if sys.platform.startswith("linux") else None


def human_bytes(count: float | None) -> str:
    """1_500_000 as "1.5 MB"; None as "-"."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _reset_peak(device: str) -> int | None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    # Memory that was freed but not yet given back would hide a new allocation of that size.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS (proc(5))
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {key}")
