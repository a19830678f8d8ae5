"""Linear attention over cache-sized blocks of tokens: the production path without a GPU.

Two passes. The first adds φ(k)ᵀ v of each block to a float32 state, the second reads each block of
queries from it. Nothing as long as the tokens is allocated but the output.

Features of a block are seen heads first, [b, H, n, D], so that one batched product serves all
heads; queries, keys, values and outputs keep their own strides, read and written in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.linear_attention.common import RELU_EPS, Choices, LinearState
from linfusion.kernels.pages import empty_output

# Elements of a block: 4 MB in float32, cached near the cores, and few enough calls. A short input
# is cut in SHARE blocks, lest scratch outweigh the output, but not into less than SMALL bytes each,
# where calls outweigh the work in them.
BLOCK, SHARE, SMALL = 1 << 20, 5, 5 << 18
# Sums of products have three levels, of CHAIN tokens, of RUN blocks, and of the whole: one long
# chain would round worse than the eager formula.
CHAIN, RUN = 256, 8
# Where bfloat16 products have instructions they take half the time of float32; elsewhere, twice.
BF16_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
LOG2_E = 1 / math.log(2)


def state_forward(k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str) -> LinearState:
    """Means over the keys."""
    dtype = accumulator(k, v)
    batch, tokens, heads, dim = k.shape
    kv = torch.zeros(batch, heads, dim, v.shape[3], dtype=dtype, device=k.device)
    k_sum = torch.zeros(batch, heads, dim, dtype=dtype, device=k.device)
    scratch = _scratch(dtype, k, v)
    _, size = _extent(k, v)
    chain = CHAIN if k.dtype == dtype else 4 * CHAIN  # inputs of 16 bits have rounded more
    for b, run in blocks(k, v, run=RUN):
        kv_b, k_b, k_run, v_run = kv[b], k_sum[b], k[b, run], v[b, run]
        alone = k_run.shape[1] == tokens
        kv_part, k_part = (kv_b, k_b) if alone else (torch.zeros_like(kv_b), torch.zeros_like(k_b))
        for n in _slices(k_run.shape[1], size):
            y, v_n = _phi(k_run[:, n], feature_map, *scratch), v_run[:, n]  # [b, H, n, D]
            if key_weight is not None:
                w = key_weight[b, run][:, n]
                y.mul_(w[:, None, :, None]).masked_fill_(w[:, None, :, None] == 0, 0)
                v_n = v_n.masked_fill(w[..., None, None] == 0, 0)
            x = _heads_first(v_n, scratch[1])  # [bH, n, E]
            y_chain, s = y.flatten(0, 1).transpose(1, 2), kv_part.flatten(0, 1)
            for m in _slices(x.shape[1], chain):
                s.baddbmm_(y_chain[:, :, m], x[:, m])
            k_part += y.sum(2)
        if not alone:
            kv_b += kv_part
            k_b += k_part
    if key_weight is None:
        count = torch.full((batch,), tokens, dtype=dtype, device=k.device)
        return LinearState(kv.div_(tokens), k_sum.div_(tokens), count)
    count = key_weight.sum(1)
    scale = over(count)
    return LinearState(kv.mul_(scale[:, None, None, None]), k_sum.mul_(scale[:, None, None]), count)


def read_forward(q: Tensor, state: LinearState, choices: Choices, out_dtype: torch.dtype) -> Tensor:
    """What queries [B, N, H, D] read from a state: [B, N, H, E] in `out_dtype`."""
    kv, k_mean, count = state
    o = empty_output((*q.shape[:3], kv.shape[3]), out_dtype, q.device)
    # Rounding both factors of the last product adds little to rounding o; S and z stay float32.
    narrow = out_dtype == torch.bfloat16 and q.device.type == "cpu" and BF16_PRODUCTS
    s = kv.to(out_dtype) if narrow else kv
    # Where its features fit, a block of o holds them until it is written.
    inside = out_dtype == kv.dtype and q.shape[3] <= o.shape[3]
    spare, *features = _scratch(kv.dtype, q, o, buffers=1 if inside else 2)
    for b, n in blocks(q, o):
        part = o[b, n]
        out = part.transpose(1, 2)  # [b, H, n, E]
        y = _phi(q[b, n], choices.feature_map, part.view(-1) if inside else features[0], spare)
        if choices.normalizer == "none":
            z = 1 / count[b, None, None, None]
        else:
            z = _z(y, k_mean[b], choices, count[b])
        if narrow and len(y) == 1:
            # Scaling the features instead of what they read leaves the product free to write o.
            x = spare.view(out_dtype)[: y.numel()].view(y.shape)
            # Two sweeps: one that multiplies and narrows at once is not vectorised. The reciprocal
            # rounds once more, far below what x rounds.
            x.copy_(y.mul_(z.reciprocal_()))
            torch.bmm(x[0], s[b][0], out=out[0])
        else:
            # Only to contiguous memory is a float32 product one call for all heads.
            x = spare[: out.numel()].view(out.shape)
            torch.bmm(y.flatten(0, 1), kv[b].flatten(0, 1), out=x.flatten(0, 1))
            torch.div(x, z, out=out)
    return o


def _extent(*tensors: Tensor) -> tuple[int, int]:
    """How many sequences and how many tokens of each make a block of [B, N, H, *]."""
    width = max(t.shape[2] * t.shape[3] for t in tensors)
    return _cut(*tensors[0].shape[:2], width, tensors[0].element_size())


@functools.lru_cache(256)
def _cut(batch: int, tokens: int, width: int, element_size: int) -> tuple[int, int]:
    most = min(BLOCK, max(SMALL // element_size, batch * tokens * width // SHARE))
    size = max(1, most // width)
    blocks = -(-tokens // size)
    return max(1, size // tokens), -(-tokens // blocks)  # of equal length but for the last


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(i, i + step) for i in range(0, length, step))


def blocks(*tensors: Tensor, run: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and tokens: `run` blocks of each [B, N, H, *]; short sequences together."""
    batch, tokens = tensors[0].shape[:2]
    group, size = _extent(*tensors)
    return ((b, n) for b in _slices(batch, group) for n in _slices(tokens, size * run))


