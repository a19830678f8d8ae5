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
