"""The definitions: what the operators that these kernels stand for compute, plain autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels.common import accumulator


def norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """lrelu(LN(x)) over the last axis, in the dtype of x."""
    return F.leaky_relu(F.layer_norm(x, x.shape[-1:], weight, bias, eps), slope)


def rotary_rms_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis of [B, N, H, D], then each pair of channels turned."""
    y = F.rms_norm(x, x.shape[-1:], weight, eps).to(accumulator(x))
    real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, H, D/2]
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (y * cos[None, :, None].to(y) + turned * sin[None, :, None].to(y)).to(x.dtype)


def directional_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    first: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """A filter [C, taps] of each channel along [B, L, C], in one or two directions, and SiLU.

    The forward direction sees a token and those before it. The backward one reads [x_first, ...,
    x_L-1, x_0, ..., x_first-1] from its end, and its results are in that order, so that a reversed
    scan takes them as they are.
    """
    outputs = []
    for w, b, back in ((weight, bias, False), (weight_b, bias_b, True)):
        if w is None:
            outputs.append(x.new_empty(0))
            continue
        taps, order = w.shape[1], x
        if back:
            order = torch.cat([x[:, first:], x[:, :first]], 1).flip(1)
        padded = F.pad(order.transpose(1, 2), (taps - 1, 0))
        y = F.conv1d(padded, w[:, None], b, groups=x.shape[2]).transpose(1, 2)
        y = F.silu(y) if silu else y
        outputs.append((y.flip(1) if back else y).contiguous())
    return outputs[0], outputs[1]


def gated_rms_norm(
    x: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    gate_last: bool,
) -> Tensor:
    """RMSNorm of (x + other) · scale · silu(z) over the last axis of [B, L, G, D]."""
    dtype = accumulator(x)
    y = x.to(dtype) if other is None else x.to(dtype) + other.to(dtype)
    y = y * scale
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not gate_last:
        y = y * gate
    if weight is not None:
        y = F.rms_norm(y, y.shape[-1:], eps=eps) * weight.to(dtype)
    if gate is not None and gate_last:
        y = y * gate
    return y.to(x.dtype)
