"""One progress bar for a run of several stages, by the work that is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from linfusion.pipelines.highres.stages import Job, Stage

_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


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
