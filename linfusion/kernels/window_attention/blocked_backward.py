"""Gradients of window attention over tiles: scores are computed again, a tile at a time.

With p_ij = exp(scale q_i·k_j - l_i) and δ_i = do_i·o_i - dl_i:

    dv_j = Σ_i p_ij do_i,  ds_ij = p_ij (do_i·v_j - δ_i),
    dq_i = scale Σ_j ds_ij k_j,  dk_j = scale Σ_i ds_ij q_i

where l counts every key that i sees, so the parts of a softmax that were merged have gradients of
their own. All of it is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.pages import empty_output
from linfusion.kernels.window_attention.blocks import (
    SCORES,
    TILES,
    Masks,
    Part,
    blocks_of,
    count_bias,
    dense_bias,
    is_dense,
    plan,
)

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Queries(NamedTuple):
    """Queries of some heads, and what their gradient dq is added up from.

    Attributes:
        q, do, dq: [h, n, D].
        lse, delta: l and δ, [h, n].
    """

    q: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor

    def part(self, n: slice) -> Queries:
        """Some of them, as views."""
        return Queries(*(x[:, n] for x in self))


class Keys(NamedTuple):
    """Keys and values [h, m, D] of some heads, and their gradients, to be added to."""

    k: Tensor
    v: Tensor
    dk: Tensor
    dv: Tensor

    def part(self, m: slice) -> Keys:
        """Some of them, as views."""
        return Keys(*(x[:, m] for x in self))


def attention_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    o: Tensor,
    lse: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...] = (),
) -> Grads:
    """dq, dk, dv, dk_all and dv_all, as their tensors."""
    if is_dense(grid, radius, shape):
        bias = dense_bias(grid, radius, shape, k_all.shape[1], tiled, q, cells)
        return _dense(do, dlse, q, k, v, k_all, v_all, o, lse, bias, scale)
    dtype = accumulator(q)
    tile = TILES[len(grid)]
    masks = Masks(radius, shape, tile, dtype, q.device)
    dq = empty_output(q.shape, q.dtype, q.device)
    # Halos overlap: gradients of keys are sums over tiles.
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    every = [x.to(dtype).transpose(1, 2).contiguous() for x in (k_all, v_all)]  # [B, H, T, D]
    d_every = [torch.zeros_like(x) for x in every]
    batch, _, count, dim = q.shape
    together = plan(grid, radius, count, dim, tile)
    spare = [torch.empty(together.queries, dtype=dtype, device=q.device) for _ in range(5)]
    spare += [torch.empty(together.keys, dtype=dtype, device=q.device) for _ in range(2)]
    for b, heads, block in blocks_of(grid, radius, batch, count, together):
        part = Part(grid, heads, tiled, q)
        rows = [
            part.read(x[b], block.queries, into)
            for x, into in zip((q, do, o, lse, dlse), spare[:5], strict=True)
        ]
        q_b, do_b, o_b, lse_b, dlse_b = (x.flatten(1, len(grid)) for x in rows)  # [h, q, ...]
        delta = (do_b * o_b).sum(-1) - dlse_b
        queries = Queries(q_b, do_b, lse_b, delta, torch.zeros_like(q_b))
        k_b, v_b = (
            part.read(x[b], block.keys, into) for x, into in zip((k, v), spare[5:], strict=True)
        )
        dk_b, dv_b = torch.zeros_like(k_b), torch.zeros_like(v_b)
        keys = Keys(*(x.flatten(1, len(grid)) for x in (k_b, v_b, dk_b, dv_b)))
        across, key_across = (math.prod(x.shape[2:-1]) for x in (rows[0], k_b))
        for group in block.groups:
            bias = masks.of(block, group)
            for i in range(group.tiles):
                n = _rows(group.first + i * group.rows, group.rows, across)
                m = _rows(group.key_first + i * group.rows, group.key_rows, key_across)
                _accumulate(queries.part(n), keys.part(m), bias, scale)
        if k_all.shape[1]:
            everywhere = Keys(*(x[b, heads] for x in (*every, *d_every)))
            counted = None
            if cells:
                counted = count_bias(grid, cells, radius, shape, k_all.shape[1], q, block.queries)
            _over_all(queries, everywhere, counted, scale)
        part.write(dq[b], block.queries, queries.dq[:, None], 1)
        part.add(dk[b], block.keys, dk_b)
        part.add(dv[b], block.keys, dv_b)
    dk_all, dv_all = (x.transpose(1, 2).to(q.dtype).contiguous() for x in d_every)
    return dq, dk.to(q.dtype), dv.to(q.dtype), dk_all, dv_all


def _rows(first: int, count: int, across: int) -> slice:
    return slice(first * across, (first + count) * across)


def _dense(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    o: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Grads:
    batch, always = q.shape[0], k_all.shape[1]
    dtype = accumulator(q)

    def fold(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(1, 2).flatten(0, 1)  # [BH, N, ...]

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, -1)).transpose(1, 2).to(q.dtype)

    k_b, v_b = fold(torch.cat([k_all, k], 1)), fold(torch.cat([v_all, v], 1))
    do_b, q_b = fold(do), fold(q)
    delta = (do_b * fold(o)).sum(-1) - fold(dlse)
    queries = Queries(q_b, do_b, fold(lse), delta, torch.zeros_like(q_b))
    keys = Keys(k_b, v_b, torch.zeros_like(k_b), torch.zeros_like(v_b))
    _over_all(queries, keys, bias, scale)
    dk, dv = unfold(keys.dk), unfold(keys.dv)
    parts = unfold(queries.dq), dk[:, always:], dv[:, always:], dk[:, :always], dv[:, :always]
    dq, dk, dv, dk_all, dv_all = (x.contiguous() for x in parts)
    return dq, dk, dv, dk_all, dv_all


def _over_all(queries: Queries, keys: Keys, bias: Tensor | None, scale: float) -> None:
    """`_accumulate`, as many queries at a time as their scores allow."""
    step = max(1, SCORES // (keys.k.shape[0] * keys.k.shape[1]))
    for start in range(0, queries.q.shape[1], step):
        n = slice(start, start + step)
        _accumulate(queries.part(n), keys, None if bias is None else bias[n], scale)


def _accumulate(queries: Queries, keys: Keys, bias: Tensor | None, scale: float) -> None:
    """Add to the gradients of queries and keys what they give each other."""
    q, do, lse, delta, dq = queries
    k, v, dk, dv = keys
    if bias is None:
        p = torch.bmm(q, k.mT).mul_(scale)  # [h, n, m]
    else:
        p = torch.baddbmm(bias, q, k.mT, alpha=scale)
    p.sub_(lse[..., None]).exp_()
    dv.baddbmm_(p.mT, do)
    ds = torch.bmm(do, v.mT).sub_(delta[..., None]).mul_(p)
    dq.baddbmm_(ds, k, alpha=scale)
    dk.baddbmm_(ds.mT, q, alpha=scale)
