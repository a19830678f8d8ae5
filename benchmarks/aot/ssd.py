"""The scan in the ahead-of-time gate: what is launched and what the page says.

A length is no constant of a kernel; the chunk, the direction and which optional tensors there are
do compile a kernel anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.aot.chips import COLUMNS, RULE, Chip, Report, target_of

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

# Of a tile: tokens that a program holds, that it takes at a time, columns.
TILE = ("BM", "BK", "BD", "BP", "BN", "PA", "PB", "NA", "NB", "BLOCK", "BH")
# Channels of a head × features of its state.
SIZES = {"64×64": (64, 64), "64×128": (64, 128), "128×64": (128, 64), "128×128": (128, 128)}
BATCH, TOKENS, HEADS, GROUPS, CHUNK = 1, 65536, 32, 1, 256


def launches(chip: Chip, size: str, dtype: str) -> list[tuple[str, Launch]]:
    """Every different launch of a forward and backward pass, in reverse, with skip and initial
    state."""
    import torch

    from linfusion.kernels.ssd import triton as kernels
    from linfusion.kernels.ssd.common import Choices

    channels, features = SIZES[size]
    one = getattr(torch, dtype)

    def empty(*shape: int, dtype: torch.dtype = one) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    collected: list[Launch] = []
    target = target_of(chip, collected)
    x = empty(BATCH, TOKENS, HEADS, channels)
    dt, a = (empty(BATCH, TOKENS, HEADS, dtype=torch.float32) for _ in range(2))
    b, c = (empty(BATCH, TOKENS, GROUPS, features) for _ in range(2))
    skip = empty(BATCH, HEADS, channels)
    initial = empty(BATCH, HEADS, channels, features, dtype=torch.float32)
    choices = Choices(CHUNK, reverse=True)
    y, final, kept = kernels.scan(x, dt, a, b, c, skip, initial, choices, target=target)
    kernels.scan_backward(y, final, x, dt, a, b, c, skip, kept, choices, target=target)
    different: dict[str, Launch] = {}
    for launch in collected:
        backward = ", backward" if launch.args.get("BACKWARD") else ""
        different.setdefault(launch.kernel.__name__ + backward, launch)
    return list(different.items())


def traffic(launch: Launch) -> tuple[int, int, int]:
    """Bytes of HBM, issued (not counted: as many) and of tensors as long as the sequence and as
    wide as a head; see `Report`."""
    size = {
        name: x.numel() * x.element_size()
        for name, x in launch.args.items()
        if hasattr(x, "data_ptr")
    }
    hbm = sum({id(launch.args[name]): bytes_ for name, bytes_ in size.items()}.values())
    return hbm, hbm, sum(size.get(name, 0) for name in ("V", "U", "OUT"))


def section(reports: list[Report]) -> list[str]:
    """The lines of the page; `reports` are those of `launches`."""
    lines = [
        "",
        "# State-space scan",
        "",
        f"Bytes for batch {BATCH}, {TOKENS} tokens, {HEADS} heads in {GROUPS} group, chunks of "
        f"{CHUNK} tokens, with skip and initial state. *P × N* is channels of a head × features "
        "of its state. *Tile* is tokens that a program holds × tokens that it takes at a time × "
        "columns, warps and pipeline stages. *HBM* counts every tensor of the launch once, "
        "relative to those as wide as x: the rest is states, one a chunk in float32, and sums.",
    ]
    for chip in dict.fromkeys(r.chip for r in reports):
        lines += [
            "",
            f"## {chip}, state-space scan",
            "",
            f"{COLUMNS.replace(' D ', ' P × N ')} HBM |",
            f"{RULE} --- |",
        ]
        for r in (r for r in reports if r.chip == chip):
            hbm = f"{r.hbm / r.minimum:.2f}" if r.minimum else "–"
            lines.append(f"{r.cells()} {hbm} |")
    return lines
