"""The scan in the ahead-of-time gate: what is launched, what it moves, what the page says.

A length is no constant of a kernel; the chunk, the direction and which optional tensors there are
do compile a kernel anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.aot import Chip
    from linfusion.kernels.launch import Launch

# Channels of a head, features of its state.
SIZES = ((64, 64), (64, 128), (128, 64))
# A minute of video in 16 frames a second at 512 pixels, before the last patchification.
BATCH, TOKENS, HEADS, GROUPS, CHUNK = 1, 65536, 32, 1, 256


def launches(chip: Chip, sizes: tuple[int, int], dtype: str) -> list[tuple[str, Launch]]:
    """A forward and backward pass with everything optional, scanned in reverse."""
    import torch

    from linfusion.kernels.ssd import triton as kernels

    channels, features = sizes
    one = getattr(torch, dtype)

    def empty(*shape: int, dtype: torch.dtype = one) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    collected: list[Launch] = []
    target = kernels.Target(chip.vendor, chip.multiprocessors, collected.append)
    x = empty(BATCH, TOKENS, HEADS, channels)
    dt, a = (empty(BATCH, TOKENS, HEADS, dtype=torch.float32) for _ in range(2))
    b, c = (empty(BATCH, TOKENS, GROUPS, features) for _ in range(2))
    skip = empty(BATCH, HEADS, channels)
    seg = empty(BATCH, TOKENS, dtype=torch.int32)
    initial = empty(BATCH, HEADS, channels, features, dtype=torch.float32)
    y, final, kept = kernels.scan(x, dt, a, b, c, skip, initial, seg, CHUNK, True, target=target)
    kernels.scan_backward(y, final, x, dt, a, b, c, skip, seg, kept, CHUNK, True, target=target)
    different: dict[str, Launch] = {}
    for launch in collected:
        back = ", backward" if launch.args.get("BACKWARD") else ""
        different.setdefault(launch.kernel.__name__ + back, launch)
    return list(different.items())


def traffic(launch: Launch) -> tuple[int, int, int]:
    """Bytes of HBM, issued and at least needed by one launch; see `Report`."""
    a = launch.args
    tensors = {name: x for name, x in a.items() if hasattr(x, "data_ptr")}
    size = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    hbm = sum(size[name] for name in {id(x): name for name, x in tensors.items()}.values())
    return hbm, hbm, 0
