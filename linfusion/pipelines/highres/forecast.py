"""Finding what a run will take before it starts: dry runs for memory, a few real ones for time."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linfusion.bands.bounded import bounded
from linfusion.bands.budget import Ledger, parse_bytes, weight_bytes
from linfusion.bands.vae import decode_rows, encode_rows
from linfusion.files.enlarged import Enlarged
from linfusion.files.picture_reader import bytes_needed
from linfusion.pipelines.highres.cascade import as_drawn, laid_aside
from linfusion.pipelines.highres.denoise import denoise
from linfusion.pipelines.highres.hosts import controlnets, denoiser, is_transformer, native_size
from linfusion.pipelines.highres.plan import Plan, Work
from linfusion.pipelines.highres.stages import Job, Stage
from linfusion.pipelines.state import Replay

LATENTS_HELD = 8  # copies that pipeline, scheduler and guidance hold while the UNet runs
PULLED = 6  # more in float32, that low-resolution guidance holds after the forward
_SECONDS = 1.0  # a forward that takes as long is one to extrapolate from


class Memory:
    """How a budget is shared: what is left for the engine when the rest has been taken.

    The rest is known before the run: the weights of the other models, the pictures and the latents
    that are held meanwhile. So the same budget gives the same bands in every run.

    Args:
        pipe: the pipeline.
        job: what it is to do.
        budget: for all of its models and what they hold; None for no limit.
    """

    def __init__(self, pipe: Any, job: Job, budget: int | None) -> None:
        self.job, self.budget = job, budget
        parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
        sizes = {k: weight_bytes(v) for k, v in parts.items()}
        self.weights = sum(sizes.values()) + laid_aside(pipe)
        self.of_vae = sizes["vae"]
        self.of_denoiser = weight_bytes(denoiser(pipe)) + sizes.get("controlnet", 0)
        self.itemsize = denoiser(pipe).dtype.itemsize
        self.unit, self.channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels

    def beside(self, what: str, height: int, width: int) -> int:
        """Bytes that are held beside the engine's model: see the class."""
        pixels = height * width
        if what == "denoise":
            latents = self.channels * pixels // self.unit**2 * self.itemsize
            controls = 0 if self.job.control is None else 3 * pixels * (4 + 2 * self.itemsize)
            if any(stage.pull for stage in self.job.stages):
                latents += PULLED * latents // LATENTS_HELD * 4 // self.itemsize
            return self.weights - self.of_denoiser + LATENTS_HELD * latents + controls
        others = self.weights - self.of_vae
        if what == "encode":  # Pillow's copy of the smaller picture, 4 bytes a pixel
            return others + 4 * self._before(height, width)
        if (height, width) == (self.job.height, self.job.width):
            output = self.job.output
            whole = output is None or output.suffix.lower() in (".jpg", ".jpeg")
            return others + (7 if output is None else 4) * pixels * whole
        return others + 3 * pixels

    def share(self, what: str, height: int, width: int) -> int | None:
        """The engine's budget."""
        if self.budget is None:
            return None
        left = self.budget - self.beside(what, height, width)
        return max(left, 1)

    def _before(self, height: int, width: int) -> int:
        sizes = [(s.height, s.width) for s in self.job.stages]
        at = sizes.index((height, width))
        if at:
            return math.prod(sizes[at - 1])
        return 0 if self.job.picture is None else math.prod(self.job.picture.shape[:2])


def forecast(
    pipe: Any, sibling: Any, job: Job, memory_budget: int | str | None, scratch: Path | None
) -> tuple[Work, ...]:
    """The pieces of a run and what each will take, from dry runs of the pipeline itself.

    Raises:
        ValueError: the budget, or the room in the scratch folder, is too small for any of them;
            the message names the smallest that would do.
    """
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    wanted = list(_pieces(job))
    with _encoding_once(pipe, sibling):
        found = [_dry(pipe, sibling, job, Memory(pipe, job, budget), scratch, *w) for w in wanted]
        if None in found:
            at = found.index(None)
            need = _smallest(pipe, sibling, job, scratch, wanted[at:], budget or 0)
            raise ValueError(
                f"memory_budget: got {memory_budget!r}; {job.width}×{job.height} needs at least"
                f" {math.ceil(need / 1e6)}MB"
                + ("" if scratch else ", or less with scratch=a folder")
            )
    works = tuple(w for w in found if w is not None)
    spill = max(w.scratch_bytes for w in works)
    if scratch is not None and spill > (free := shutil.disk_usage(scratch).free):
        raise ValueError(
            f"scratch: {scratch} has {free:,} bytes free; this needs {spill:,}, or a larger"
            " memory_budget"
        )
    return works


