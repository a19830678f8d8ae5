"""Linear attention on CPUs that multiply bfloat16: the features are bfloat16 from the start.

φ of a bfloat16 number is rounded once: of elu + 1's two terms one is always exact. So features are
what float32 ones narrowed would be, for half the memory and without a copy. Sums over blocks and z
keep float32. Differences would show what the state has rounded: gradients are taken by `blocked`
from a state of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.linear_attention.blocked import BF16_PRODUCTS, block_numel, blocks, over
from linfusion.kernels.linear_attention.common import RELU_EPS
from linfusion.kernels.pages import empty_output


def applies(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None) -> bool:
    """Whether this is faster: not for many narrow heads, whose z would cost more than the rest."""
    bf16 = q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu"
    return BF16_PRODUCTS and bf16 and key_weight is None and q.shape[2] <= v.shape[3]


def state_forward(k: Tensor, v: Tensor, feature_map: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `blocked.state_forward`, without weights: φ(k)ᵀ v, φ(k) and their count, float32."""
    batch, tokens, heads, dim = k.shape
    kv = k.new_zeros(batch * heads, dim, v.shape[3], dtype=torch.float32)
    k_sum = k.new_zeros(batch, heads, dim, dtype=torch.float32)
    numel = block_numel(k, v)
    features, spare, values = (k.new_empty(numel) for _ in range(3))
    for b, n in blocks(k, v):
        y = _phi(k[b, n], feature_map, features, spare)  # [b, n, H, D]
        # A sum would widen y first. Rounded once a block, as kv is.
        ones = y.new_ones(1, 1, y.shape[1]).expand(len(y), -1, -1)
        k_sum[b] += torch.bmm(ones, y.flatten(2)).view(len(y), heads, dim)
        y, x = _heads_first(y, spare), _heads_first(v[b, n], values)
        first = b.start * heads
        kv[first : first + len(y)] += torch.bmm(y.transpose(1, 2), x)
    count = k.new_full((batch,), tokens, dtype=torch.float32)
    return kv.view(batch, heads, dim, -1).div_(tokens), k_sum.div_(tokens), count


def read_forward(
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    count: Tensor,
) -> Tensor:
    """As `blocked.read_forward`: what queries [B, N, H, D] read from a state, [B, N, H, E]."""
    o = empty_output((*q.shape[:3], kv.shape[3]), q.dtype, q.device)
    if normalizer == "none":
        kv = kv * count[:, None, None, None]
    # What is added to z, on the scale of the mean.
    shift = torch.full_like(count, eps) if normalizer == "mean" else eps * over(count)
    s = kv.to(q.dtype)
    m = _block_diagonal(k_mean.to(q.dtype))  # [B, HD, H]
    features, spare = (q.new_empty(block_numel(q, o)) for _ in range(2))
    for b, n in blocks(q, o):
        y = _phi(q[b, n], feature_map, features, spare)  # [b, n, H, D]
        if normalizer != "none":
            z = _float32_product(y.flatten(2), m[b]).add_(shift[b, None, None])
            # Scaling the features instead of what they read leaves the product free to write o.
            y = torch.mul(y, z.reciprocal_().to(y.dtype)[..., None], out=_like(y, spare))
        for y_b, s_b, o_b in zip(y, s[b], o[b, n], strict=True):
            torch.bmm(y_b.transpose(0, 1), s_b, out=o_b.transpose(0, 1))
    return o


def _phi(x: Tensor, feature_map: str, y: Tensor, t: Tensor) -> Tensor:
    """φ of [b, n, H, D] in the buffer y, in the order of x; the buffer t is overwritten."""
    y, t = _like(x, y), _like(x, t)
    if feature_map == "identity":
        return y.copy_(x)
    torch.clamp(x, min=0, out=y)
    if feature_map == "relu":
        return y
    if feature_map == "relu_eps":
        return y.add_(RELU_EPS)
    torch.clamp(x, max=0, out=t)
    return y.add_(t.exp_())  # exp(min(x, 0)) + max(x, 0): one of them is 1 or 0


def _float32_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of bfloat16 in float32: what one product has lost in rounding, a second finds."""
    z = torch.bmm(x, y)
    return z.float() + torch.baddbmm(z, x, y, beta=-1)


def _block_diagonal(m: Tensor) -> Tensor:
    """[B, H, D] as [B, HD, H], each head in a column of its own."""
    return torch.diag_embed(m.transpose(1, 2)).transpose(1, 2).flatten(1, 2)


def _heads_first(x: Tensor, t: Tensor) -> Tensor:
    """[b, n, H, E] as [bH, n, E], copied into the buffer t."""
    b, n, h, e = x.shape
    return t[: x.numel()].view(b, h, n, e).copy_(x.transpose(1, 2)).flatten(0, 1)


def _like(x: Tensor, t: Tensor) -> Tensor:
    """The start of the buffer t in the shape of x."""
    return t[: x.numel()].view(x.shape)
