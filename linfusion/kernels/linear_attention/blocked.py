"""Linear attention over cache-sized blocks of tokens: the production path without a GPU.

Two passes. The first adds φ(k)ᵀ v of each block to a float32 state, the second reads each block of
queries from it. Nothing as long as the tokens is allocated but the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.linear_attention.common import accumulator

BLOCK = 1024  # tokens


def _phi(x: Tensor, feature_map: str, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype, copy=True)
    if feature_map == "elu1":
        return x.clamp(max=0).exp_().add_(x.relu_())
    return x.relu_() if feature_map == "relu" else x


def _slope(y: Tensor, feature_map: str) -> Tensor | float:
    """φ'(x) from y = φ(x)."""
    if feature_map == "elu1":
        return y.clamp(max=1)
    return (y > 0).to(y.dtype) if feature_map == "relu" else 1.0


def _over(count: Tensor) -> Tensor:
    """1/count, and 0 for an empty state."""
    return torch.where(count == 0, torch.zeros_like(count), 1 / count)


def state_forward(
    k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the keys: φ(k)ᵀ v [B, H, D, E], φ(k) [B, H, D], and their count [B]."""
    dtype = accumulator(k, v)
    batch, tokens, heads, dim = k.shape
    kv = torch.zeros(batch, heads, dim, v.shape[3], dtype=dtype, device=k.device)
    k_sum = torch.zeros(batch, heads, dim, dtype=dtype, device=k.device)
    for start in range(0, tokens, BLOCK):
        block = slice(start, start + BLOCK)
        y = _phi(k[:, block], feature_map, dtype)  # [B, n, H, D]
        if key_weight is not None:
            y *= key_weight[:, block, None, None]
        kv += torch.einsum("bnhd,bnhe->bhde", y, v[:, block].to(dtype))
        k_sum += y.sum(1)
    if key_weight is None:
        count = torch.full((batch,), tokens, dtype=dtype, device=k.device)
    else:
        count = key_weight.sum(1)
    scale = _over(count)
    return kv.mul_(scale[:, None, None, None]), k_sum.mul_(scale[:, None, None]), count


def read_forward(
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    count: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """What queries [B, N, H, D] read from a state: [B, N, H, E] in `out_dtype`."""
    batch, tokens, heads, _ = q.shape
    o = torch.empty(batch, tokens, heads, kv.shape[3], dtype=out_dtype, device=q.device)
    for start in range(0, tokens, BLOCK):
        block = slice(start, start + BLOCK)
        y = _phi(q[:, block], feature_map, kv.dtype)
        x = torch.einsum("bnhd,bhde->bnhe", y, kv)
        if normalizer == "none":
            x *= count[:, None, None, None]
        else:
            x *= _over_z(y, k_mean, normalizer, eps, count)[..., None]
        o[:, block] = x
    return o


def _over_z(y: Tensor, k_mean: Tensor, normalizer: str, eps: float, count: Tensor) -> Tensor:
    z = torch.einsum("bnhd,bhd->bnh", y, k_mean)
    if normalizer == "mean":
        return z.add_(eps).reciprocal_()
    return z.add_((eps / count)[:, None, None]).reciprocal_()


def read_backward(
    do: Tensor,
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    count: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a read: dq as q, dkv as kv, dk_mean as k_mean."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkv, dk_mean = torch.zeros_like(kv), torch.zeros_like(k_mean)
    for start in range(0, q.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        y = _phi(q[:, block], feature_map, kv.dtype)  # [B, n, H, D]
        x = do[:, block].to(kv.dtype)  # [B, n, H, E]
        if normalizer == "none":
            x = x * count[:, None, None, None]
            g = torch.einsum("bnhe,bhde->bnhd", x, kv)
        else:
            over_z = _over_z(y, k_mean, normalizer, eps, count)[..., None]
            x = x * over_z
            g = torch.einsum("bnhe,bhde->bnhd", x, kv)  # g/z
            delta = -(y * g).sum(-1, keepdim=True).mul_(over_z)  # dL/dz = -φ(q)·g/z²
            g += delta * k_mean[:, None]
            dk_mean += (delta * y).sum(1)
        dkv += torch.einsum("bnhd,bnhe->bhde", y, x)
        dq[:, block] = g.mul_(_slope(y, feature_map))
    return dq, dkv, dk_mean


def state_backward(
    dkv: Tensor,
    dk_mean: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    count: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of a state: dk as k, dv as v."""
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    scale = _over(count)
    dkv = dkv * scale[:, None, None, None]
    dk_mean = (dk_mean * scale[:, None, None])[:, None]
    for start in range(0, k.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        y = _phi(k[:, block], feature_map, dkv.dtype)
        g = torch.einsum("bnhe,bhde->bnhd", v[:, block].to(dkv.dtype), dkv).add_(dk_mean)
        x = torch.einsum("bnhd,bhde->bnhe", y, dkv)
        if key_weight is not None:
            w = key_weight[:, block, None, None]
            g *= w
            x *= w
        dk[:, block] = g.mul_(_slope(y, feature_map))
        dv[:, block] = x
    return dk, dv


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    kv: Tensor,
    k_mean: Tensor,
    count: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the whole: dq, dk, dv as q, k, v. Neither o nor z was saved."""
    dq, dkv, dk_mean = read_backward(do, q, kv, k_mean, count, feature_map, normalizer, eps)
    dk, dv = state_backward(dkv, dk_mean, k, v, key_weight, count, feature_map)
    return dq, dk, dv
