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


# Four warps of 64 threads, each with 16 rows.
_HIP = Step(64, 16, 4, 1, 128)
# On NVIDIA: (kernel, bytes of an element) -> a `Step` for heads of up to 64 columns and up to 128.
_STEPS: dict[tuple[str, int], list[tuple[int, int, int, int, int]]] = {
    ("fwd", 2): [(64, 64, 4, 3, 64), (64, 64, 4, 2, 64)],
    ("fwd", 4): [(64, 16, 4, 2, 64), (32, 32, 4, 1, 128)],
    ("bwd_q", 2): [(64, 64, 4, 2, 64), (64, 32, 4, 2, 64)],
    ("bwd_q", 4): [(32, 32, 4, 1, 64), (16, 32, 4, 1, 128)],
    ("bwd_kv", 2): [(64, 16, 4, 2, 64), (64, 16, 4, 2, 64)],
    ("bwd_kv", 4): [(16, 32, 4, 1, 64), (16, 64, 8, 1, 128)],
}
# What of these spills on an architecture: (architecture, kernel, bytes, more than 64 columns).
_INSTEAD = {
    (100, "fwd", 4, False): (32, 32, 4, 1, 64),
    (100, "fwd", 4, True): (16, 32, 4, 1, 128),
    (100, "bwd_q", 2, True): (64, 16, 4, 2, 64),
    (100, "bwd_kv", 4, False): (16, 64, 8, 1, 64),
    (120, "fwd", 2, True): (64, 32, 4, 3, 64),
}


def step_for(vendor: str, arch: int, kernel: str, d: int, itemsize: int) -> Step:
    """The step of `kernel` for heads of `d` columns, at most 128."""
    if vendor == "hip":
        return _HIP
    wide = d > 64
    return Step(*_INSTEAD.get((arch, kernel, itemsize, wide), _STEPS[kernel, itemsize][wide]))
