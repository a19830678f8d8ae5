"""The state-space scan."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ptx.comparing import TOLERANCE, Comparison, Draw, compare, f32
from linfusion.kernels.launch import Target


def scan(
    target: Target,
    dtype: torch.dtype,
    length: int,
    heads: int,
    groups: int,
    channels: int,
    features: int,
    chunk: int,
    *,
    reverse: bool = False,
    extras: bool = True,
    batch: int = 1,
) -> list[Comparison]:
    """The state-space scan, forward and backward; `extras`: skip and first state."""
    from linfusion.kernels.ssd import reference, triton
    from linfusion.kernels.ssd.common import Choices

    x, dt, a, b, c, draw = _of_scan(dtype, length, heads, groups, channels, features, batch)
    plain = Draw(f32)
    skip = plain(batch, heads, channels) if extras else None
    first = plain(batch, heads, channels, features) if extras else None
    choices = Choices(chunk, reverse)
    y, final, kept = triton.scan(x, dt, a, b, c, skip, first, choices, target=target)
    dy, dfinal = draw(*y.shape), plain(*final.shape)
    gradients = triton.scan_backward(dy, dfinal, x, dt, a, b, c, skip, kept, choices, target=target)
    leaves = [
        None if t is None else t.double().requires_grad_() for t in (x, dt, a, b, c, skip, first)
    ]
    want, want_final = reference.scan(*leaves, choices)
    wanted = torch.autograd.grad(
        [want, want_final], [t for t in leaves if t is not None], [dy.double(), dfinal.double()]
    )
    tolerance = TOLERANCE[dtype]
    names = ("dx", "ddt", "da", "db", "dc", "dskip", "dfirst")
    return [
        compare("y", y, want, tolerance),
        compare("final", final, want_final, tolerance),
        *(
            compare(name, got, exact, 2 * tolerance)
            for name, got, exact in zip(names, gradients, wanted, strict=False)
        ),
    ]


def _of_scan(
    dtype: torch.dtype,
    length: int,
    heads: int,
    groups: int,
    channels: int,
    features: int,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Draw]:
    draw = Draw(dtype)
    x = draw(batch, length, heads, channels)
    b, c = draw(batch, length, groups, features), draw(batch, length, groups, features)
    dt = 0.2 * draw.uniform(batch, length, heads)
    a = -8 * dt * draw.uniform(heads)
    return x, dt, a, (b / features**0.5).to(dtype), c, draw
