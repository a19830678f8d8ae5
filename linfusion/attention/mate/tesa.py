"""TESA, temporal swin attention (Wang et al. 2024, LinGen, arXiv:2412.09856, section 3).

Softmax attention inside small windows of the video, longer in time than in space, which every
second layer moves by half a window. Windows that a border cuts are attended at the size they have:
there is no padding and no mask, so that every backend of diffusers serves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linfusion.attention.mamba2.qk_norms import normed

SHIFT_MODES = ("pad", "roll")


class _Run(NamedTuple):
    """`many` windows of `length` in a row along one axis; keys start `before` it."""

    start: int
    length: int
    many: int
    before: int = 0

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.many * self.length)


class TESA(nn.Module):
    """Attention inside windows of a video; the keys of its state are those of diffusers' Attention.

    With `start`, the video comes in blocks of frames: windows stand still in absolute time, and a
    token sees those of its window that are in its own block or an earlier one.

    Args:
        d_model: channels C.
        num_heads: heads; they divide C.
        window: (t, h, w) in tokens. Cut to the grid; what it cuts along an axis does not move.
        shift: whether the windows are moved by half of themselves along every axis.
        shift_mode: where moved windows begin, as if the grid were padded in front by half a window
            ("pad", the first has window - window // 2 tokens), or as Swin's cyclic shift whose
            wrapped windows are masked apart ("roll", the first has window // 2). The same for even
            windows.
        qk_norm: root-mean-square norm of the queries and keys of each head.
        bias: whether to_q, to_k and to_v have one.

    Raises:
        ValueError: a value that is out of range; the message names it and what is accepted.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        window: tuple[int, int, int] = (8, 4, 4),
        shift: bool = False,
        shift_mode: str = "pad",
        qk_norm: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if type(num_heads) is not int or num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads: got {num_heads!r}, expected a divisor of {d_model}")
        self.heads, self.window = num_heads, window
        self.outside = outside_of(window, shift, shift_mode)
        self.to_q = nn.Linear(d_model, d_model, bias=bias)
        self.to_k = nn.Linear(d_model, d_model, bias=bias)
        self.to_v = nn.Linear(d_model, d_model, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(d_model, d_model)])
        head = d_model // num_heads
        self.norm_q = nn.RMSNorm(head, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(head, eps=1e-6) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        past: Tensor | None = None,
        start: int | None = None,
        blocks: Sequence[int] | None = None,
        shard: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, T, H, W, C]; with `start`, one block of frames, or several.
            past: frames that came before, [B, F, H, W, C], F at least `reach(start)`.
            start: how many frames came before. None: x is the whole video.
            blocks: frames of each block, T in all; with `start` alone. None: one block.
            shard: `linfusion.parallel.Shard`, where x is rows of a video that others have more of.

        Returns:
            [B, T, H, W, C].

        Raises:
            ValueError: x, the past or blocks have other shapes, or the past is too short.
        """
        if x.dim() != 5 or x.shape[-1] != self.to_q.in_features:
            raise ValueError(
                f"x: expected [B, T, H, W, {self.to_q.in_features}], got {tuple(x.shape)}"
            )
        if past is not None and (start is None or past[:, :0].shape != x[:, :0].shape):
            raise ValueError(
                f"past: got {tuple(past.shape)} with start {start}, expected frames like those of"
                f" x, {tuple(x.shape)}, and a start"
            )
        frames = x.shape[1]
        if blocks is not None:
            fit = sum(blocks) == frames and all(size > 0 for size in blocks)
            if start is None or not fit:
                raise ValueError(
                    f"blocks: got {tuple(blocks)} with start {start}, expected {frames} frames in"
                    " all, and a start"
                )
        seen = 0 if start is None else self.reach(start)
        source = x
        if seen:
            if past is None or past.shape[1] < seen:
                got = "none" if past is None else past.shape[1]
                raise ValueError(f"past: got {got} frames, expected at least {seen}")
            source = torch.cat([past[:, -seen:].to(x.dtype), x], 1)
        q, k, v = (
            project(t).unflatten(-1, (self.heads, -1))
            for project, t in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        if self.norm_q is not None and self.norm_k is not None:
            q, k = normed(self.norm_q, q), normed(self.norm_k, k)
        outside, crop = self.outside, _as_it_is
        if shard is not None:
            q, k, v, above, crop = shard.whole_windows(q, k, v, self.window[1], outside[1])
            outside = outside[0], above, outside[2]
        time, *rest = (
            _whole(size, window, before)
            for size, window, before in zip(q.shape[1:4], self.window, outside, strict=True)
        )
        if start is None:
            return self.to_out[0](crop(_attend(q, k, v, [time, *rest])).flatten(4))
        parts, at = [], 0
        for size in (frames,) if blocks is None else blocks:
            time = _block(size, self.window[0], self.outside[0], start + at)
            here, keys = slice(at, at + size), slice(seen + at - time[0].before, seen + at + size)
            parts.append(_attend(q[:, here], k[:, keys], v[:, keys], [time, *rest]))
            at += size
        return self.to_out[0](crop(torch.cat(parts, 1)).flatten(4))

    def reach(self, start: int) -> int:
        """Frames that a block sees of those before it, if its own first one is `start`."""
        return min((start + self.outside[0]) % self.window[0], start)


def outside_of(window: tuple[int, int, int], shift: bool, shift_mode: str) -> tuple[int, int, int]:
    """How much of the first window lies before the grid, along every axis.

    Raises:
        ValueError: as for `TESA`.
    """
    if len(window) != 3 or any(type(w) is not int or w < 1 for w in window):
        raise ValueError(f"window: got {window!r}, expected three positive whole numbers")
    if shift_mode not in SHIFT_MODES:
        raise ValueError(f"shift_mode: got {shift_mode!r}, expected one of {SHIFT_MODES}")
    t, h, w = (size // 2 if shift else 0 for size in window)
    if shift_mode == "pad":
        return t, h, w
    return -t % window[0], -h % window[1], -w % window[2]


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int, int],
    outside: tuple[int, int, int],
    *,
    context: tuple[Tensor, Tensor] | None = None,
    backend: Any = None,
    shard: Any = None,
) -> Tensor:
    """Softmax attention inside the windows of a whole video.

    Args:
        q, k, v: [B, T, H, W, heads, D].
        window: (t, h, w), as for `TESA`.
        outside: as `outside_of` gives it.
        context: keys and values [B, M, heads, D] that every window sees besides its own.
        backend: of diffusers' `dispatch_attention_fn`.
        shard: `linfusion.parallel.Shard`, where these are rows of a video that others have more of.

    Returns:
        [B, T, H, W, heads, D].
    """
    crop = _as_it_is
    if shard is not None:
        q, k, v, above, crop = shard.whole_windows(q, k, v, window[1], outside[1])
        outside = outside[0], above, outside[2]
    runs = [
        _whole(size, length, before)
        for size, length, before in zip(q.shape[1:4], window, outside, strict=True)
    ]
    return crop(_attend(q, k, v, runs, context, backend))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: list[list[_Run]],
    context: tuple[Tensor, Tensor] | None = None,
    backend: Any = None,
) -> Tensor:
    """Every window of the product of runs: q [B, T, H, W, heads, D] -> the same shape.

    k and v may have more frames, in front.
    """
    ahead = k.shape[1] - q.shape[1]
    slabs = []
    for t in runs[0]:
        slab = q[:, t.tokens]
        seen = slice(t.tokens.start + ahead - t.before, t.tokens.stop + ahead)
        keys, values = k[:, seen], v[:, seen]
        rows = []
        for h in runs[1]:
            parts = []
            for w in runs[2]:
                area = (slice(None), slice(None), h.tokens, w.tokens)
                kv = keys[area], values[area]
                parts.append(_windows(slab[area], kv, (t, h, w), context, backend))
            rows.append(_joined(parts, 3))
        slabs.append(_joined(rows, 2))
    return _joined(slabs, 1)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _windows(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    runs: tuple[_Run, _Run, _Run],
    context: tuple[Tensor, Tensor] | None,
    backend: Any,
) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    t, h, w = runs
    counts = (t.many, h.many, w.many)

    def split(x: Tensor) -> Tensor:
        """[B, T, H, W, heads, D] -> [B · windows, tokens, heads, D]."""
        frames = x.shape[1] // t.many
        x = x.unflatten(3, (w.many, w.length)).unflatten(2, (h.many, h.length))
        x = x.unflatten(1, (t.many, frames)).permute(0, 1, 3, 5, 2, 4, 6, 7, 8)
        return x.reshape(-1, frames * h.length * w.length, *x.shape[-2:])

    k, v = split(kv[0]), split(kv[1])
    if context is not None:  # before each window, whose batch is the outer index
        many = len(k) // len(q)
        k, v = (
            torch.cat([seen.repeat_interleave(many, 0), own], 1)
            for seen, own in zip(context, (k, v), strict=True)
        )
    out: Tensor = dispatch_attention_fn(split(q), k, v, backend=backend)
    out = out.unflatten(1, (t.length, h.length, w.length)).unflatten(0, (-1, *counts))
    return out.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _whole(size: int, window: int, outside: int) -> list[_Run]:
    """Windows along an axis that is known from end to end."""
    if size <= window:
        return [_Run(0, size, 1)]
    return _cut(size, window, window - outside)


def _block(size: int, window: int, outside: int, start: int) -> list[_Run]:
    """Windows along time of a block whose first frame is `start`; the first may have begun before.

    Where there are no frames before the start of the video, none are seen.
    """
    inside = (start + outside) % window
    first, *rest = _cut(size, window, min(window - inside, size))
    if not inside:
        return [first, *rest]
    head = _Run(0, first.length, 1, min(inside, start))
    assert first.many == 1
    return [head, *rest]


def _cut(size: int, window: int, first: int) -> list[_Run]:
    """`size` tokens in windows, of which the first has `first`: at most three runs."""
    runs = [_Run(0, first, 1)] if first < window else []
    start = first % window
    whole, left = divmod(size - start, window)
    if whole:
        runs.append(_Run(start, window, whole))
    if left:
        runs.append(_Run(size - left, left, 1))
    return runs