def _scratch(dtype: torch.dtype, *tensors: Tensor, buffers: int = 2) -> list[Tensor]:
    """Flat buffers, each long enough for a block of any of the tensors."""
    size, device = block_numel(*tensors), tensors[0].device
    return [torch.empty(size, dtype=dtype, device=device) for _ in range(buffers)]


def block_numel(*tensors: Tensor) -> int:
    """Elements that a block of any of the tensors has at most."""
    batch, tokens = tensors[0].shape[:2]
    group, length = _extent(*tensors)
    rows = min(group, batch) * min(length, tokens)
    return rows * max(t.shape[2] * t.shape[3] for t in tensors)


def _phi(x: Tensor, feature_map: str, y: Tensor, t: Tensor) -> Tensor:
    """φ of [b, n, H, D] as [b, H, n, D] in the buffer y; the buffer t is overwritten."""
    b, n, h, d = x.shape
    # One sequence stays in the order of x, where every step is one contiguous sweep; of several,
    # batch and heads must be one axis to a batched product.
    y, t = (
        u[: x.numel()].view(b, n, h, d).transpose(1, 2)
        if b == 1
        else u[: x.numel()].view(b, h, n, d)
        for u in (y, t)
    )
    x = x.transpose(1, 2)
    if x.dtype != y.dtype:
        x = t.copy_(x)
    if feature_map == "identity":
        return y.copy_(x)
    if feature_map == "relu":
        return torch.clamp(x, min=0, out=y)
    if feature_map == "relu_eps":
        return torch.clamp(x, min=0, out=y).add_(RELU_EPS)
    # exp as exp2, whose float32 kernel takes a third of the time; where φ is not small, x is not
    # large and the rounding of x·log2(e) stays below that of the sum over d.
    torch.mul(x, LOG2_E, out=y).clamp_(max=0).exp2_()
    torch.clamp(x, min=0, out=t)
    return y.add_(t)  # exp(min(x, 0)) + max(x, 0)


