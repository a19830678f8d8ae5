"""Hybrid attention over frames of a video: softmax in chunks, what came before as a state."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.hybrid_attention.parts import (
    Pair,
    check_features,
    check_weight,
    join,
    state_of,
)
from linfusion.kernels.linear_attention.common import LinearState
from linfusion.kernels.window_attention import window_attention
from linfusion.kernels.window_attention.arguments import (
    autocast,
    check_tokens,
    checked_grid,
    implementation,
)


class ChunkState(NamedTuple):
    """What a stream remembers: its size does not depend on how many frames it has seen.

    Attributes:
        far: of all frames but the last, for the linear part; None before there are any.
        k, v: of the last frames [B, M, H, D], which softmax sees; M = 0 at first.
        phi_k, rotated_k: their features [B, M, H, F].
    """

    far: LinearState | None
    k: Tensor
    v: Tensor
    phi_k: Tensor
    rotated_k: Tensor


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    grid: tuple[int, int, int],
    frames: int,
    log_weight: Tensor,
    overlap: int = 0,
    rotated: Pair | None = None,
    context: Pair | None = None,
    scale: float | None = None,
    state: ChunkState | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ChunkState]:
    """Attention of chunks of frames to themselves, the frames just before, and a state of the past.

    The equation is that of `hybrid_attention` with other sets: of a query in a chunk of `frames`
    frames, S_i is its chunk, the `overlap` frames before it, and `context`; L_i is every frame
    before those (ReHyAt, arXiv 2601.04342). No frame sees a later chunk, every earlier token counts
    once, and the work a frame and what is remembered do not grow with the video.

    A video may come in several calls, each with the state that the last returned: if all but the
    last have a multiple of `frames` frames, the outputs are those of one call, up to rounding.
    Gradients flow through the state.

    Args:
        q, k, v: tokens of t frames [B, N, H, D] in raster order, one dtype, any strides.
        phi_q, phi_k: features [B, N, H, F], not negative; as for `hybrid_attention`.
        grid: (t, h, w) of N tokens.
        frames: of a chunk, at least 1; the last chunk of a call may have fewer.
        log_weight: log of the weight of the far part, [H].
        overlap: how many frames before its chunk a query sees by softmax, at least 0.
        rotated: features of the numerator, where they are others. Positions count from the start
            of the video, not of the call.
        context: keys and values [B, T, H, D] that every query sees: the text.
        scale: of the scores; None is D^-½.
        state: from the call for the frames before; None at the start.
        impl: "reference", "blocked", "triton" or None, as for `window_attention`.

    Returns:
        o [B, N, H, D] in the dtype of v, and the state after these frames.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
        ImportError: impl="triton" without triton.
    """
    check_tokens(q, k, v)
    size: Any = checked_grid(grid, q.shape[1])
    if len(size) != 3:
        raise ValueError(f"grid: expected (t, h, w), got {size}")
    for name, number, least in (("frames", frames, 1), ("overlap", overlap, 0)):
        if type(number) is not int or number < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}")
    check_weight(log_weight, q)
    features = check_features(q, phi_q, phi_k, rotated)
    impl = implementation(impl, q)
    q, k, v, phi_q, phi_k, rotated_q, rotated_k = autocast(q, k, v, *features)
    row = math.prod(size[1:])
    past = _start(k, v, phi_k, rotated_k) if state is None else _check_state(state, k, phi_k, row)
    found = []
    for first in range(0, size[0], frames):
        n = slice(first * row, min(first + frames, size[0]) * row)
        here = (n.stop - n.start) // row, *size[1:]
        before = (past.k, past.v) if past.k.shape[1] else None
        o, lse = window_attention(
            q[:, n], k[:, n], v[:, n], grid=here, radius=math.inf, context=context, pooled=before,
            scale=scale, return_lse=True, impl=impl,
        )  # fmt: skip
        if past.far is not None:
            read = phi_q[:, n], rotated_q[:, n]
            o, lse = join((o, lse), *read, past.far, log_weight, None, impl)
        found.append(o)
        past = _after(past, k[:, n], v[:, n], phi_k[:, n], rotated_k[:, n], overlap * row, impl)
    return torch.cat(found, 1), past


def _start(k: Tensor, v: Tensor, phi_k: Tensor, rotated_k: Tensor) -> ChunkState:
    return ChunkState(None, *(x[:, :0] for x in (k, v, phi_k, rotated_k)))


def _after(
    past: ChunkState,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    rotated_k: Tensor,
    kept: int,
    impl: str,
) -> ChunkState:
    """The state with a chunk more, of which the last `kept` tokens stay near."""
    same = rotated_k.data_ptr() == phi_k.data_ptr() and rotated_k.shape == phi_k.shape
    held = [
        torch.cat([old, new], 1) if old.shape[1] else new
        for old, new in zip(past[1:], (k, v, phi_k, rotated_k), strict=True)
    ]
    leaving = max(0, held[0].shape[1] - kept)
    far = past.far
    if leaving:
        _, v_far, phi_far, rotated_far = (x[:, :leaving] for x in held)
        state = state_of(phi_far, phi_far if same else rotated_far, v_far, impl)
        far = state if far is None else far.merge(state)
    return ChunkState(far, *(x[:, leaving:] for x in held))


def _check_state(state: ChunkState, k: Tensor, phi_k: Tensor, row: int) -> ChunkState:
    if not isinstance(state, ChunkState):
        raise ValueError(
            f"state: expected the ChunkState of the call before or None, got {type(state).__name__}"
        )
    for name, x, like in (("k", state.k, k), ("v", state.v, k), ("phi_k", state.phi_k, phi_k)):
        fits = (x.shape[0], *x.shape[2:]) == (like.shape[0], *like.shape[2:])
        if not fits or x.shape[1] % row or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"state.{name}: expected frames of {row} tokens that fit {tuple(like.shape)} "
                f"{like.dtype} on {like.device}, got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    return state
