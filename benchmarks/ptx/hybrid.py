"""The kernels of hybrid attention, as cases: sums over windows, and the join of near and far."""

from __future__ import annotations

import math

import torch

from benchmarks.ptx.compare import TOLERANCE, Comparison, Draw, compare, f32
from linfusion.kernels.launch import Target


def window_sum(
    target: Target,
    dtype: torch.dtype,
    grid: tuple[int, ...],
    radius: float,
    features: int,
    d: int,
    *,
    tiled: bool = False,
) -> list[Comparison]:
    """Linear sums over windows, and their gradients."""
    from linfusion.kernels.hybrid_attention import blocked, triton

    draw, tokens = Draw(dtype), math.prod(grid)
    x = [draw(1, tokens, 2, n) for n in (features, features, d)]
    dnum, dden = Draw(f32)(1, tokens, 2, d), Draw(f32)(1, tokens, 2)
    choices = (grid, radius, "disc", 0.1, tiled)
    num, den = triton.window_sum(*x, *choices, target=target)
    gradients = triton.window_sum_backward(dnum, dden, *x, *choices, target=target)
    exact = [t.double() for t in x]
    wanted = blocked.window_sum(*exact, *choices)
    wanted += blocked.window_sum_backward(dnum.double(), dden.double(), *exact, *choices)
    names = ("num", "den", "dphi_q", "dphi_k", "dv")
    return [
        compare(name, got, want, TOLERANCE[dtype])
        for name, got, want in zip(names, (num, den, *gradients), wanted, strict=True)
    ]


def join(
    target: Target,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    d: int,
    *,
    exclude: bool = True,
    rotated: bool = False,
) -> list[Comparison]:
    """Near and far in one normalisation."""
    from linfusion.kernels.hybrid_attention import blocked, triton

    draw, wide = Draw(dtype), Draw(f32)
    near, lse = draw(1, tokens, 2, d), wide(1, tokens, 2)
    phi = draw(1, tokens, 2, features).abs()
    other = draw(1, tokens, 2, features) if rotated else phi
    kv, k_mean = wide(1, 2, features, d), 1 + wide.uniform(1, 2, features)
    left_out = tokens if exclude else 0
    num, den = 0.1 * wide(1, tokens, 2, d)[:, :left_out], wide.uniform(1, tokens, 2)[:, :left_out]
    x = (near, lse, phi, other, kv, k_mean, wide(1, 2), num, den)
    found = triton.join(*x, target=target)
    wanted = blocked.join(*(t.double() for t in x))
    return [
        compare(name, got, want, TOLERANCE[dtype])
        for name, got, want in zip(("o", "lse"), found, wanted, strict=True)
    ]
