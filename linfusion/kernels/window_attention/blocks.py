"""How a grid is cut in tiles of queries with their halos of keys, and how those are copied.

Tiles that lie one below the other share a block: the keys of a whole column of tiles are copied
once, and the keys of each of its tiles are then consecutive rows of that copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.window_attention.cells import log_counts
from linfusion.kernels.window_attention.common import coordinates, covers, reach, window
from linfusion.kernels.window_attention.order import place_of, raster_of

# 32 queries, what torch's flash kernel for CPUs multiplies at a time: more would see more keys
# outside their windows.
TILES = {2: (4, 8), 3: (2, 4, 4)}
# In float32, scores of half a tile and its halo fit a first-level cache of 32 KB up to this halo;
# those of a whole one do not.
HALVED, HALF = 7, (2, 8)
# Tiles at an end of the grid see fewer keys, each in a call of its own: from three on, one tile of
# all of them is quicker, up to this many queries.
MERGED = 64
# Keys of a tile come in multiples of this, or torch's flash kernel takes 5 % longer over the rest;
# what is added is whatever follows in memory, masked.
LANES = 16
# Elements of the keys of a block: 12 MB in float32.
BLOCK = 3 << 20

# What a bias may be instead of -inf.
UNSEEN = -1e30

# Scores of a block where they are held at all, in elements: off the CPU, and for gradients.
SCORES = 1 << 22
# Up to this many tokens a dense mask costs less than the calls for tiles.
SMALL = 512


class Group(NamedTuple):
    """Tiles of a block, one below the other, that see their keys through the same mask.

    Attributes:
        tiles: how many.
        rows: of queries in each; the next tile starts that many rows further.
        first: row of the block's queries where the first tile starts.
        key_first: row of the block's keys where the first tile's keys start.
        key_rows: of keys of each tile.
        skipped: rows of the mask, before those keys, that lie outside the grid.
    """

    tiles: int
    rows: int
    first: int
    key_first: int
    key_rows: int
    skipped: int


class Block(NamedTuple):
    """Part of a column of tiles.

    Attributes:
        queries, keys: what it holds, a slice for each axis of the grid.
        groups: its tiles.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    groups: list[Group]

    def where(self, group: Group) -> tuple[slice, ...]:
        """The queries of one of its groups."""
        start = self.queries[0].start + group.first
        return (slice(start, start + group.tiles * group.rows), *self.queries[1:])


class Plan(NamedTuple):
    """What is done together.

    Attributes:
        tile: sides of the tiles of queries.
        heads: at a time.
        rows: of queries in a block, at most; one tile at least.
        queries, keys: how many elements of q and of k the largest block of so many heads has;
            with the keys, those that the last tile has too many.
    """

    tile: tuple[int, ...]
    heads: int
    rows: int
    queries: int
    keys: int


def forward_tile(grid: tuple[int, ...], radius: float, dtype: torch.dtype) -> tuple[int, ...]:
    """The tile that torch's flash kernel is fastest with."""
    halved = len(grid) == 2 and dtype == torch.float32 and reach(radius) <= HALVED
    return HALF if halved else TILES[len(grid)]


