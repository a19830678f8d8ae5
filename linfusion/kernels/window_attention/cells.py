"""Pooled tokens that enter a window's softmax with the number of tokens they stand for.

A grid is cut in cells, and a cell is summed up by one key k̄_c and one value v̄_c, the averages of
its tokens. With n_ic tokens of cell c outside the window of query i,

    o_i = (Σ_j exp(s_ij) v_j + Σ_c n_ic exp(scale · q_i·k̄_c) v̄_c) / (the same without values)

over the tokens j in the window: a cell enters as n_ic equal tokens, that is with log n_ic on its
score. A cell that the window covers has n_ic = 0 and is left out, one that lies across the border
counts by its tokens outside, and one at a far edge of the grid, where it is cut short, by those it
has. Every token of the grid so counts once: in the window as itself, outside by its cell. It is
the order 0 of the expansion about cells (PISA, arXiv 2602.01077), for windows of single tokens.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.window_attention.common import reach, window


def cell_grid(grid: tuple[int, ...], cells: tuple[int, ...]) -> tuple[int, ...]:
    """How many cells there are along each axis; the last may be cut short."""
    return tuple(-(-size // side) for size, side in zip(grid, cells, strict=True))


def pool(x: Tensor, grid: tuple[int, ...], cells: tuple[int, ...]) -> Tensor:
    """The averages of cells of tokens, those at a far edge over the tokens that they have.

    Args:
        x: [B, N, ...], N tokens of `grid` in raster order.
        grid: (h, w) or (t, h, w).
        cells: sides of a cell, one for each axis of the grid.

    Returns:
        [B, P, ...], cells in raster order, in the dtype of `x`; sums are float32 (float64 for
        float64).
    """
    axes, counts = len(grid), cell_grid(grid, cells)
    wide = x.unflatten(1, grid).to(torch.promote_types(x.dtype, torch.float32))
    for axis in range(axes):
        side, count = cells[axis], counts[axis]
        missing = count * side - grid[axis]
        if missing:
            last = [0] * (2 * (wide.dim() - 1 - axis) - 1) + [missing]
            wide = F.pad(wide, last)
        wide = wide.unflatten(axis + 1, (count, side)).sum(axis + 2)
        size = torch.full((count,), float(side), device=x.device)
        size[-1] = side - missing
        wide = wide / size.to(wide.dtype).view(count, *[1] * (wide.dim() - axis - 2))
    return wide.flatten(1, axes).to(x.dtype)


def log_counts(
    grid: tuple[int, ...],
    cells: tuple[int, ...],
    radius: float,
    shape: str,
    like: Tensor,
    where: tuple[slice, ...] | None = None,
) -> Tensor:
    """log n_ic, -inf for none, [queries, P], of all queries or those in part of the grid.

    Args:
        grid, cells: sizes.
        radius, shape: of the window.
        like: the result is on its device, in its dtype of sums.
        where: a slice for each axis; its queries in raster order.
    """
    table, reaches = counts(grid, cells, radius, shape, like.device, accumulator(like))
    axes = len(grid)
    where = where or tuple(slice(0, size) for size in grid)
    place: Tensor | int = 0
    for axis, (size, side, far, part) in enumerate(zip(grid, cells, reaches, where, strict=True)):
        query = torch.arange(part.start, part.stop, device=like.device)
        cell = torch.arange(0, size, side, device=like.device)
        apart = (query[:, None] - cell).clamp(-far - 1, far + side) + far + 1
        index = apart * table.stride(axes + axis)
        if size % side:
            index[:, -1] += table.stride(axis)
        broadcast = [1] * (2 * axes)
        broadcast[axis], broadcast[axes + axis] = index.shape
        place = place + index.view(broadcast)
    assert isinstance(place, Tensor)
    return table.view(-1).take(place).flatten(axes).flatten(0, axes - 1)


@cache
@torch.inference_mode(False)
def counts(
    grid: tuple[int, ...],
    cells: tuple[int, ...],
    radius: float,
    shape: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[int, ...]]:
    """log n_ic by where a query lies from the first token of a cell, and how far that reaches.

    Returns:
        The table, [2, 2, W_0, W_1], or [2, 2, 2, W_0, W_1, W_2] with three axes: whether
        the grid cuts the cell short along each axis, then query minus cell from -R - 1 to R + side,
        both of which stand for all that is farther; and R of each axis. A table is a few thousand
        numbers and kept for good, as captured graphs hold its address.
    """
    reaches = tuple(min(reach(radius), size - 1) for size in grid)
    moves = [torch.arange(-r - 1, r + side + 1) for r, side in zip(reaches, cells, strict=True)]
    tables = []
    for cut in itertools.product((False, True), repeat=len(grid)):
        sides = [
            (size - 1) % side + 1 if short else side
            for size, side, short in zip(grid, cells, cut, strict=True)
        ]
        seen = torch.zeros([len(move) for move in moves], dtype=torch.int64)
        for token in itertools.product(*map(range, sides)):
            apart = [
                (move - at).view([-1 if i == axis else 1 for i in range(len(grid))])
                for axis, (move, at) in enumerate(zip(moves, token, strict=True))
            ]
            seen += window(apart, radius, shape)
        for axis, move in enumerate(moves):
            seen.index_fill_(axis, torch.tensor([0, len(move) - 1]), 0)
        tables.append((math.prod(sides) - seen).to(torch.float64).log())
    return torch.stack(tables).unflatten(0, [2] * len(grid)).to(dtype).to(device), reaches
