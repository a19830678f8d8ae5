"""Hybrid attention over tiles and blocks of tokens: the production path without a GPU.

What a window sees of a linear sum, w_ij = φ(q_i)·φ(k_j), is found tile by tile as its scores are,
so that it can be left out of the sum over everything. The join of near and far is some products
over a block of tokens at a time. Nothing as long as the tokens is allocated but results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.window_attention.blocks import (
    TILES,
    Block,
    Masks,
    Part,
    blocks_of,
    dense_bias,
    is_dense,
    plan,
)

# Elements of a block of tokens that are joined at a time: 4 MB in float32, and 128 MB on a GPU,
# where every block costs launches.
JOINED, JOINED_ON_GPU = 1 << 20, 1 << 25


def window_sum(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
) -> tuple[Tensor, Tensor]:
    """scale · Σ_j w_ij v_j [B, N, H, D] and scale · Σ_j w_ij [B, N, H] over windows."""
    dtype = accumulator(v)
    num = torch.empty(v.shape, dtype=dtype, device=v.device)
    den = torch.empty(v.shape[:3], dtype=dtype, device=v.device)
    if is_dense(grid, radius, shape):
        w = _dense_weights(phi_q, phi_k, grid, radius, shape, tiled).mul_(scale)
        den.copy_(w.sum(-1).transpose(1, 2))
        num.copy_((w @ _heads_first(v, dtype)).transpose(1, 2))
        return num, den
    sources = ((phi_q, "q"), (phi_k, "k"), (v, "k"))
    for b, block, part, read, pairs in _tiles(sources, grid, radius, shape, tiled):
        q_b, k_b, v_b = read
        num_b = torch.empty(*q_b.shape[:2], v.shape[3], dtype=dtype, device=v.device)
        den_b = torch.empty(q_b.shape[:2], dtype=dtype, device=v.device)
        for n, m, seen in pairs:
            w = torch.bmm(q_b[:, n], k_b[:, m].mT).mul_(seen)
            torch.sum(w, -1, out=den_b[:, n])
            torch.bmm(w, v_b[:, m], out=num_b[:, n])
        part.write(num[b], block.queries, num_b.mul_(scale)[:, None], 1)
        part.write(den[b], block.queries, den_b.mul_(scale)[:, None], 1)
    return num, den


def window_sum_backward(
    dnum: Tensor,
    dden: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients: dw_ij = scale (dnum_i·v_j + dden_i) in the window."""
    dtype = accumulator(v)
    if is_dense(grid, radius, shape):
        w = _dense_weights(phi_q, phi_k, grid, radius, shape, tiled)
        seen = dense_bias(grid, radius, shape, 0, tiled, v)
        q, k, v_h, do = (_heads_first(x, dtype) for x in (phi_q, phi_k, v, dnum))
        dw = (do @ v_h.mT).add_(dden.to(dtype).transpose(1, 2)[..., None])
        if seen is not None:
            dw.masked_fill_(seen != 0, 0)
        grads = (dw @ k, dw.mT @ q, w.mT @ do)
        found = (
            x.mul_(scale).transpose(1, 2).to(like.dtype).contiguous()
            for x, like in zip(grads, (phi_q, phi_k, v), strict=True)
        )
        dq, dk, dv = found
        return dq, dk, dv
    dq = torch.empty(phi_q.shape, dtype=phi_q.dtype, device=v.device)
    # Halos overlap: gradients of keys are sums over tiles.
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=v.device) for x in (phi_k, v))
    sources = ((phi_q, "q"), (dnum, "q"), (dden, "q"), (phi_k, "k"), (v, "k"))
    for b, block, part, read, pairs in _tiles(sources, grid, radius, shape, tiled):
        q_b, do_b, dz_b, k_b, v_b = read
        dq_b, dk_b, dv_b = (torch.zeros_like(x) for x in (q_b, k_b, v_b))
        for n, m, seen in pairs:
            w = torch.bmm(q_b[:, n], k_b[:, m].mT).mul_(seen)
            dv_b[:, m].baddbmm_(w.mT, do_b[:, n])
            dw = torch.bmm(do_b[:, n], v_b[:, m].mT).add_(dz_b[:, n, None]).mul_(seen)
            torch.bmm(dw, k_b[:, m], out=dq_b[:, n])
            dk_b[:, m].baddbmm_(dw.mT, q_b[:, n])
        part.write(dq[b], block.queries, dq_b.mul_(scale)[:, None], 1)
        keys = [s.stop - s.start for s in block.keys]
        part.add(dk[b], block.keys, dk_b.mul_(scale).unflatten(1, keys))
        part.add(dv[b], block.keys, dv_b.mul_(scale).unflatten(1, keys))
    return dq, dk.to(phi_k.dtype), dv.to(v.dtype)


