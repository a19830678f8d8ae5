"""What every implementation means by a window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHAPES = ("disc", "square")


def bounded(radius: float, grid: tuple[int, ...]) -> float:
    """The radius, but no larger than it takes to see everything, whatever the shape."""
    return min(radius, float(sum(grid)))


def reach(radius: float) -> int:
    """The largest offset along one axis that lies in a window: its halo, in tokens."""
    return math.ceil(radius) - 1


def sees(offset: list[int], radius: float, shape: str) -> bool:
    """Whether a token at this offset lies in the window; its border does not."""
    if shape == "disc":
        return sum(x * x for x in offset) < radius * radius
    return max(map(abs, offset)) < radius


def covers(grid: tuple[int, ...], radius: float, shape: str) -> bool:
    """Whether every token of the grid sees every other, corner to corner."""
    return sees([size - 1 for size in grid], radius, shape)


def window(offsets: list[Tensor], radius: float, shape: str) -> Tensor:
    """`sees` for integer tensors of offsets, one an axis, that broadcast together."""
    first, *others = offsets
    if shape == "disc":
        return sum((x * x for x in others), first * first) < radius * radius
    seen = first.abs() < radius
    for x in others:
        seen = seen & (x.abs() < radius)
    return seen


def coordinates(grid: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """The place of each token of a raster grid, [N] int64 for each axis."""
    axes = torch.meshgrid([torch.arange(s, device=device) for s in grid], indexing="ij")
    return [x.reshape(-1) for x in axes]