@contextlib.contextmanager
def _encoding_once(*pipes: Any) -> Iterator[None]:
    """Within, each pipeline encodes a prompt once: every dry run asks for it again."""
    known: dict[tuple[str, ...], Any] = {}

    def wrapped(encode: Callable[..., Any]) -> Callable[..., Any]:
        def once(*args: Any, **kwargs: Any) -> Any:
            key = (encode.__qualname__, repr(args), repr(kwargs))
            if key not in known:
                known[key] = encode(*args, **kwargs)
            return known[key]

        return once

    with contextlib.ExitStack() as undo:
        for pipe in pipes:
            before = pipe.__dict__.get("encode_prompt")
            undo.callback(_put_back, pipe, "encode_prompt", before)
            pipe.encode_prompt = wrapped(pipe.encode_prompt)
        yield


def _put_back(pipe: Any, name: str, value: Any) -> None:
    if value is None:
        delattr(pipe, name)
    else:
        setattr(pipe, name, value)


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


def engine_for(
    pipe: Any, memory: Memory, stage: Stage, scratch: Path | None, *, dry: bool = False
) -> Any:
    """`bounded` with what the budget leaves to a stage."""
    if is_transformer(pipe) and controlnets(pipe):
        return contextlib.nullcontext()  # HighResPipeline has refused a budget
    share = memory.share("denoise", stage.height, stage.width)
    return bounded(pipe, share, scratch=scratch, dry=dry)


def _pieces(job: Job) -> Iterator[tuple[str, Stage, int]]:
    """(what, stage that gives the size, steps) in the order of the run."""
    for i, stage in enumerate(job.stages):
        if stage.strength is not None:
            if i:
                yield "decode", job.stages[i - 1], 1
            yield "encode", stage, 1
        yield "denoise", stage, stage.steps
    if job.output is not None or job.output_type != "latent":
        yield "decode", job.stages[-1], 1


def _dry(
    pipe: Any,
    sibling: Any,
    job: Job,
    memory: Memory,
    scratch: Path | None,
    what: str,
    stage: Stage,
    steps: int,
) -> Work | None:
    """What a piece will take, or None where the budget is too small for it."""
    share = memory.share(what, stage.height, stage.width)
    try:
        ledger, _ = _run(pipe, sibling, job, memory, scratch, what, stage, dry=True)
    except ValueError as error:
        if share is not None and str(error).startswith("memory_budget:"):
            return None
        raise
    if share is not None and ledger.peak_bytes > share:
        return None
    return Work(
        what=what,
        height=stage.height,
        width=stage.width,
        strength=stage.strength if what == "denoise" else None,
        steps=steps,
        peak_bytes=ledger.peak_bytes + memory.beside(what, stage.height, stage.width),
        scratch_bytes=ledger.peak_on_disk,
        flops=ledger.flops * (job.passes if what == "denoise" else 1),
    )


class _Enough(Exception):
    """One forward was run."""


def _run(
    pipe: Any,
    sibling: Any,
    job: Job,
    memory: Memory,
    scratch: Path | None,
    what: str,
    stage: Stage,
    *,
    dry: bool,
) -> tuple[Ledger, float]:
    """One step, one decoding or one encoding at the size of a stage, and its seconds."""
    share = memory.share(what, stage.height, stage.width)
    latents = None if stage.strength is None and what == "denoise" else _latents(pipe, stage, dry)
    if what == "denoise":
        return _one_step(pipe, sibling, job, share, scratch, stage, latents, dry=dry)
    ledger = Ledger(weights_bytes=memory.of_vae)
    begun = time.perf_counter()
    if what == "decode":
        assert latents is not None
        for _ in decode_rows(pipe.vae, latents, memory_budget=share, ledger=ledger, dry=dry):
            pass
    else:
        picture = np.broadcast_to(np.uint8(127), (stage.height, stage.width, 3))
        encode_rows(pipe.vae, picture, memory_budget=share, ledger=ledger, dry=dry)
    return ledger, time.perf_counter() - begun


