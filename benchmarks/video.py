"""The zoo's video transformer with random weights: its growth, its softmax twin, its stream.

64 tokens a frame, blocks of 4 frames, one clip. The twin has full softmax attention, block-causal
as well, where the model has MATE; while it streams it keeps keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Row, compare, in_turns, machine
from linfusion.models import LinGenTransformer3DModel, StreamState

BLOCK, SIDE, TEXT = 4, 16, 128
MIXERS = ("softmax", "mate")
FRAMES = (64, 128, 256, 512, 1024)


def _build(mixer: str) -> LinGenTransformer3DModel:
    torch.manual_seed(0)
    return LinGenTransformer3DModel(
        in_channels=4,
        patch_size=(1, 2, 2),
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        text_dims=(TEXT,),
        mlp_ratio=3.0,
        pos_embed_size=(3 * BLOCK, 8, 8),
        d_state=32,
        expand=1,
        tesa_window=(16, 4, 4),
        causal_blocks=True,
        block_frames=BLOCK,
        time_positions="block",
        self_attention=mixer,
    ).eval()


def _clip(frames: int) -> tuple[Tensor, float, Tensor]:
    """Latents, a timestep and the text."""
    torch.manual_seed(0)
    return torch.randn(1, 4, frames, SIDE, SIDE), 500.0, torch.randn(1, 32, TEXT)


def growth() -> Iterator[list[Row]]:
    """One step of a whole clip: `speedup` is the time of a frame against that of the shortest."""
    model = _build("mate")
    runs: dict[int, Callable[[], object]] = {n: partial(model, *_clip(n)) for n in FRAMES}
    rows = in_turns("video frame", torch.float32, "mate", runs, runs=5)
    per_frame = [row.ms / row.size for row in rows]
    for row, cost in zip(rows, per_frame, strict=True):
        row.speedup = round(per_frame[0] / cost, 2)
    yield rows


def step() -> Iterator[list[Row]]:
    """One step of a whole clip against the twin."""
    models = {mixer: _build(mixer) for mixer in MIXERS}
    for frames in (64, 256, 1024):
        runs = {mixer: partial(model, *_clip(frames)) for mixer, model in models.items()}
        yield compare(
            "video step", frames, torch.float32, runs, runs=3 if frames < 1024 else 1, warm=False
        )


def block() -> Iterator[list[Row]]:
    """One step of a block of a stream, after as many frames, against the twin."""
    models = {mixer: _build(mixer) for mixer in MIXERS}
    states = {mixer: StreamState() for mixer in MIXERS}
    noisy, timestep, text = _clip(BLOCK)
    for frames in (64, 256, 1020):
        for mixer, model in models.items():
            while states[mixer].frames < frames:
                model.commit(noisy, text, state=states[mixer])
        runs = {
            mixer: partial(model, noisy, timestep, text, state=states[mixer])
            for mixer, model in models.items()
        }
        yield compare("video block", frames, torch.float32, runs, runs=9)


def stream() -> Iterator[list[Row]]:
    """Streams of 4 and of 40 blocks, one step and a commit each: tensors beside the weights."""
    for mixer in MIXERS:
        model = _build(mixer)
        rows: list[Row] = []
        for blocks in (4, 40):
            run = partial(_stream, model, blocks)
            run()
            start = time.perf_counter()
            run()
            seconds, peak = time.perf_counter() - start, _peak_bytes(run)
            first = rows[0].memory_mb if rows else peak / 2**20
            rows.append(
                Row(
                    kernel="stream",
                    provider=mixer,
                    size=blocks,
                    dtype="float32",
                    ms=round(seconds * 1e3, 3),
                    memory_mb=round(peak / 2**20, 3),
                    speedup=round(rows[0].ms / seconds / 1e3, 2) if rows else 1.0,
                    memory_ratio=round(peak / 2**20 / first, 3),
                    error=None,
                    runs=1,
                    machine=machine(),
                )
            )
        yield rows


def _stream(model: LinGenTransformer3DModel, blocks: int) -> None:
    """What it makes is dropped block by block."""
    state = StreamState()
    for _ in range(blocks):
        noisy, timestep, text = _clip(BLOCK)
        with state.frozen():
            clean = model(noisy, timestep, text, state=state).sample
        model.commit(clean, text, state=state)


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made in `run` had at a time, those inside operators too."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
