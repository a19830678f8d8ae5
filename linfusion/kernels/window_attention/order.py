"""The order of tokens in which the tiles of a grid are contiguous."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# 64 tokens, what one program of the Triton kernels works on.
TILES = {2: (8, 8), 3: (4, 4, 4)}


@dataclass(frozen=True)
class TileOrder:
    """Tiles of 8 × 8 tokens (4 × 4 × 4 in three axes) in raster order, raster order in each tile.

    A permutation: tiles at the far borders are smaller where the grid is ragged, nothing is padded.
    A model whose tokens, and position tables with them, are put in this order once needs no other
    change: whatever acts on single tokens does not see it, and `window_attention(order=...)` does.

    Attributes:
        grid: (h, w) or (t, h, w).
    """

    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        grid = self.grid
        size = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in size)
        if len(size) not in TILES or not whole or any(x < 1 for x in size):
            raise ValueError(f"grid: expected (h, w) or (t, h, w), positive integers, got {grid!r}")
        object.__setattr__(self, "grid", size)

    def permute(self, x: Tensor, dim: int = 1) -> Tensor:
        """`x` with its tokens along `dim` taken from raster order to tile order.

        Raises:
            ValueError: `x` has another number of tokens there.
        """
        self._check(x, dim)
        return x.index_select(dim, raster_of(self.grid, x))

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """`x` with its tokens along `dim` taken from tile order to raster order.

        Raises:
            ValueError: `x` has another number of tokens there.
        """
        self._check(x, dim)
        return x.index_select(dim, place_of(self.grid, x))

    def _check(self, x: Tensor, dim: int) -> None:
        tokens = math.prod(self.grid)
        if x.shape[dim] != tokens:
            raise ValueError(
                f"x: expected the {tokens} tokens of grid {self.grid} along axis {dim}, got shape "
                f"{tuple(x.shape)}"
            )


def raster_of(grid: tuple[int, ...], like: Tensor) -> Tensor:
    """Which raster token lies at each place of tile order, [N] int64 on the device of `like`."""
    return _index("raster", grid, like)


def place_of(grid: tuple[int, ...], like: Tensor) -> Tensor:
    """At which place of tile order each raster token lies, [N] int64 on the device of `like`."""
    return _index("place", grid, like)


_MADE: dict[tuple[str, tuple[int, ...], torch.device], Tensor] = {}


def _index(kind: str, grid: tuple[int, ...], like: Tensor) -> Tensor:
    """Made once a grid and device, and kept for good, as captured graphs hold its address.

    Where tensors are not real, in a compiler or a dry run, it is made each time.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return _make(kind, grid, like.device)
    key = (kind, grid, like.device)
    if key not in _MADE:
        with torch.inference_mode(False):
            made = _make(kind, grid, like.device)
        if type(made) is not Tensor:
            return made
        _MADE[key] = made
    return _MADE[key]


def _make(kind: str, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Before a token lie the slabs of whole tiles above it, then the same within its slab, axis by
    axis; and within its tile the rows above it, of a tile that may be cut short by the grid.
    """
    place = torch.zeros(grid, dtype=torch.int64, device=device)
    tile = TILES[len(grid)]
    axes = len(grid)
    starts, locals_, sides = [], [], []
    for axis, (size, side) in enumerate(zip(grid, tile, strict=True)):
        broadcast = [1] * axes
        broadcast[axis] = size
        x = torch.arange(size, device=device).view(broadcast)
        start = x // side * side
        starts.append(start)
        locals_.append(x - start)
        sides.append((size - start).clamp(max=side))
    for axis in range(axes):
        # Tiles that differ from this one first along `axis`: the slab's sides before that axis,
        # the grid's sizes after it.
        above = starts[axis] * math.prod(grid[axis + 1 :])
        for length in sides[:axis]:
            above = above * length
        rows = locals_[axis]
        for length in sides[axis + 1 :]:
            rows = rows * length
        place = place + above + rows
    place = place.view(-1)
    if kind == "place":
        return place
    return torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=device))