def _heads_first(x: Tensor, t: Tensor) -> Tensor:
    """[b, n, H, E] as [bH, n, E] in the accumulator's dtype: a view when it can be one."""
    if x.dtype != t.dtype:
        x = t[: x.numel()].view(x.shape).copy_(x)
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def over(count: Tensor) -> Tensor:
    """1/count, and 0 for an empty state."""
    return torch.where(count == 0, torch.zeros_like(count), 1 / count)


def _z(y: Tensor, k_mean: Tensor, choices: Choices, count: Tensor) -> Tensor:
    """φ(q)·m + eps as [b, H, n, 1], eps on the scale of the mean."""
    # A row against a transposed row is summed as a dot product: half the error of a column's, and
    # z scales all of o.
    z = torch.bmm(y.flatten(0, 1), k_mean.flatten(0, 1)[:, None].mT).view(*y.shape[:3], 1)
    if choices.normalizer == "mean":
        return z.add_(choices.eps)
    return z.add_((choices.eps / count)[:, None, None, None])


def _slope(y: Tensor, feature_map: str) -> Tensor | float:
    """φ'(x) from y = φ(x)."""
    if feature_map == "elu1":
        return y.clamp(max=1)
    if feature_map == "relu_eps":
        return (y > RELU_EPS).to(y.dtype)
    return (y > 0).to(y.dtype) if feature_map == "relu" else 1.0


def read_backward(
    do: Tensor, q: Tensor, state: LinearState, choices: Choices
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a read: dq as q, dkv as kv, dk_mean as k_mean."""
    kv, k_mean, count = state
    dq = empty_output(q.shape, q.dtype, q.device)
    dkv, dk_mean = torch.zeros_like(kv), torch.zeros_like(k_mean)
    features, spare = _scratch(kv.dtype, q, do)
    for b, n in blocks(q, do):
        y = _phi(q[b, n], choices.feature_map, features, spare)  # [b, H, n, D]
        x = do[b, n].transpose(1, 2).to(kv.dtype)  # [b, H, n, E]
        if choices.normalizer == "none":
            x = x * count[b, None, None, None]
            g = x @ kv[b].transpose(2, 3)  # [b, H, n, D]
        else:
            over_z = _z(y, k_mean[b], choices, count[b]).reciprocal_()
            x = x * over_z
            g = x @ kv[b].transpose(2, 3)
            delta = (y * g).sum(-1, keepdim=True).mul_(over_z).neg_()  # dL/dz = -φ(q)·g/z²
            g += delta * k_mean[b, :, None]
            dk_mean[b] += (delta * y).sum(2)
        dkv[b] += y.transpose(2, 3) @ x
        dq[b, n] = g.mul_(_slope(y, choices.feature_map)).transpose(1, 2)
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
    dk = empty_output(k.shape, k.dtype, k.device)
    dv = empty_output(v.shape, v.dtype, v.device)
    scale = over(count)
    dkv = dkv * scale[:, None, None, None]
    dk_mean = dk_mean * scale[:, None, None]
    features, spare = _scratch(dkv.dtype, k, v)
    for b, n in blocks(k, v):
        y = _phi(k[b, n], feature_map, features, spare)  # [b, H, n, D]
        x = v[b, n].transpose(1, 2).to(dkv.dtype)  # [b, H, n, E]
        if key_weight is not None:
            w = key_weight[b, None, n, None]
            y.masked_fill_(w == 0, 0)
            x = x.masked_fill(w == 0, 0)
        g = (x @ dkv[b].transpose(2, 3)).add_(dk_mean[b, :, None])
        x = y @ dkv[b]
        if key_weight is not None:
            g *= w
            x *= w
        dk[b, n] = g.mul_(_slope(y, feature_map)).transpose(1, 2)
        dv[b, n] = x.transpose(1, 2)
    return dk, dv


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    state: LinearState,
    choices: Choices,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the whole: dq, dk, dv as q, k, v. Neither o nor z was saved."""
    dq, dkv, dk_mean = read_backward(do, q, state, choices)
    dk, dv = state_backward(dkv, dk_mean, k, v, key_weight, state.count, choices.feature_map)
    return dq, dk, dv
