"""Hybrid attention in the ahead-of-time gate: sums over windows, and the launch that joins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.aot.chips import COLUMNS, RULE, Chip, Report, target_of

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

# Of a tile: tokens that a program holds, that it takes at a time, columns and features in pieces.
TILE = ("BM", "BK", "BA", "BB", "FA", "FB", "BF")
HEAD_DIMS = (64, 128)
# FLUX.1 at 1024 pixels; as many features as columns.
BATCH, GRID, HEADS, RADIUS = 1, (64, 64), 24, 8.0


def launches(chip: Chip, d: int, dtype: str) -> list[tuple[str, Launch]]:
    """Sums over windows forward and backward, and the join without what a window sees."""
    import torch

    from linfusion.kernels.hybrid_attention import triton as kernels

    one = getattr(torch, dtype)

    def empty(*shape: int, dtype: torch.dtype = one) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    collected: list[Launch] = []
    target = target_of(chip, collected)
    phi_q, phi_k, v = (empty(BATCH, GRID[0] * GRID[1], HEADS, d) for _ in range(3))
    choices = (GRID, RADIUS, "disc", 1.0, False)
    num, den = kernels.window_sum(phi_q, phi_k, v, *choices, target=target)
    kernels.window_sum_backward(num, den, phi_q, phi_k, v, *choices, target=target)
    kv = empty(BATCH, HEADS, d, d, dtype=torch.float32)
    k_mean, weight = empty(BATCH, HEADS, d, dtype=torch.float32), den[:, 0]
    turned = torch.empty_like(phi_q)
    kernels.join(v, den, phi_q, turned, kv, k_mean, weight, num, den, target=target)
    return [(launch.kernel.__name__, launch) for launch in collected]


def traffic(launch: Launch) -> tuple[int, int, int]:
    """Bytes of HBM, issued (not counted: as many) and of tensors wide as a head; see `Report`."""
    size = {
        name: x.numel() * x.element_size()
        for name, x in launch.args.items()
        if hasattr(x, "data_ptr")
    }
    hbm = sum(size.values())
    wide = ("Q", "K", "V", "DQ", "DK", "DV", "NUM", "DNUM", "NEAR", "PHI", "ROTATED", "OUT")
    return hbm, hbm, sum(size.get(name, 0) for name in wide)


def section(reports: list[Report]) -> list[str]:
    """The lines of the page; `reports` are those of `launches`."""
    lines = [
        "",
        "# Hybrid attention",
        "",
        f"Bytes for batch {BATCH}, a grid of {GRID[0]} × {GRID[1]} tokens, {HEADS} heads, as many "
        "features as columns. *Tile* is tokens that a program holds × tokens that it takes at a "
        "time × pieces of columns and of features, warps and pipeline stages. *HBM* counts every "
        "tensor of the launch once, relative to those as wide as a head.",
    ]
    for chip in dict.fromkeys(r.chip for r in reports):
        lines += ["", f"## {chip}, hybrid attention", "", f"{COLUMNS} HBM |", f"{RULE} --- |"]
        for r in (r for r in reports if r.chip == chip):
            lines.append(f"{r.cells()} {r.hbm / r.minimum:.2f} |")
    return lines
