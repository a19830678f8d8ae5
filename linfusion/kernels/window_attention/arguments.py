"""What window attention asks of its arguments, and hybrid attention with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linfusion.kernels import common
from linfusion.kernels.common import accumulator, check_device, check_tensor
from linfusion.kernels.window_attention.cells import cell_grid
from linfusion.kernels.window_attention.common import SHAPES

Pair = tuple[Tensor, Tensor]

HEAD_DIMS = (8, 128)  # what the Triton kernels are compiled and tested for


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where q, k and v are not [B, N, H, D], all alike."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_tensor(x, name, "[B, N, H, D]")
        if x.shape != q.shape:
            raise ValueError(
                f"{name}: expected the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}"
            )
        check_alike(x, name, q)


def check_alike(x: Tensor, name: str, q: Tensor) -> None:
    """Raise ValueError where x has another device or dtype than q."""
    check_device(x, name, q, "q")
    if x.dtype == q.dtype:
        return
    # Autocast brings everything but float64 to one dtype.
    if torch.float64 in (x.dtype, q.dtype) or not _autocasts(q):
        raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")


def check_pair(pair: Pair, name: str, axes: str, q: Tensor) -> Pair:
    """Keys and values that every query sees.

    Raises:
        ValueError: they are not a pair of tensors that fit q.
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        got = f"{len(pair)} entries" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise ValueError(f"{name}: expected a pair (k, v) of tensors {axes}, got {got}")
    for x, part in zip(pair, ("k", "v"), strict=True):
        check_tensor(x, f"{name} {part}", axes)
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(
                f"{name} {part}: expected batch {q.shape[0]}, {q.shape[2]} heads and head "
                f"dimension {q.shape[3]} as in q, got shape {tuple(x.shape)}"
            )
        check_alike(x, f"{name} {part}", q)
    k, v = pair
    if k.shape != v.shape:
        raise ValueError(
            f"{name}: expected keys and values of one shape, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    return k, v


def checked_grid(grid: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """The grid as a tuple.

    Raises:
        ValueError: it is no grid, or not one of that many tokens.
    """
    size = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    whole = all(isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) for x in size)
    if len(size) not in (2, 3) or not whole or any(x < 1 for x in size):
        raise ValueError(f"grid: expected (h, w) or (t, h, w), positive integers, got {grid!r}")
    if math.prod(size) != tokens:
        raise ValueError(
            f"grid: expected one of the {tokens} tokens of q, got {size} of {math.prod(size)}"
        )
    return size


def checked_cells(
    cells: tuple[int, ...] | None, grid: tuple[int, ...], pooled: Pair | None
) -> tuple[int, ...]:
    """The sides of cells, none without `cells`.

    Raises:
        ValueError: they are no cells of the grid, or the pooled tokens are not theirs.
    """
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


def checked_window(radius: float, shape: str) -> float:
    """The radius as a float.

    Raises:
        ValueError: it, or the shape, is none.
    """
    if not _is_number(radius) or not radius > 0:
        raise ValueError(f"radius: expected a number of tokens above 0, got {radius!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {SHAPES}, got {shape!r}")
    return float(radius)


def checked_scale(scale: float | None, dim: int) -> float:
    """The scale of scores.

    Raises:
        ValueError: it is neither a finite number nor None.
    """
    if scale is not None and (not _is_number(scale) or not math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    return dim**-0.5 if scale is None else float(scale)


def implementation(impl: str | None, q: Tensor) -> str:
    """The implementation that runs (`common.implementation`)."""

    def unfit() -> str | None:
        if HEAD_DIMS[0] <= q.shape[3] <= HEAD_DIMS[1]:
            return None
        return (
            f"'triton' takes head dimensions from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got "
            f"{q.shape[3]}"
        )

    return common.implementation(impl, q, accumulator(q), unfit)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as `scaled_dot_product_attention` casts its own; the first decides."""
    q = tensors[0]
    if q.dtype == torch.float64 or not _autocasts(q):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(q.device.type)) for x in tensors]


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