def _one_step(
    pipe: Any,
    sibling: Any,
    job: Job,
    share: int | None,
    scratch: Path | None,
    stage: Stage,
    latents: Tensor | None,
    *,
    dry: bool,
) -> tuple[Ledger, float]:
    """The pipeline's own call up to the end of its first forward, whose seconds count."""
    seconds = 0.0

    def first(forward: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        begun = time.perf_counter()
        forward(*args, **kwargs)
        seconds = time.perf_counter() - begun
        raise _Enough

    with as_drawn(pipe, job, stage), bounded(pipe, share, scratch=scratch, dry=dry) as ledger:
        try:
            denoise(
                pipe,
                sibling,
                job,
                stage,
                start=latents,
                # What a ControlNet sees does not matter, only its size.
                previous=Enlarged(np.zeros((8, 8, 3), np.uint8), stage.height, stage.width),
                generator=torch.Generator().manual_seed(0),
                replay=Replay(None),
                on_step=lambda *_: {},
                tensors=[],
                outside=first,
            )
        except _Enough:
            pipe.maybe_free_model_hooks()
    return ledger, seconds


def _latents(pipe: Any, stage: Stage, dry: bool) -> Tensor:
    shape = (1, pipe.vae.config.latent_channels, *latent_size(pipe, stage))
    make = torch.zeros if dry else torch.randn
    return make(shape).to(pipe._execution_device, latents_dtype(pipe))


def _smallest(
    pipe: Any,
    sibling: Any,
    job: Job,
    scratch: Path | None,
    pieces: list[tuple[str, Stage, int]],
    below: int,
) -> int:
    """The smallest budget that every piece fits in, within 2 %; `below` is known not to do."""

    def fits(budget: int, piece: tuple[str, Stage, int]) -> bool:
        memory = Memory(pipe, job, budget)
        return _dry(pipe, sibling, job, memory, scratch, *piece) is not None

    low = max(below, Memory(pipe, job, None).weights)
    for piece in sorted(pieces, key=lambda piece: -piece[1].height * piece[1].width):
        if low > below and fits(low, piece):
            continue
        high = 2 * low
        while not fits(high, piece):
            low, high = high, 2 * high
        while high > 1.02 * low:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle, piece) else (middle, high)
        low = high
    return low


def _paces(
    pipe: Any, sibling: Any, job: Job, memory: Memory, scratch: Path | None
) -> dict[str, Callable[[int], float]]:
    """For each kind of work, the seconds that so many flops take at large size."""
    last = job.stages[-1]
    paces = {}
    for what in ("denoise", "decode", "encode"):
        side = native_size(pipe)
        taken: list[tuple[int, float]] = []
        while True:
            at = replace(last, height=min(side, last.height), width=min(side, last.width))
            small = replace(job, stages=(at,))
            rest = Memory(pipe, small, memory.budget)
            if not taken:  # the first call of all sets things up
                _run(pipe, sibling, small, rest, scratch, what, at, dry=False)
            ledger, seconds = _run(pipe, sibling, small, rest, scratch, what, at, dry=False)
            taken.append((ledger.flops, seconds))
            if seconds > _SECONDS or side >= max(last.height, last.width):
                break
            side *= 2
        paces[what] = _line(taken)
    return paces


def _line(taken: list[tuple[int, float]]) -> Callable[[int], float]:
    """Seconds by flops, through the first and the last of what was measured."""
    (f0, s0), (f1, s1) = taken[0], taken[-1]
    slope = (s1 - s0) / (f1 - f0) if f1 > f0 and s1 > s0 else s1 / f1
    fixed = max(0.0, s1 - slope * f1)
    return lambda flops: fixed + slope * flops


def latent_size(pipe: Any, stage: Stage) -> tuple[int, int]:
    """Height and width of a stage's latents."""
    return stage.height // pipe.vae_scale_factor, stage.width // pipe.vae_scale_factor


def latents_dtype(pipe: Any) -> torch.dtype:
    """The dtype that the pipelines give to latents: that of the prompt's embedding."""
    encoders = (getattr(pipe, name, None) for name in ("text_encoder_2", "text_encoder"))
    return next((part for part in encoders if part is not None), denoiser(pipe)).dtype


def _resident() -> int:
    """Bytes that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss
