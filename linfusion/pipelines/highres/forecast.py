"""Finding what a run will take before it starts, by dry runs of the pipeline itself."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linfusion.bands.bounded import bounded
from linfusion.bands.budget import Ledger, parse_bytes, weight_bytes
from linfusion.bands.hollow import Hollow, hollow
from linfusion.bands.hosts import wait_for
from linfusion.bands.vae import decode_rows, encode_rows
from linfusion.files.enlarged import Enlarged
from linfusion.pipelines.highres.cascade import as_drawn, laid_aside
from linfusion.pipelines.highres.denoise import denoise
from linfusion.pipelines.highres.hosts import denoiser
from linfusion.pipelines.highres.plan import Work
from linfusion.pipelines.highres.stages import Job, Stage
from linfusion.pipelines.state import Replay

LATENTS_HELD = 8  # copies that pipeline, scheduler and guidance hold while the UNet runs
PULLED = 6  # more in float32, that low-resolution guidance holds after the forward


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


def engine_for(pipe: Any, memory: Memory, stage: Stage, scratch: Path | None) -> Any:
    """`bounded` with what the budget leaves to a stage; without one, the pipeline as it is."""
    share = memory.share("denoise", stage.height, stage.width)
    return contextlib.nullcontext() if share is None else bounded(pipe, share, scratch=scratch)


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
        ledger, _ = run_once(pipe, sibling, job, memory, scratch, what, stage, dry=True)
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


def run_once(
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
    """One step, one decoding or one encoding at the size of a stage, and its seconds.

    A dry run makes no large tensor; without a budget it counts what there is without bands.
    """
    share = memory.share(what, stage.height, stage.width)
    latents = None
    with Hollow() if dry else contextlib.nullcontext():
        if stage.strength is not None or what != "denoise":
            make = torch.zeros if dry else torch.randn
            shape = (1, pipe.vae.config.latent_channels, *latent_size(pipe, stage))
            latents = make(shape).to(pipe._execution_device, latents_dtype(pipe))
        if what == "denoise":
            return _one_step(pipe, sibling, job, share, scratch, stage, latents, dry=dry)
        assert latents is not None
    ledger = Ledger(weights_bytes=memory.of_vae)
    with Clock(pipe._execution_device) as clock:
        if what == "decode":
            for _ in decode_rows(pipe.vae, latents, memory_budget=share, ledger=ledger, dry=dry):
                pass
        else:
            picture = np.broadcast_to(np.uint8(127), (stage.height, stage.width, 3))
            encode_rows(pipe.vae, picture, memory_budget=share, ledger=ledger, dry=dry)
    return ledger, clock.seconds


class Clock:
    """Seconds of what is done within, also on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Clock:
        wait_for(self.device)
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        wait_for(self.device)
        self.seconds = time.perf_counter() - self.begun


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
    clock = Clock(pipe._execution_device)

    def first(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with clock:
            forward(*args, **kwargs)
        raise _Enough

    engine: Any = contextlib.nullcontext(Ledger())
    if dry or share is not None:
        engine = bounded(pipe, share, scratch=scratch, dry=dry, in_bands=share is not None)
    with as_drawn(pipe, job, stage), engine as ledger:
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
                as_shown=_blank,
            )
        except _Enough:
            pipe.maybe_free_model_hooks()
    return ledger, clock.seconds


def _blank(picture: Any) -> Tensor:
    """A picture of the same size, without its pixels."""
    return hollow((1, 3, *picture.shape[:2]), torch.float32, torch.device("cpu"))


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


def latent_size(pipe: Any, stage: Stage) -> tuple[int, int]:
    """Height and width of a stage's latents."""
    return stage.height // pipe.vae_scale_factor, stage.width // pipe.vae_scale_factor


def latents_dtype(pipe: Any) -> torch.dtype:
    """The dtype that the pipelines give to latents: that of the prompt's embedding."""
    encoders = (getattr(pipe, name, None) for name in ("text_encoder_2", "text_encoder"))
    return next((part for part in encoders if part is not None), denoiser(pipe)).dtype
