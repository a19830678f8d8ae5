"""Window attention as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linfusion.kernels.linear_attention.common import without_autocast
from linfusion.kernels.window_attention import reference
from linfusion.kernels.window_attention.common import SHAPES

Pair = tuple[Tensor, Tensor]

IMPLEMENTATIONS = ("reference",)


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
    scale: float | None = None,
    return_lse: bool = False,
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
        q, k, v: tokens of the grid in raster order, [B, N, H, D], one dtype, any strides.
        grid: (h, w) or (t, h, w), of N tokens.
        radius: of the window, in tokens, above 0; the border is outside. A window larger than
            the grid is full attention.
        shape: "disc", dt² + dy² + dx² < radius², or "square", max(|dt|, |dy|, |dx|) < radius.
        context: keys and values [B, T, H, D] that every query sees: the text.
        pooled: keys and values [B, P, H, D] that every query sees: the image at low resolution.
        scale: of the scores; None is D^-½.
        return_lse: also return the log-sum-exp l.
        impl: "reference" (a dense mask). A named implementation is used or refused, never
            replaced by another.

    Returns:
        o [B, N, H, D] in the dtype of v, contiguous; with `return_lse`, (o, l) with l
        [B, N, H], natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
    """
    _check_tokens(q, k, v)
    size = _grid(grid, q.shape[1])
    radius = _radius(radius, size)
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
    if scale is not None and (not _is_number(scale) or not math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    _implementation(impl)

    q, k, v, *rest = _autocast(q, k, v, *(x for pair in pairs for x in pair))
    everywhere = None
    if rest:
        everywhere = (_joined(rest[::2]), _joined(rest[1::2]))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    with without_autocast(q.device):
        o, lse = reference.attention(q, k, v, everywhere, size, radius, shape, scale)
    return (o, lse) if return_lse else o


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


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _radius(radius: float, grid: tuple[int, ...]) -> float:
    if not _is_number(radius) or not radius > 0:
        raise ValueError(f"radius: expected a number of tokens above 0, got {radius!r}")
    # No two tokens are as far apart as the sum of the sides: from there on all windows are alike.
    return float(min(radius, sum(grid)))


def _implementation(impl: str | None) -> str:
    if impl is None:
        return "reference"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected None or one of {IMPLEMENTATIONS}, got {impl!r}")
    return impl


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    q = tensors[0]
    if q.dtype == torch.float64 or not _autocasts(q):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(q.device.type)) for x in tensors]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
