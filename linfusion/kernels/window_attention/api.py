"""Window attention as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from linfusion.kernels.library import without_autocast
from linfusion.kernels.window_attention import ops, reference
from linfusion.kernels.window_attention.arguments import (
    Pair,
    autocast,
    check_pair,
    check_tokens,
    checked_cells,
    checked_grid,
    checked_scale,
    checked_window,
    implementation,
)
from linfusion.kernels.window_attention.common import bounded
from linfusion.kernels.window_attention.order import TileOrder


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int] | tuple[int, int, int],
    radius: float,
    shape: str = ...,
    context: Pair | None = ...,
    pooled: Pair | None = ...,
    cells: tuple[int, ...] | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    order: TileOrder | None = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int] | tuple[int, int, int],
    radius: float,
    shape: str = ...,
    context: Pair | None = ...,
    pooled: Pair | None = ...,
    cells: tuple[int, ...] | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    order: TileOrder | None = ...,
    impl: str | None = ...,
) -> Pair: ...


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int] | tuple[int, int, int],
    radius: float,
    shape: str = "disc",
    context: Pair | None = None,
    pooled: Pair | None = None,
    cells: tuple[int, ...] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    order: TileOrder | None = None,
    impl: str | None = None,
) -> Tensor | Pair:
    """Softmax attention of grid tokens to a window around each (Liu et al. 2024, CLEAR, eq. 4).

    o_i = Σ_j p_ij v_j,  p_ij = exp(scale · q_i·k_j - l_i),  l_i = log Σ_j exp(scale · q_i·k_j)

    over the tokens j with |p_i - p_j| < radius and all tokens of `context` and `pooled`. Scores and
    sums are float32 (float64 for float64 inputs). Under autocast the inputs are cast as
    `scaled_dot_product_attention` casts its own.

    A key or value that is not finite reaches the outputs of the tokens that see it alone, but with
    "triton": there it reaches the tiles of 64 tokens that its own tile is read for, as a mask
    multiplies by 0. Gradients have it wherever tiles are read, with every implementation.

    Outputs o, l and o', l' of the same queries over disjoint sets of keys merge exactly:
    (exp(l) o + exp(l') o') / (exp(l) + exp(l')).

    Args:
        q, k, v: tokens of the grid, [B, N, H, D], one dtype, any strides.
        grid: (h, w) or (t, h, w), of N tokens.
        radius: of the window, in tokens, above 0; the border is outside. A window larger than
            the grid is full attention.
        shape: "disc", dt² + dy² + dx² < radius², or "square", max(|dt|, |dy|, |dx|) < radius.
        context: keys and values [B, T, H, D] that every query sees: the text.
        pooled: keys and values [B, P, H, D] that every query sees: the image at low resolution.
        cells: sides of the cells of the grid whose averages the pooled tokens are, one for each
            axis: P is then Π ceil(size / side), cells in raster order. Each enters as the number
            of its tokens that the window of a query does not see, log of it on the score, and not
            at all where the window covers it: every token of the grid counts once (`cells`).
            None gives each pooled token the weight of one token, whatever the window sees, as
            CLEAR's authors do.
        scale: of the scores; None is D^-½.
        return_lse: also return the log-sum-exp l.
        order: the tile order that q, k and v lie in, and o and l will; None is raster order.
        impl: "reference" (a dense mask), "blocked" (tiles with their halos, any device), "triton"
            (CUDA, ROCm). None takes "triton" on a GPU that has it and "blocked" elsewhere. A
            named implementation is used or refused, never replaced by another.

    Returns:
        o [B, N, H, D] in the dtype of v, contiguous; with `return_lse`, (o, l) with l
        [B, N, H], natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
        ImportError: impl="triton" without triton.
    """
    if has_torch_function((q, k, v)):  # tensors that know better, as torch's own functions ask
        return handle_torch_function(
            window_attention, (q, k, v),  # type: ignore[arg-type]
            q, k, v, grid=grid, radius=radius, shape=shape,
            context=context, pooled=pooled, cells=cells, scale=scale, return_lse=return_lse,
            order=order, impl=impl,
        )  # fmt: skip
    check_tokens(q, k, v)
    size = checked_grid(grid, q.shape[1])
    radius = checked_window(radius, shape)
    pairs = [
        check_pair(pair, name, axes, q)
        for pair, name, axes in (
            (context, "context", "[B, T, H, D]"),
            (pooled, "pooled", "[B, P, H, D]"),
        )
        if pair is not None
    ]
    sides = checked_cells(cells, size, pooled)
    scale = checked_scale(scale, q.shape[3])
    if order is not None and (not isinstance(order, TileOrder) or order.grid != size):
        got = f"that of {order.grid}" if isinstance(order, TileOrder) else type(order).__name__
        raise ValueError(f"order: expected None or the TileOrder of grid {size}, got {got}")
    impl = implementation(impl, q)

    q, k, v, *rest = autocast(q, k, v, *(x for pair in pairs for x in pair))
    k_all, v_all = (_joined(part, q) for part in (rest[::2], rest[1::2]))
    if impl == "reference":
        o, lse = _reference(q, k, v, k_all, v_all, size, radius, shape, scale, order, sides)
    else:
        o, lse = ops.window_attention(
            q, k, v, k_all, v_all, size, radius, shape, scale, order is not None, sides, impl
        )
    return (o, lse) if return_lse else o


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    order: TileOrder | None,
    cells: tuple[int, ...],
) -> Pair:
    if order is not None:
        q, k, v = (order.undo(x) for x in (q, k, v))
    with without_autocast(q.device):
        o, lse = reference.attention(
            q, k, v, k_all, v_all, grid, bounded(radius, grid), shape, scale, cells
        )
    return (o, lse) if order is None else (order.permute(o), order.permute(lse))


def _joined(parts: list[Tensor], q: Tensor) -> Tensor:
    if not parts:
        return q.new_empty(q.shape[0], 0, *q.shape[2:])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