def plan(grid: tuple[int, ...], radius: float, heads: int, dim: int, tile: tuple[int, ...]) -> Plan:
    """All heads at a time, as their tokens lie together in memory, and as many rows as fit.

    Only where that would leave few rows, whose halo is copied as well, are the heads divided.
    """
    halo = reach(radius)
    height, *sides = (min(t, s) for t, s in zip(tile, grid, strict=True))
    row = dim * math.prod(min(t + 2 * halo, s) for t, s in zip(sides, grid[1:], strict=True))
    few = min(grid[0], max(64, 4 * halo))
    together = max(1, min(heads, BLOCK // (row * min(grid[0], few + 2 * halo))))
    fit = BLOCK // (row * together)
    rows = grid[0] if fit >= grid[0] else max(height, (fit - 2 * halo) // height * height)
    key_rows = min(grid[0], rows + 2 * halo)
    queries = together * rows * dim * math.prod(sides)
    keys = together * key_rows * row + (LANES - 1) * dim
    return Plan(tile, together, rows, queries, keys)


def blocks_of(
    grid: tuple[int, ...], radius: float, batch: int, heads: int, plan: Plan
) -> Iterator[tuple[int, slice, Block]]:
    """Batch index, heads and block: all that there is to do."""
    for b in range(batch):
        for part in _ranges(heads, plan.heads):
            for block in cut(grid, reach(radius), plan.rows, plan.tile):
                yield b, part, block


def cut(grid: tuple[int, ...], halo: int, rows: int, tile: tuple[int, ...]) -> Iterator[Block]:
    """The blocks of a grid, of at most `rows` rows of queries but at least one tile."""
    height, *sides = tile
    for columns in itertools.product(*map(_ranges, grid[1:], sides)):
        around = tuple(_around(c, size, halo) for c, size in zip(columns, grid[1:], strict=True))
        for run in _ranges(grid[0], max(1, rows // height) * height):
            keys = _around(run, grid[0], halo)
            groups = _groups(run, keys, grid[0], height, halo, MERGED // math.prod(sides))
            yield Block((run, *columns), (keys, *around), groups)


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _around(part: slice, size: int, halo: int) -> slice:
    return slice(max(0, part.start - halo), min(size, part.stop + halo))


def _groups(run: slice, keys: slice, size: int, height: int, halo: int, most: int) -> list[Group]:
    """The tiles of a run of rows, `height` rows each; merged ones have up to `most`."""
    alone = []
    for start in range(run.start, run.stop, height):
        tile = slice(start, min(start + height, run.stop))
        seen = _around(tile, size, halo)
        alone.append(
            Group(
                tiles=1,
                rows=tile.stop - tile.start,
                first=start - run.start,
                key_first=seen.start - keys.start,
                key_rows=seen.stop - seen.start,
                skipped=max(0, halo - start),
            )
        )
    top = [tile for tile in alone if tile.skipped]
    bottom = [t for t in alone[len(top) :] if run.start + t.first + t.rows + halo > size]
    inside = alone[len(top) : len(alone) - len(bottom)]
    groups = []
    for tiles in (_merged(top, most), inside, _merged(bottom, most)):
        for _, alike in itertools.groupby(tiles, key=lambda t: (t.rows, t.key_rows, t.skipped)):
            first, *others = alike
            groups.append(first._replace(tiles=1 + len(others)))
    return groups


def _merged(tiles: list[Group], most: int) -> list[Group]:
    """Three tiles or more, one below the other, as one of `most` rows of queries at the most."""
    if len(tiles) < 3:
        return tiles
    first, last = tiles[0], tiles[-1]
    rows = last.first + last.rows - first.first
    key_rows = last.key_first + last.key_rows - first.key_first
    return [first._replace(rows=rows, key_rows=key_rows)] if rows <= most else tiles


class Masks:
    """The bias of every tile, cut from that of one whole tile with its whole halo.

    It has as many more keys, never seen, as make a multiple of `lanes`.
    """

    def __init__(
        self,
        radius: float,
        shape: str,
        tile: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        lanes: int = 1,
    ) -> None:
        self.halo, self.lanes = reach(radius), lanes
        axes = len(tile)
        offsets = []
        # As high as a merged tile: others are its first rows.
        tile = (max(tile[0], MERGED // math.prod(tile[1:])), *tile[1:])
        for axis, side in enumerate(tile):
            query = torch.arange(side, device=device)
            key = torch.arange(-self.halo, side + self.halo, device=device)
            apart = key[None, :] - query[:, None]
            sizes = [1] * (2 * axes)
            sizes[axis], sizes[axes + axis] = apart.shape
            offsets.append(apart.view(sizes))
        seen = window(offsets, radius, shape)  # [*tile, *halo]
        self.bias = torch.zeros(seen.shape, dtype=dtype, device=device)
        self.bias.masked_fill_(~seen, float("-inf"))
        self._last: tuple[list[slice], Tensor] | None = None

    def of(self, block: Block, group: Group) -> Tensor:
        """[queries, keys] of a tile of the group: 0 where a key is seen and -inf elsewhere."""
        parts = [slice(0, group.rows)]
        parts += [slice(0, s.stop - s.start) for s in block.queries[1:]]
        parts += [slice(group.skipped, group.skipped + group.key_rows)]
        for q, k in zip(block.queries[1:], block.keys[1:], strict=True):
            skipped = self.halo - (q.start - k.start)
            parts.append(slice(skipped, skipped + k.stop - k.start))
        if self._last is None or self._last[0] != parts:  # most tiles are like the one before
            bias = self.bias[tuple(parts)]
            axes = bias.dim() // 2
            bias = bias.flatten(axes).flatten(0, axes - 1)
            more = -bias.shape[1] % self.lanes
            self._last = parts, F.pad(bias, (0, more), value=float("-inf")).contiguous()
        return self._last[1]


class Part:
    """Some heads of [N, H, ...], N tokens of a grid in raster or tile order."""

    def __init__(self, grid: tuple[int, ...], heads: slice, tiled: bool, like: Tensor) -> None:
        self.grid, self.heads = grid, heads
        self.places = place_of(grid, like).view(grid) if tiled else None

    def read(self, x: Tensor, where: tuple[slice, ...], scratch: Tensor) -> Tensor:
        """[h, *where, ...], contiguous, in a flat buffer that is long enough, in its dtype."""
        x = x[:, self.heads]
        if self.places is None:
            x = x.unflatten(0, self.grid)[where]
        else:
            places = self.places[where]
            x = x.index_select(0, places.flatten()).unflatten(0, places.shape)
        x = x.movedim(len(self.grid), 0)
        return scratch[: x.numel()].view(x.shape).copy_(x)

    def write(self, x: Tensor, where: tuple[slice, ...], values: Tensor, tiles: int) -> None:
        """Put [h, tiles, queries of a tile, ...] there; the tiles lie one below the other."""
        axes = len(self.grid)
        sides = [s.stop - s.start for s in where]
        sides[0] //= tiles
        values = values.unflatten(2, sides).movedim(0, axes + 1)  # [tiles, *sides, h, ...]
        x = x[:, self.heads]
        if self.places is None:
            x.unflatten(0, self.grid)[where].unflatten(0, (tiles, sides[0])).copy_(values)
        else:
            x[self.places[where].flatten()] = values.flatten(0, axes).to(x.dtype)

    def add(self, x: Tensor, where: tuple[slice, ...], values: Tensor) -> None:
        """Add [h, *where, ...] there."""
        axes = len(self.grid)
        values = values.movedim(0, axes)
        x = x[:, self.heads]
        if self.places is None:
            x.unflatten(0, self.grid)[where].add_(values)
        else:
            x.index_add_(0, self.places[where].flatten(), values.flatten(0, axes - 1))


def tiles(x: Tensor, first: int, rows: int, group: Group, lanes: int = 1) -> Tensor:
    """Tiles of a block [h, R, *rest, D] as a view [h, n, rows · rest, D]; they may overlap.

    Tokens of each are as many more as make a multiple of `lanes`.
    """
    h, _, *rest, d = x.shape
    across = math.prod(rest)
    size = (h, group.tiles, -(-rows * across // lanes) * lanes, d)
    strides = (x.stride(0), group.rows * across * d, d, 1)
    return x.as_strided(size, strides, x.storage_offset() + first * across * d)


def is_dense(grid: tuple[int, ...], radius: float, shape: str) -> bool:
    """Whether one dense call is the thing to do: few tokens, or a window that sees them all."""
    return math.prod(grid) <= SMALL or covers(grid, radius, shape)


def dense_bias(
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    always: int,
    tiled: bool,
    q: Tensor,
    cells: tuple[int, ...] = (),
) -> Tensor | None:
    """[N, always + N], 0 where a key is seen and -inf elsewhere; None if every key is.

    The last of the keys that come before stand for `cells`, if there are any.
    """
    if covers(grid, radius, shape) and not cells:
        return None
    at = coordinates(grid, q.device)
    if tiled:
        at = [x[raster_of(grid, q)] for x in at]
    seen = window([x[:, None] - x[None, :] for x in at], radius, shape)
    bias = torch.zeros(len(seen), always + len(seen), dtype=accumulator(q), device=q.device)
    bias[:, always:].masked_fill_(~seen, float("-inf"))
    if cells:
        counted = count_bias(grid, cells, radius, shape, always, q)
        bias[:, :always] = counted[raster_of(grid, q)] if tiled else counted
    return bias


def count_bias(
    grid: tuple[int, ...],
    cells: tuple[int, ...],
    radius: float,
    shape: str,
    always: int,
    q: Tensor,
    where: tuple[slice, ...] | None = None,
) -> Tensor:
    """[queries, always]: 0 for the text, then the logarithm of the tokens a cell stands for."""
    counted = log_counts(grid, cells, radius, shape, q, where)
    # Of a row of -inf alone torch's flash kernel returns 0 as the log-sum-exp.
    counted = counted.clamp(min=UNSEEN)
    return F.pad(counted, (always - counted.shape[1], 0))
