"""One step of Stable Diffusion 1.5's UNet above 1 K: softmax, linear, and linear in bands of rows.

Times of what fits side by side are compared in one process. Memory is the peak of a process that
does nothing else, weights and libraries included, so every size also runs in one of its own:
`python -m benchmarks.highres PROVIDER PIXELS` prints what that took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import linfusion
from benchmarks.measure import Row, compare, machine
from benchmarks.unet import sd15_unet
from linfusion.bands.bounded import bounded

PROVIDERS = ("softmax", "linear", "bounded")
SIDE_BY_SIDE = 2048
# Softmax attention takes 16 times as long with each doubling: an hour and more a step at 4,096 px.
ALONE = [
    *(("softmax", size) for size in (1024, 1536)),
    *(("linear", size) for size in (1024, 1536, 2048, 4096)),
    *(("bounded", size) for size in (1024, 2048, 4096, 8192)),
]


def highres() -> Iterator[list[Row]]:
    """Time at 2,048 px in turns, then memory and time of each in a process of its own."""
    rivals = _steps(SIDE_BY_SIDE, linear=True)
    yield compare("step", SIDE_BY_SIDE, torch.bfloat16, rivals, runs=3)
    rivals.clear()
    firsts: dict[int, Row] = {}
    for provider, size in ALONE:
        row = alone(provider, size)
        first = firsts.setdefault(size, row)  # softmax where it ran
        row.speedup = round(first.ms / row.ms, 2)
        row.memory_ratio = round(row.memory_mb / first.memory_mb, 2)
        yield [row]


def alone(provider: str, size: int) -> Row:
    """One of `PROVIDERS` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.highres", provider, str(size)]
    took = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return Row(
        kernel="step alone",
        provider=provider,
        size=size,
        dtype="bfloat16",
        ms=took["ms"],
        memory_mb=took["memory_mb"],
        speedup=1.0,
        memory_ratio=1.0,
        error=None,
        runs=took["runs"],
        machine=machine(),
    )


def _steps(size: int, *, linear: bool) -> dict[str, Callable[[], object]]:
    """A forward of one UNet for a picture of `size` pixels a side: as it is, and in bands."""
    model = sd15_unet(torch.bfloat16)
    if linear:
        linfusion.linearize(model)
    text = torch.randn(1, 77, 768).bfloat16()
    sample = torch.randn(1, 4, size // 8, size // 8).bfloat16()

    def step() -> object:
        return model(sample, 500, text).sample

    def in_bands() -> object:
        with bounded(model):
            return step()

    return {"linear" if linear else "softmax": step, "bounded": in_bands}


def main() -> None:
    """Time one step and print it as JSON, with the peak of the process's memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.highres", description=main.__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("pixels", type=int)
    options = parser.parse_args()
    step = _steps(options.pixels, linear=options.provider != "softmax")[options.provider]
    times: list[float] = []
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        if options.pixels <= 1024:
            step()  # where the first run would weigh
        for _ in range(3 if options.pixels <= 1024 else 1):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    milliseconds = sorted(times)[len(times) // 2] * 1e3
    print(json.dumps({"ms": round(milliseconds, 1), "memory_mb": round(peak), "runs": len(times)}))


if __name__ == "__main__":
    main()
