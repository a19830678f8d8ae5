"""Which tiles of 64 tokens see which, as lists that the Triton kernels walk, and their bit masks.

Distance has no direction, so one set of lists serves both ways: the key tiles that a query tile
sees are the query tiles that see it as keys.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.window_attention.common import reach, sees, window
from linfusion.kernels.window_attention.order import TILES


class Lists(NamedTuple):
    """For each tile the tiles in its window, first those seen whole, then those seen in part.

    A tile is seen whole if no pair of tokens is too far apart and it does not stick out of the
    grid: it needs no mask.

    Attributes:
        table: int32. For each tile four numbers: where its list starts, where the entries start
            that need a mask, where it ends, and the tile itself. Then the lists, one after the
            other, two numbers an entry: the listed tile, and its mask.
        bits: bit j of word [mask, i] says whether token i of a tile sees token j of the listed
            tile. [masks, 64] int64.
        tiles: how many there are.
        whole: how many entries there are without a mask, and `part` with one.
    """

    table: Tensor
    bits: Tensor
    tiles: int
    whole: int
    part: int


@cache
@torch.inference_mode(False)
def lists(grid: tuple[int, ...], radius: float, shape: str, device: torch.device) -> Lists:
    """The lists of a grid. Which tiles are far apart depends on their displacement alone.

    They are some kilobytes, and kept for good: a captured CUDA graph holds their address, and
    another stream may be reading them. The first call for a grid copies them to the device, so it
    belongs before a capture, as a first call that compiles kernels does.
    """
    tile = TILES[len(grid)]
    counts = [-(-size // side) for size, side in zip(grid, tile, strict=True)]
    spans = [
        range(-n, n + 1)
        for count, side in zip(counts, tile, strict=True)
        for n in [min(count - 1, (reach(radius) + side - 1) // side)]
    ]
    moves = [
        move
        for move in itertools.product(*spans)
        if sees(
            [max(0, (abs(m) - 1) * s + 1) for m, s in zip(move, tile, strict=True)], radius, shape
        )
    ]
    far = [[abs(m) * s + s - 1 for m, s in zip(move, tile, strict=True)] for move in moves]
    near = torch.tensor([sees(offset, radius, shape) for offset in far])  # [moves]

    places = torch.cartesian_prod(*map(torch.arange, counts)).view(-1, len(grid))
    other = places[:, None] + torch.tensor(moves)  # [tiles, moves, axes]
    size = torch.tensor(counts)
    there = ((other >= 0) & (other < size)).all(-1)
    cut_short = (other + 1) * torch.tensor(tile) > torch.tensor(grid)
    whole = there & near & ~cut_short.any(-1)
    index = torch.zeros(other.shape[:2], dtype=torch.int64)
    for axis, count in enumerate(counts):
        index = index * count + other[..., axis]
    kind = torch.where(whole, 0, torch.where(there, 1, 2))
    order = kind.argsort(dim=1, stable=True)
    listed = there.gather(1, order)
    ends = there.sum(1).cumsum(0)
    starts = ends - there.sum(1)
    itself = torch.arange(len(places))
    ranges = torch.stack([starts, starts + whole.sum(1), ends, itself], 1)
    entries = torch.stack([index.gather(1, order)[listed], order[listed]], 1)
    table = torch.cat([ranges.flatten(), entries.flatten()]).int()
    unmasked = int(whole.sum())
    return Lists(
        table=table.to(device),
        bits=_bits(moves, tile, radius, shape).to(device),
        tiles=len(places),
        whole=unmasked,
        part=len(entries) - unmasked,
    )


def _bits(moves: list[tuple[int, ...]], tile: tuple[int, ...], radius: float, shape: str) -> Tensor:
    inner = torch.cartesian_prod(*map(torch.arange, tile))  # [64, axes]
    shift = torch.tensor(moves) * torch.tensor(tile)
    apart = shift[:, None, None] + inner[None, None] - inner[None, :, None]  # [moves, i, j, axes]
    seen = window(list(apart.unbind(-1)), radius, shape)
    return (seen.long() << torch.arange(64)).sum(-1)  # bit 63 is the sign; the sum wraps to it
