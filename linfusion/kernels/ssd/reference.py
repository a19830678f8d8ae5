"""The definition of the scan: its recurrence, one token at a time, plain autograd, never fast.

States and sums are float32, or float64 if any input is. It is differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.ssd.common import Choices


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    choices: Choices,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, P] in the dtype of x and the last state [B, H, P, N].

    Args:
        x: [B, L, H, P].
        dt, a: steps and the logarithms of the decays, [B, L, H].
        b, c: [B, L, G, N].
        skip: D of each head and channel, [B, H, P].
        initial: [B, H, P, N], the state before the first token that is scanned.
        choices: the chunk is not looked at.
    """
    dtype = accumulator(x, dt, b, c)
    batch, length, heads, channels = x.shape
    of_group = heads // b.shape[2]
    x_, b_, c_ = x.to(dtype), b.to(dtype), c.to(dtype)
    keep = a.exp()  # [B, L, H]
    state = x_.new_zeros(batch, heads, channels, b.shape[3])
    if initial is not None:
        state = initial.to(dtype)
    y: list[Tensor] = [x_] * length
    for t in reversed(range(length)) if choices.reverse else range(length):
        k = b_[:, t].repeat_interleave(of_group, 1)[:, :, None]  # [B, H, 1, N]
        q = c_[:, t].repeat_interleave(of_group, 1)[..., None]  # [B, H, N, 1]
        u = (dt[:, t, :, None] * x_[:, t])[..., None]  # [B, H, P, 1]
        state = keep[:, t, :, None, None] * state + u * k
        y[t] = (state @ q)[..., 0]
    o = torch.stack(y, 1)
    if skip is not None:
        o = o + skip[:, None].to(dtype) * x_
    return o.to(x.dtype).contiguous(), state.contiguous()
