"""Linear attention on CPUs that multiply bfloat16: the features are bfloat16 from the start.

φ of a bfloat16 number is rounded once: of elu + 1's two terms one is always exact. So features are
what float32 ones narrowed would be, for half the memory. Sums over blocks keep
float32. Differences would show what the state has rounded: gradients are taken by `blocked` from a
state of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.linear_attention.blocked import BF16_PRODUCTS, block_numel, blocks
from linfusion.kernels.linear_attention.common import RELU_EPS, Choices, LinearState
from linfusion.kernels.pages import empty_output


def applies(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None) -> bool:
    """Whether this serves: it is the faster way, but weighs no keys."""
    bf16 = q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu"
    return BF16_PRODUCTS and bf16 and key_weight is None


def state_forward(k: Tensor, v: Tensor, feature_map: str) -> LinearState:
    """As `blocked.state_forward`, without weights."""
    batch, tokens, heads, dim = k.shape
    width = v.shape[3]
    # A column of ones beside the values sums φ(k) in the same product; 8 keep rows aligned.
    total = k.new_zeros(batch, heads, dim, width + 8, dtype=torch.float32)
    numel = block_numel(k, v)
    features, spare = (k.new_empty(numel) for _ in range(2))
    values = k.new_empty(numel // width * (width + 8))
    x = values[:0]
    for b, n in blocks(k, v):
        y = _phi(k[b, n], feature_map, features, spare).flatten(0, 1)  # [bH, n, D]
        v_heads = v[b, n].transpose(1, 2)
        if x.shape[:-1] != v_heads.shape[:-1]:  # the blocks before keep their ones
            x = values[: v_heads.numel() // width * (width + 8)]
            x = x.view(*v_heads.shape[:-1], width + 8)
            x[..., width:] = 1
        x[..., :width] = v_heads
        total[b] += torch.bmm(y.mT, x.flatten(0, 1)).view(-1, heads, dim, width + 8)
    total /= tokens
    count = k.new_full((batch,), tokens, dtype=torch.float32)
    return LinearState(total[..., :width].contiguous(), total[..., width].contiguous(), count)


def read_forward(q: Tensor, state: LinearState, choices: Choices) -> Tensor:
    """As `blocked.read_forward`: what queries [B, N, H, D] read from a state, [B, N, H, E]."""
    kv, k_mean, count = state
    feature_map, normalizer, eps = choices
    o = empty_output((*q.shape[:3], kv.shape[3]), q.dtype, q.device)
    # Sums over a power of two, not means: what was rounded to add up is not rounded again.
    count = count[:, None, None, None]
    power = torch.exp2(torch.log2(count).ceil()) if normalizer != "none" else torch.ones_like(count)
    scale = count / power
    s, m = ((x * scale).to(q.dtype) for x in (kv, k_mean[..., None]))  # [B, H, D, E], [B, H, D, 1]
    shift = scale * eps if normalizer == "mean" else eps / power
    features, spare = (q.new_empty(block_numel(q, o)) for _ in range(2))
    for b, n in blocks(q, o):
        y = _phi(q[b, n], feature_map, features, spare)  # [b, H, n, D]
        if normalizer != "none":
            z = torch.bmm(y.flatten(0, 1), m[b].flatten(0, 1)).view(*y.shape[:3], 1)
            z += shift[b]
            # Dividing the features instead of what they read leaves the product free to write o. A
            # divisor for each feature is quicker than one that is broadcast, even so.
            y /= _like(y, spare).copy_(z.expand_as(y))
        for y_b, s_b, o_b in zip(y, s[b], o[b, n], strict=True):
            torch.bmm(y_b, s_b, out=o_b.transpose(0, 1))
    return o


def _phi(x: Tensor, feature_map: str, y: Tensor, t: Tensor) -> Tensor:
    """φ of [b, n, H, D] as [b, H, n, D], contiguous in the buffer y; t is overwritten."""
    y_heads = _like(x.transpose(1, 2), y)
    if feature_map == "identity":
        return y_heads.copy_(x.transpose(1, 2))
    # In the order of x, which the caches are yet to see; what is copied then is near.
    y, t = _like(x, y), _like(x, t)
    if feature_map == "elu1":  # exp(min(x, 0)) + max(x, 0): one is 1 or 0
        # Bits of bfloat16 order as whole numbers on either side of 0, and clamp in a third of the
        # time. A NaN passes through one of the two, by its sign.
        bits = x.view(torch.int16)
        torch.clamp(bits, max=0, out=y.view(torch.int16))
        torch.clamp(bits, min=0, out=t.view(torch.int16))
        t += y.exp_()
    else:
        torch.clamp(x, min=0, out=t)
        if feature_map == "relu_eps":
            t.add_(RELU_EPS)
    return y_heads.copy_(t.transpose(1, 2))


def _like(x: Tensor, t: Tensor) -> Tensor:
    """The start of the buffer t in the shape of x."""
    return t[: x.numel()].view(x.shape)
