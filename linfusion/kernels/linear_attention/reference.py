"""The definition of linear attention: plain autograd in float32 or float64, never fast.

Every other implementation is tested against this one, and this one against closed forms. It is
differentiable any number of times and in every tensor argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.library import without_autocast
from linfusion.kernels.linear_attention.common import RELU_EPS, Choices, LinearState


def phi(x: Tensor, feature_map: str) -> Tensor:
    """The feature map φ; elu(x) + 1 is exp(x) below zero, exact where elu(x) + 1 would cancel."""
    if feature_map == "elu1":
        # exp never sees a large argument: its infinity would turn the gradient of `where` to NaN.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "relu_eps":
        return x.relu() + RELU_EPS
    return x.relu() if feature_map == "relu" else x


def state_forward(k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str) -> LinearState:
    """Means over the keys."""
    dtype = accumulator(k, v)
    if key_weight is not None:  # what is masked may be anything, but 0 times NaN is NaN
        masked = (key_weight == 0)[:, :, None, None]
        k, v = (x.masked_fill(masked & ~x.isfinite(), 0) for x in (k, v))
    k, v = phi(k.to(dtype), feature_map), v.to(dtype)
    if key_weight is None:
        count = torch.full((k.shape[0],), k.shape[1], dtype=dtype, device=k.device)
    else:
        # Weights act after φ: φ(0) = 1 would let a masked key count.
        k = k * key_weight.to(dtype)[:, :, None, None]
        count = key_weight.to(dtype).sum(1)
    divisor = torch.where(count == 0, torch.ones_like(count), count)  # no key left: zeros, not 0/0
    with without_autocast(k.device):
        kv = torch.einsum("bmhd,bmhe->bhde", k, v) / divisor[:, None, None, None]
    return LinearState(kv, k.sum(1) / divisor[:, None, None], count)


def read_forward(q: Tensor, state: LinearState, choices: Choices, out_dtype: torch.dtype) -> Tensor:
    """What queries [B, N, H, D] read from a state: [B, N, H, E] in `out_dtype`."""
    kv, k_mean, count = state
    q = phi(q.to(kv.dtype), choices.feature_map)
    with without_autocast(q.device):
        o = torch.einsum("bnhd,bhde->bnhe", q, kv)
        z = torch.einsum("bnhd,bhd->bnh", q, k_mean)[..., None]
    count = count[:, None, None, None]
    if choices.normalizer == "mean":
        o = o / (z + choices.eps)
    elif choices.normalizer == "sum":
        o = o * count / (z * count + choices.eps)
    else:
        o = o * count
    # The strides of an einsum are the contraction's business; every implementation gives these.
    return o.to(out_dtype).contiguous()
