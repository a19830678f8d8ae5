"""How many tokens a Triton kernel of the scan takes at a time, by kernel and vendor.

Nothing is autotuned, so a new length never waits for a compiler and the order of a sum never
depends on a timer. The choices come from ahead-of-time compilation (`make aot`): no spilled
register, and shared memory below 99 KiB on NVIDIA and below 64 KiB on AMD. They have never been
timed on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Step(NamedTuple):
    """A program holds `held` tokens of a chunk and takes `taken` others at a time, with at most
    `columns` of their channels and features; "states" holds a tile of `columns` by `columns` of a
    state and takes `taken` tokens at a time. Columns of a result beyond `piece` are another
    piece."""

    held: int
    taken: int
    columns: int
    warps: int
    stages: int
    piece: int = 64


# (vendor, kernel, bytes of an element) -> a `Step` for max(P, N) up to 64 and up to 128. "sm_86" is
# what sm_86 to sm_89 have of their own.
_STEPS: dict[tuple[str, str, int], list[tuple[int, ...]]] = {
    ("cuda", "states", 2): [(64, 64, 64, 4, 2), (64, 64, 64, 4, 2)],
    ("cuda", "states", 4): [(32, 32, 64, 4, 2), (32, 32, 64, 4, 2)],
    ("cuda", "read", 2): [(64, 32, 32, 4, 2), (64, 32, 32, 4, 2)],
    ("cuda", "read", 4): [(64, 16, 32, 4, 1), (64, 16, 32, 4, 1)],
    ("cuda", "keys", 2): [(64, 16, 64, 4, 1), (64, 32, 32, 8, 1, 128)],
    ("cuda", "keys", 4): [(32, 16, 16, 4, 1, 128), (32, 16, 16, 4, 1, 128)],
    ("sm_86", "keys", 2): [(64, 16, 32, 4, 1), (64, 32, 32, 8, 1, 128)],
    ("hip", "states", 2): [(64, 64, 64, 4, 1), (64, 64, 64, 4, 1)],
    ("hip", "states", 4): [(32, 32, 64, 4, 1), (32, 32, 64, 4, 1)],
    ("hip", "read", 2): [(64, 16, 64, 4, 1), (64, 16, 64, 4, 1)],
    ("hip", "read", 4): [(64, 16, 64, 4, 1), (64, 16, 128, 4, 1)],
    ("hip", "keys", 2): [(64, 16, 64, 4, 1), (64, 16, 64, 4, 1)],
    ("hip", "keys", 4): [(64, 16, 32, 4, 1), (64, 16, 16, 4, 1)],
}


@functools.lru_cache(1024)
def step_for(
    vendor: str, kernel: str, widest: int, itemsize: int, chunk: int, arch: int = 80
) -> Step:
    """The step of `kernel` for chunks of `chunk` tokens and P and N up to `widest`."""
    steps = _STEPS[vendor, kernel, itemsize]
    if vendor == "cuda" and 86 <= arch < 90:
        steps = _STEPS.get(("sm_86", kernel, itemsize), steps)
    step = Step(*steps[0 if widest <= 64 else 1])
    return step._replace(held=min(step.held, chunk), taken=min(step.taken, chunk))


def num_splits(of_group: int, programs: int, multiprocessors: int) -> int:
    """How many programs share the heads of a group: as many as give every multiprocessor two.

    Args:
        of_group: heads of a group.
        programs: of one split.
        multiprocessors: of the GPU.
    """
    return max(1, min(of_group, -(-2 * multiprocessors // programs)))
