"""How long a run takes: a few real steps say it before, one bar for all stages shows it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from linfusion.bands.budget import parse_bytes
from linfusion.files.picture_reader import bytes_needed
from linfusion.pipelines.arguments import pixel_multiple
from linfusion.pipelines.highres.cascade import pooled_by
from linfusion.pipelines.highres.forecast import Memory, forecast, run_once
from linfusion.pipelines.highres.hosts import native_size
from linfusion.pipelines.highres.plan import Plan
from linfusion.pipelines.highres.stages import Job, Stage

_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_SECONDS = 1.0  # a step that takes as long is one to extrapolate from


def make_plan(
    pipe: Any,
    sibling: Any,
    job: Job,
    memory_budget: int | str | None,
    scratch: Path | None,
    *,
    measure: bool,
) -> Plan:
    """`forecast`, and with `measure` the time, from a few forwards at small size."""
    works = forecast(pipe, sibling, job, memory_budget, scratch)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    memory = Memory(pipe, job, budget)
    if measure:
        paces = _paces(pipe, sibling, job, memory, scratch)
        works = tuple(replace(w, seconds=w.steps * paces[w.what](w.flops)) for w in works)
    on_cpu = pipe._execution_device.type == "cpu"
    output = job.output
    return Plan(
        work=works,
        weights_bytes=memory.weights,
        process_bytes=max(0, _resident() - memory.weights) if on_cpu else 0,
        memory_budget=budget,
        output_bytes=None if output is None else bytes_needed(output, job.width, job.height),
        free_bytes=None if output is None else shutil.disk_usage(output.parent).free,
    )


def _paces(
    pipe: Any, sibling: Any, job: Job, memory: Memory, scratch: Path | None
) -> dict[str, Callable[[int], float]]:
    """For each kind of work, the seconds that so many flops take.

    Two sizes at least: what a step costs whatever its size must not be carried to all of them.
    """
    last = job.stages[-1]
    unit = pixel_multiple(pipe) * pooled_by(pipe)
    paces = {}
    for what in ("denoise", "decode", "encode"):
        side = max(unit, native_size(pipe) // 2 // unit * unit)
        taken: list[tuple[int, float]] = []
        while True:
            at = replace(last, height=min(side, last.height), width=min(side, last.width))
            small = replace(job, stages=(at,))
            rest = Memory(pipe, small, memory.budget)
            ledger, _ = run_once(pipe, sibling, small, rest, scratch, what, at, dry=True)
            # The better of two: the first sets things up.
            seconds = min(
                run_once(pipe, sibling, small, rest, scratch, what, at, dry=False)[1]
                for _ in range(2)
            )
            taken.append((ledger.flops, seconds))
            enough = seconds > _SECONDS and len(taken) > 1
            if enough or side >= max(last.height, last.width):
                break
            side *= 2
        paces[what] = line(taken)
    return paces


def line(taken: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Seconds by flops: the line s = a + b f with a, b ≥ 0 of least relative squares."""
    weights = [1 / seconds**2 for _, seconds in taken]

    def total(*factors: int) -> float:
        """Σ w f^i s^j, for (i, j)."""
        i, j = factors
        return sum(w * f**i * s**j for w, (f, s) in zip(weights, taken, strict=True))

    determinant = total(0, 0) * total(2, 0) - total(1, 0) ** 2
    slope = fixed = 0.0
    if determinant > 1e-9 * total(0, 0) * total(2, 0):  # more than one size
        slope = (total(0, 0) * total(1, 1) - total(1, 0) * total(0, 1)) / determinant
        fixed = (total(0, 1) - slope * total(1, 0)) / total(0, 0)
    if slope <= 0 or fixed < 0:
        flops, seconds = max(taken)
        slope, fixed = seconds / flops, 0.0
    return lambda flops: fixed + slope * flops


def step_weight(job: Job, stage: Stage) -> float:
    """Work of a step in megapixels."""
    passes = 2 if job.steers and stage.strength is not None else 1
    return passes * stage.height * stage.width / 1e6


def decode_weight(job: Job) -> float:
    """Work of the last decoding, in the same unit; about that of two steps."""
    return 2 * job.height * job.width / 1e6


def advance(bar: tqdm, weight: float) -> None:
    bar.update(min(weight, bar.total - bar.n))


@contextlib.contextmanager
def progress(pipe: Any, job: Job) -> Iterator[tqdm]:
    """One bar for the whole run, as the pipeline's own are configured."""
    total = sum(step_weight(job, stage) * stage.steps for stage in job.stages)
    if job.output is not None or job.output_type != "latent":
        total += decode_weight(job)
    config = {"bar_format": _BAR, **getattr(pipe, "_progress_bar_config", {})}
    with tqdm(total=total, **config) as bar:
        yield bar


def _resident() -> int:
    """Bytes that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss
