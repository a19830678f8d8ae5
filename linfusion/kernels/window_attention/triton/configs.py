"""How many tokens a Triton kernel of window attention takes at a time, by kernel and vendor.

Nothing is autotuned, so a new resolution never waits for a compiler and the order of a sum never
depends on a timer. The choices come from ahead-of-time compilation (`make aot`): no spilled
register, and shared memory below 99 KiB on NVIDIA and below 64 KiB on AMD. They have never been
timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """A program holds `held` tokens of a tile of 64 and takes `taken` others at a time.

    Columns of a head beyond `columns` are a piece of their own.
    """

    held: int
    taken: int
    warps: int
    stages: int
    columns: int


# (vendor, kernel, bytes of an element) -> a `Step` for heads of up to 64 columns and up to 128.
_STEPS: dict[tuple[str, str, int], list[tuple[int, int, int, int, int]]] = {
    ("cuda", "fwd", 2): [(64, 64, 4, 3, 64), (64, 64, 4, 2, 64)],
    ("cuda", "fwd", 4): [(64, 16, 4, 2, 64), (32, 32, 4, 1, 128)],
    ("cuda", "bwd_q", 2): [(64, 64, 4, 2, 64), (64, 32, 4, 2, 64)],
    ("cuda", "bwd_q", 4): [(32, 32, 4, 1, 64), (16, 32, 4, 1, 128)],
    ("cuda", "bwd_kv", 2): [(64, 16, 4, 2, 64), (64, 16, 4, 2, 64)],
    ("cuda", "bwd_kv", 4): [(16, 32, 4, 1, 64), (16, 64, 8, 1, 128)],
    ("hip", "fwd", 2): [(64, 16, 4, 1, 128), (64, 16, 4, 1, 128)],
    ("hip", "fwd", 4): [(64, 16, 4, 1, 128), (32, 16, 4, 1, 128)],
    ("hip", "bwd_q", 2): [(64, 16, 4, 1, 128), (64, 16, 4, 1, 128)],
    ("hip", "bwd_q", 4): [(32, 16, 4, 1, 128), (32, 16, 4, 1, 128)],
    ("hip", "bwd_kv", 2): [(64, 32, 4, 1, 128), (32, 32, 4, 1, 128)],
    ("hip", "bwd_kv", 4): [(32, 32, 4, 1, 128), (32, 16, 4, 1, 128)],
}


def step_for(vendor: str, kernel: str, d: int, itemsize: int) -> Step:
    """The step of `kernel` for heads of `d` columns, at most 128."""
    return Step(*_STEPS[vendor, kernel, itemsize][0 if d <= 64 else 1])


def pieces(d: int, most: int) -> tuple[int, int]:
    """Powers of two, from 16 to `most`, that hold d columns; the second is 0 if one does."""
    first = min(most, power_of_2(d))
    return first, 0 if d <= first else power_of_2(d - first)


def power_of_2(d: int) -> int:
    """The next, from 16 on: the least that a product takes."""
    return max(16, 1 << (d - 1).bit_length())