def join(
    o: Tensor,
    lse: Tensor,
    phi_q: Tensor,
    rotated_q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    log_weight: Tensor,
    num: Tensor,
    den: Tensor,
) -> tuple[Tensor, Tensor]:
    """Near and far in one normalisation; arguments as for the operator `hybrid_join`."""
    dtype = accumulator(o)
    joined = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    total = torch.empty(lse.shape, dtype=dtype, device=o.device)
    g = log_weight.to(dtype)[:, :, None]  # [B, H, 1]
    for n in _blocks(o):
        far, z = _far(phi_q, rotated_q, kv, k_mean, num, den, n)
        near, own = o[:, n].transpose(1, 2).to(dtype), lse[:, n].transpose(1, 2)
        top = torch.maximum(own, g + z.clamp(min=torch.finfo(dtype).tiny).log())
        a, t = (own - top).exp_(), (g - top).exp_().masked_fill_(z <= 0, 0)
        both = a + t * z
        far.mul_((t / both)[..., None]).add_(near * (a / both)[..., None])
        joined[:, n] = far.transpose(1, 2)
        total[:, n] = (top + both.log()).transpose(1, 2)
    return joined, total


def join_backward(
    do: Tensor,
    dlse: Tensor,
    o: Tensor,
    lse: Tensor,
    phi_q: Tensor,
    rotated_q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    log_weight: Tensor,
    num: Tensor,
    den: Tensor,
    joined: Tensor,
    total: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of `join`.

    With a = exp(l - L), t = exp(g - L), joined output ō and log-sum-exp L, δ = do·ō:

        do_near = a do,  dl = a (do·o - δ + dL),  dnum = t do,  dz = t (dL - δ),
        dg = Σ_i a (δ - do·o) + (1 - a) dL
    """
    dtype = accumulator(o)
    g = log_weight.to(dtype)[:, :, None]
    d_o, d_lse, d_phi, d_rotated = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o, lse, phi_q, rotated_q)
    )
    d_kv, d_mean = torch.zeros_like(kv), torch.zeros_like(k_mean)
    d_weight = torch.zeros_like(log_weight, dtype=dtype)
    d_num, d_den = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (num, den))
    for n in _blocks(o):
        _, z = _far(phi_q, rotated_q, kv, k_mean, num, den, n)
        near, out, grad = (_heads_first(x[:, n], dtype) for x in (o, joined, do))
        near_l, L, dL = (x[:, n].transpose(1, 2).to(dtype) for x in (lse, total, dlse))
        a, t = (near_l - L).exp_(), (g - L).exp_().masked_fill_(z <= 0, 0)
        delta, own = (grad * out).sum(-1), (grad * near).sum(-1)
        d_o[:, n] = (a[..., None] * grad).transpose(1, 2)
        d_lse[:, n] = (a * (own - delta + dL)).transpose(1, 2)
        d_weight += (a * (delta - own) + (1 - a) * dL).sum(-1)
        above = grad.mul_(t[..., None])  # dnum
        below = t.mul_(dL - delta)  # dz
        d_rotated[:, n] = (above @ kv.mT).transpose(1, 2)
        d_phi[:, n] = (below[..., None] * k_mean[:, :, None]).transpose(1, 2)
        d_kv += _heads_first(rotated_q[:, n], dtype).mT @ above
        d_mean += (below[:, :, None] @ _heads_first(phi_q[:, n], dtype))[:, :, 0]
        if num.numel():
            d_num[:, n] = -above.transpose(1, 2)
            d_den[:, n] = -below.transpose(1, 2)
    return d_o, d_lse, d_phi, d_rotated, d_kv, d_mean, d_weight.to(log_weight.dtype), d_num, d_den


def _far(
    phi_q: Tensor,
    rotated_q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    num: Tensor,
    den: Tensor,
    n: slice,
) -> tuple[Tensor, Tensor]:
    """Numerator [B, H, n, D] and denominator [B, H, n] of the far part, on the scale of means."""
    far = rotated_q[:, n].transpose(1, 2).to(kv.dtype) @ kv
    z = (phi_q[:, n].transpose(1, 2).to(kv.dtype) @ k_mean[..., None])[..., 0]
    if num.numel():
        far.sub_(num[:, n].transpose(1, 2))
        z.sub_(den[:, n].transpose(1, 2))
    return far, z


def _blocks(o: Tensor) -> Iterator[slice]:
    batch, tokens, heads, d = o.shape
    most = JOINED if o.device.type == "cpu" else JOINED_ON_GPU
    step = max(1, most // (batch * heads * d))
    for start in range(0, tokens, step):
        yield slice(start, start + step)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2).contiguous()


def _dense_weights(
    phi_q: Tensor, phi_k: Tensor, grid: tuple[int, ...], radius: float, shape: str, tiled: bool
) -> Tensor:
    """w [B, H, N, N], 0 outside of windows."""
    dtype = accumulator(phi_q)
    w = _heads_first(phi_q, dtype) @ _heads_first(phi_k, dtype).mT
    seen = dense_bias(grid, radius, shape, 0, tiled, phi_q)
    return w if seen is None else w.masked_fill_(seen != 0, 0)


Pairs = Iterator[tuple[slice, slice, Tensor]]


def _tiles(
    sources: tuple[tuple[Tensor, str], ...],
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    tiled: bool,
) -> Iterator[tuple[int, Block, Part, list[Tensor], Pairs]]:
    """Batch index and blocks of some heads, with what is read for them.

    Yields:
        With each the sources' tokens of the block [h, tokens, ...], of its queries or of its keys,
        and for each of its tiles the range of queries, the range of keys, and what sees what as
        ones and zeros [q, K].
    """
    first = sources[0][0]
    dtype, tile = accumulator(first), TILES[len(grid)]
    masks = Masks(radius, shape, tile, dtype, first.device)
    width = max(x.shape[3] for x, _ in sources if x.dim() == 4)
    together = plan(grid, radius, first.shape[2], width, tile)
    for b, heads, block in blocks_of(grid, radius, first.shape[0], first.shape[2], together):
        part = Part(grid, heads, tiled, first)
        read = []
        for x, kind in sources:
            where = block.queries if kind == "q" else block.keys
            inner = (heads.stop - heads.start) * math.prod(x.shape[3:])
            size = inner * math.prod(s.stop - s.start for s in where)
            spare = torch.empty(size, dtype=dtype, device=x.device)
            read.append(part.read(x[b], where, spare).flatten(1, len(grid)))
        yield b, block, part, read, _pairs(block, masks)


def _pairs(block: Block, masks: Masks) -> Pairs:
    across = math.prod(s.stop - s.start for s in block.queries[1:])
    key_across = math.prod(s.stop - s.start for s in block.keys[1:])
    for group in block.groups:
        seen = masks.of(block, group).exp()  # of 0 and -inf
        for i in range(group.tiles):
            n = (group.first + i * group.rows) * across
            m = (group.key_first + i * group.rows) * key_across
            n_end, m_end = n + group.rows * across, m + group.key_rows * key_across
            yield slice(n, n_end), slice(m, m_end), seen
