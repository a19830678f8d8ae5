"""Window attention, 8 heads × 64, against compiled `flex_attention` and against SDPA.

FlexAttention is used as CLEAR's authors use it: tokens in raster order, its own blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, compare, in_turns
from linfusion.kernels import window_attention

HEADS, DIM = 8, 64
DTYPES = (torch.float32, torch.bfloat16)


def _tokens(side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, side * side, HEADS, DIM).to(dtype)
    return q, k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _seen(side: int, radius: int, queries: Tensor) -> Tensor:
    """Which of all tokens the queries see, [queries, side²]."""
    at = torch.arange(side * side)
    dy = queries[:, None] // side - at // side
    dx = queries[:, None] % side - at % side
    return dy * dy + dx * dx < radius * radius


def _flex(side: int, radius: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The authors' way: compiled for this size, with its block mask at hand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dy, dx = q // side - k // side, q % side - k % side
        return dy * dy + dx * dx < radius * radius

    n = side * side
    block_mask = torch.compile(create_block_mask)(seen, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # as their processor has them
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return run


def _errors(
    rivals: dict[str, Callable[..., Tensor]],
    x: tuple[Tensor, Tensor, Tensor],
    side: int,
    radius: int,
) -> dict[str, float]:
    """Against float64, for 64 queries of all."""
    queries = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))[:64]
    q, k, v = (t.double() for t in x)
    truth = _sdpa(q[:, queries], k, v, _seen(side, radius, queries))
    found = {name: run(*x)[:, queries].double() for name, run in rivals.items()}
    return {name: ((o - truth).norm() / truth.norm()).item() for name, o in found.items()}


def flex() -> Iterator[list[Row]]:
    """Against FlexAttention at 128 × 128 tokens; both are warm, transposes are the rival's own."""
    for radius in (8, 16):
        for dtype in DTYPES:
            side = 128
            ours = partial(window_attention, grid=(side, side), radius=radius)
            rivals = {"flex": _flex(side, radius), "blocked": ours}
            x = _tokens(side, dtype)
            errors = _errors(rivals, x, side, radius)
            runs = {name: partial(f, *x) for name, f in rivals.items()}
            yield compare(f"window {radius}", side * side, dtype, runs, runs=5, errors=errors)


def softmax() -> Iterator[list[Row]]:
    """Against SDPA at 64 × 64 tokens: without a mask for time, with the dense one for memory."""
    side, radius = 64, 8
    mask = _seen(side, radius, torch.arange(side * side))  # its own memory is not counted
    for dtype in DTYPES:
        x = _tokens(side, dtype)
        ours = partial(window_attention, *x, grid=(side, side), radius=radius)
        yield compare(
            "softmax", side * side, dtype, {"sdpa": partial(_sdpa, *x), "blocked": ours}, runs=9
        )
        dense = partial(_sdpa, *x, mask)
        yield compare("dense mask", side * side, dtype, {"sdpa": dense, "blocked": ours}, runs=5)


def scaling() -> Iterator[list[Row]]:
    """Time per token as the grid grows: `speedup` is against the per-token time of the smallest."""
    for dtype in DTYPES:
        runs: dict[int, Callable[[], object]] = {
            side * side: partial(
                window_attention, *_tokens(side, dtype), grid=(side, side), radius=8
            )
            for side in (64, 128, 256, 512)
        }
        rows = in_turns("window grid", dtype, "blocked", runs, runs=7)
        per_token = [row.ms / row.size for row in rows]
        for row, cost in zip(rows, per_token, strict=True):
            row.speedup = round(per_token[0] / cost, 2)
        yield rows
