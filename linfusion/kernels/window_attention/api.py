"""Window attention as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from linfusion.kernels import library
from linfusion.kernels.library import without_autocast
from linfusion.kernels.window_attention import ops, reference
from linfusion.kernels.window_attention.cells import cell_grid
from linfusion.kernels.window_attention.common import SHAPES, bounded
from linfusion.kernels.window_attention.order import TileOrder

Pair = tuple[Tensor, Tensor]

IMPLEMENTATIONS = ("reference", "blocked", "triton")
HEAD_DIMS = (8, 128)  # what the Triton kernels are compiled and tested for


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
    _check_tokens(q, k, v)
    size = _grid(grid, q.shape[1])
    radius = _radius(radius)
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {SHAPES}, got {shape!r}")
    pairs = [
        _check_pair(pair, name, axes, q)
        for pair, name, axes in (
            (context, "context", "[B, T, H, D]"),
            (pooled, "pooled", "[B, P, H, D]"),
        )
        if pair is not None
    ]
    sides = _cells(cells, size, pooled)
    if scale is not None and (not _is_number(scale) or not math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    if order is not None and (not isinstance(order, TileOrder) or order.grid != size):
        got = f"that of {order.grid}" if isinstance(order, TileOrder) else type(order).__name__
        raise ValueError(f"order: expected None or the TileOrder of grid {size}, got {got}")
    impl = _implementation(impl, q)

    q, k, v, *rest = _autocast(q, k, v, *(x for pair in pairs for x in pair))
    k_all, v_all = (_joined(part, q) for part in (rest[::2], rest[1::2]))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
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


def _check_tensor(x: Tensor, name: str, axes: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {axes}, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 axes {axes}, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(
            f"{name}: expected a real floating dtype (float16, bfloat16, float32, float64), "
            f"got {x.dtype}"
        )
    if x.numel() == 0:
        raise ValueError(
            f"{name}: expected every axis of {axes} to be at least 1, got shape {tuple(x.shape)}"
        )


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        _check_tensor(x, name, "[B, N, H, D]")
        if x.shape != q.shape:
            raise ValueError(
                f"{name}: expected the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}"
            )
        _check_alike(x, name, q)


def _check_alike(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    # Autocast brings everything but float64 to one dtype.
    cast = torch.float64 not in (x.dtype, q.dtype) and _autocasts(q)
    if x.dtype != q.dtype and not cast:
        raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")


def _check_pair(pair: Pair, name: str, axes: str, q: Tensor) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        got = f"{len(pair)} entries" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise ValueError(f"{name}: expected a pair (k, v) of tensors {axes}, got {got}")
    for x, part in zip(pair, ("k", "v"), strict=True):
        _check_tensor(x, f"{name} {part}", axes)
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(
                f"{name} {part}: expected batch {q.shape[0]}, {q.shape[2]} heads and head "
                f"dimension {q.shape[3]} as in q, got shape {tuple(x.shape)}"
            )
        _check_alike(x, f"{name} {part}", q)
    k, v = pair
    if k.shape != v.shape:
        raise ValueError(
            f"{name}: expected keys and values of one shape, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    return k, v


def _grid(grid: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    size = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    whole = all(isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) for x in size)
    if len(size) not in (2, 3) or not whole or any(x < 1 for x in size):
        raise ValueError(f"grid: expected (h, w) or (t, h, w), positive integers, got {grid!r}")
    if math.prod(size) != tokens:
        raise ValueError(
            f"grid: expected one of the {tokens} tokens of q, got {size} of {math.prod(size)}"
        )
    return size


def _cells(
    cells: tuple[int, ...] | None, grid: tuple[int, ...], pooled: Pair | None
) -> tuple[int, ...]:
    if cells is None:
        return ()
    sides = tuple(cells) if isinstance(cells, (tuple, list, torch.Size)) else ()
    whole = all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in sides)
    if len(sides) != len(grid) or not whole:
        raise ValueError(
            f"cells: expected None or a positive integer for each axis of grid {grid}, "
            f"got {cells!r}"
        )
    if pooled is None:
        raise ValueError(f"cells: expected pooled tokens with cells {sides}, got none")
    count = math.prod(cell_grid(grid, sides))
    if pooled[0].shape[1] != count:
        raise ValueError(
            f"pooled: expected {count} tokens, one for each cell of {sides} of grid {grid}, got "
            f"{pooled[0].shape[1]}"
        )
    return sides


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _radius(radius: float) -> float:
    if not _is_number(radius) or not radius > 0:
        raise ValueError(f"radius: expected a number of tokens above 0, got {radius!r}")
    return float(radius)


def _implementation(impl: str | None, q: Tensor) -> str:
    fits = HEAD_DIMS[0] <= q.shape[3] <= HEAD_DIMS[1]
    double = q.dtype == torch.float64
    if impl is None:
        on_gpu = q.device.type == "cuda"  # ROCm calls itself cuda too
        return "triton" if on_gpu and library.HAS_TRITON and fits and not double else "blocked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if double:
            raise ValueError(
                "impl: 'triton' takes float16, bfloat16 and float32, got float64; 'blocked' and "
                "'reference' take it"
            )
        if not fits:
            raise ValueError(
                f"impl: 'triton' takes head dimensions from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got "
                f"{q.shape[3]}; 'blocked' and 'reference' take any"
            )
        library.check_triton(q.device)
    return impl


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    q = tensors[0]
    if q.dtype == torch.float64 or not _autocasts(q):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(q.device.type)) for x in tensors]


def _joined(parts: list[Tensor], q: Tensor) -> Tensor:
    if not parts:
        return q.new_empty(q.shape[0], 0, *q.shape[2:])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
