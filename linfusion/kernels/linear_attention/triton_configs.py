"""Tile sizes of the Triton kernels: one for each kernel, head size, element size, vendor.

Nothing is autotuned, so a new resolution never waits for a compiler and the order of a sum never
depends on a timer. The choices come from ahead-of-time compilation (`make aot`): no spilled
register, and shared memory below 99 KiB on NVIDIA (it then fits consumer cards as well as sm_80,
sm_90 and sm_100) and below 64 KiB on AMD. They have never been timed on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Tile(NamedTuple):
    """A block of `tokens`, at most `d` columns of q or k and `e` of v at a time."""

    tokens: int
    d: int
    e: int
    warps: int
    stages: int


# (vendor, kernel, bytes of an element) -> a `Tile` for max(D, Dv) up to 64, up to 128, above, and
# above 256 where that has one of its own.
_TILES: dict[tuple[str, str, int], list[tuple[int, int, int, int, int]]] = {
    ("cuda", "state", 2): [(64, 64, 64, 8, 3), (64, 64, 128, 8, 3), (32, 64, 128, 8, 3)],
    ("cuda", "state", 4): [(32, 64, 64, 4, 3)],
    ("cuda", "out", 2): [
        (128, 64, 64, 8, 1),
        (128, 32, 128, 8, 2),
        (128, 32, 256, 8, 2),
        (128, 32, 128, 8, 2),
    ],
    ("cuda", "out", 4): [(64, 32, 64, 4, 2)],
    ("cuda", "bwd_q", 2): [(64, 64, 64, 4, 1)],
    ("cuda", "bwd_q_rows", 2): [
        (64, 64, 64, 8, 1),
        (64, 128, 64, 8, 1),
        (64, 256, 16, 8, 1),
        (32, 256, 16, 8, 1),
    ],
    ("cuda", "bwd_q_rows", 4): [(32, 64, 32, 8, 1), (32, 128, 32, 8, 1), (32, 256, 16, 8, 1)],
    ("cuda", "bwd_kv", 2): [(128, 64, 64, 8, 1), (128, 128, 64, 8, 1), (128, 64, 64, 8, 1)],
    ("cuda", "bwd_kv", 4): [(32, 64, 64, 8, 1), (64, 32, 64, 4, 1), (64, 32, 64, 4, 1)],
    ("hip", "state", 2): [(64, 64, 64, 4, 1), (64, 128, 128, 8, 1), (32, 64, 256, 8, 2)],
    ("hip", "state", 4): [(32, 64, 64, 4, 2), (32, 64, 128, 8, 2), (32, 64, 128, 8, 2)],
    ("hip", "out", 2): [(128, 64, 64, 4, 1), (128, 64, 128, 8, 2), (128, 32, 256, 8, 2)],
    ("hip", "out", 4): [(64, 64, 64, 4, 1), (64, 32, 128, 8, 2), (64, 32, 128, 8, 2)],
    ("hip", "bwd_q", 2): [(64, 64, 64, 4, 1)],
    ("hip", "bwd_q", 4): [(64, 64, 64, 4, 1)],
    ("hip", "bwd_q_rows", 2): [(64, 64, 64, 8, 1), (64, 128, 64, 8, 1), (64, 256, 32, 8, 1)],
    ("hip", "bwd_q_rows", 4): [(32, 64, 32, 8, 1), (128, 128, 32, 4, 1), (128, 64, 32, 4, 1)],
    ("hip", "bwd_kv", 2): [(64, 64, 64, 4, 1), (128, 64, 64, 8, 1), (128, 64, 64, 8, 1)],
    ("hip", "bwd_kv", 4): [(64, 64, 64, 4, 1)],
}


# What of these spills on an architecture: (architecture, kernel, bytes) -> a `Tile` for up to 64.
_INSTEAD = {(100, "bwd_q", 2): Tile(64, 64, 64, 8, 1)}


def fuses_backward(vendor: str, d: int, dv: int, itemsize: int, arch: int = 80) -> bool:
    """Whether one program can hold dS beside dq, or the backward of q is two kernels.

    In float32 on NVIDIA both operands of a product are split in two TF32 halves, which spills
    beside dS at any head size; on sm_120 it spills in 16 bits as well.
    """
    fits = vendor != "cuda" or (itemsize == 2 and arch < 120)
    return max(d, dv) <= 64 and fits


@functools.lru_cache(1024)
def tile_for(vendor: str, kernel: str, d: int, dv: int, itemsize: int, arch: int = 80) -> Tile:
    """The tile of `kernel` for heads of `d` by `dv`, cut down to powers of two that cover them."""
    widest = max(d, dv)
    tiles = _TILES[vendor, kernel, itemsize]
    bucket = sum(widest > most for most in (64, 128, 256))
    tile = Tile(*tiles[min(bucket, len(tiles) - 1)])
    if vendor == "cuda" and bucket == 0:
        tile = _INSTEAD.get((arch, kernel, itemsize), tile)
    return tile._replace(d=min(tile.d, _cover(d)), e=min(tile.e, _cover(dv)))


@functools.lru_cache(1024)
def num_splits(tokens: int, d: int, groups: int, block: int, multiprocessors: int) -> int:
    """How many programs share the tokens of one head.

    Enough for four waves of programs, as long as writing and reading the partial states costs
    at most 5 % of the traffic of k and v (2·D·splits / N); short sequences get one full wave
    all the same, latency matters more there. The count sees the number of tokens through the
    power of two below it only.

    Args:
        tokens: keys per head.
        d: columns of k.
        groups: programs per split: batch × heads × tiles of the state.
        block: tokens of one tile.
        multiprocessors: of the GPU.
    """
    bucket = 1 << (tokens.bit_length() - 1)
    four_waves = -(-4 * multiprocessors // groups)
    one_wave = -(-multiprocessors // groups)
    cheap = bucket // (40 * d)
    return max(1, min(max(min(four_waves, cheap), one_wave), bucket // block, 256))


def _cover(columns: int) -> int:
    """The power of two that covers `columns`, at least 16: the least a matrix product takes."""
    return max(16, 1 << (columns - 1).bit_length())
