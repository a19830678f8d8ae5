"""Window attention over tiles of the grid: the production path without a GPU, forward.

Queries of a tile see the keys of the tile and of a halo around it, so work is O(N r²). Queries,
keys and values of a block of tiles are copied, heads first, to where the keys of each tile are
consecutive rows, and a whole group of tiles is then one call of attention with one mask, or some
products (`Products`). What every query sees (text, pooled tokens) is a second call, merged by
log-sum-exp. Nothing as long as the tokens is allocated but the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.window_attention import order
from linfusion.kernels.window_attention.blocked_backward import attention_backward
from linfusion.kernels.window_attention.blocks import (
    LANES,
    SCORES,
    UNSEEN,
    Masks,
    Part,
    blocks_of,
    count_bias,
    dense_bias,
    forward_tile,
    is_dense,
    plan,
    tiles,
)
from linfusion.kernels.window_attention.products import Products, applies

__all__ = ["attention", "attention_backward"]

# Where bfloat16 products have instructions; elsewhere its tiles are widened when they are copied.
BF16_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and log-sum-exp [B, N, H]; arguments as for the operator."""
    if is_dense(grid, radius, shape):
        return _dense(q, k, v, k_all, v_all, grid, radius, shape, scale, tiled, cells)
    # Huge pages would save little beside the products, and cost a fifth where memory is in pieces.
    o = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=accumulator(q), device=q.device)
    dtype = _product_dtype(q)
    k_all, v_all = (_heads_first(x, dtype) for x in (k_all, v_all))  # [B, H, T, D]
    batch, _, count, dim = q.shape
    products = Products(scale, dtype) if applies(q, dtype) else None
    tile = order.TILES[len(grid)] if products else forward_tile(grid, radius, dtype)
    together = plan(grid, radius, count, dim, tile)
    masks = Masks(radius, shape, together.tile, dtype, q.device, LANES)
    sizes = (together.queries, together.keys, together.keys)
    scratch = [torch.empty(size, dtype=dtype, device=q.device) for size in sizes]
    for b, heads, block in blocks_of(grid, radius, batch, count, together):
        part = Part(grid, heads, tiled, q)
        where = (block.queries, block.keys, block.keys)
        q_b, k_b, v_b = (
            part.read(x[b], at, into) for x, at, into in zip((q, k, v), where, scratch, strict=True)
        )
        # A tile may read past the last of its keys: masked ones, that must be finite.
        for x, copied in zip(scratch[1:], (k_b, v_b), strict=True):
            x[copied.numel() : copied.numel() + (LANES - 1) * dim] = 0
        for group in block.groups:
            q_g = tiles(q_b, group.first, group.rows, group)  # [h, n, q, D]
            k_g, v_g = (tiles(x, group.key_first, group.key_rows, group, LANES) for x in (k_b, v_b))
            bias = masks.of(block, group)
            found = products.of_tiles(q_g, k_g, v_g, bias) if products else None
            if found is None:
                products = None  # scores of one group are much like those of the next
                found = attend_around(q_g, k_g, v_g, bias, scale)
            o_g, lse_g = found
            if k_all.shape[2]:
                whole, k_h, v_h = q_g.flatten(1, 2), k_all[b, heads], v_all[b, heads]
                found = products.of_all(whole, k_h, v_h) if products and not cells else None
                if found is None:
                    counted = None
                    if cells:
                        part_of = block.where(group)
                        every = k_all.shape[2]
                        counted = count_bias(grid, cells, radius, shape, every, q, part_of)
                    around = whole[:, None], k_h[:, None], v_h[:, None]
                    found = attend_around(*around, counted, scale)
                o_e, lse_e = found[0].view(q_g.shape).to(o_g.dtype), found[1].view(lse_g.shape)
                o_g = torch.lerp(o_g, o_e, (lse_e - lse_g).sigmoid_().to(o_g.dtype)[..., None])
                lse_g = torch.logaddexp(lse_g, lse_e)
            part.write(o[b], block.where(group), o_g, group.tiles)
            part.write(lse[b], block.where(group), lse_g, group.tiles)
    return o, lse


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Few tokens, or a window that sees them all: one call."""
    keys, values = _with(k_all, k), _with(v_all, v)
    bias = dense_bias(grid, radius, shape, k_all.shape[1], tiled, q, cells)
    dtype = _product_dtype(q)
    q, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, keys, values))
    bias = None if bias is None else bias.to(dtype)
    o, lse = attend_around(q, keys, values, bias, scale)
    return o.transpose(1, 2).to(v.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def attend_around(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend`, where a key or value that is not finite reaches those alone that see it.

    A weight of 0 times NaN would reach the whole tile. On a CPU it is looked for in the output;
    elsewhere looking would make the device wait, and it is taken for granted.
    """
    if bias is None:
        return attend(q, k, v, bias, scale)
    if q.device.type == "cpu":
        found = attend(q, k, v, bias, scale)
        if math.isfinite(found[0].sum()):
            return found
    lost = ~(k.isfinite() & v.isfinite()).all(-1)  # [A, B, K]
    k, v = (x.masked_fill(lost[..., None], 0) for x in (k, v))
    o, lse = attend(q, k, v, bias, scale)
    reached = lost.to(bias.dtype) @ (bias > UNSEEN).to(bias.dtype).mT > 0  # [A, B, q]
    nan = float("nan")
    return o.masked_fill(reached[..., None], nan), lse.masked_fill(reached, nan)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention [A, B, q, D] over [A, B, K, D] with a bias [q, K], and its log-sum-exp."""
    if q.device.type != "cpu":
        return attend_by_products(q, k, v, bias, scale)
    mask = None if bias is None else bias.expand(q.shape[0], 1, *bias.shape)
    # It takes for granted, without a check, that features are contiguous.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )


def attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend` where torch has no flash kernel that takes a bias and returns the log-sum-exp."""
    o = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=accumulator(q), device=q.device)
    k, v = k.to(lse.dtype), v.to(lse.dtype)
    step = max(1, SCORES // (k.shape[2] * q.shape[0] * q.shape[1]))
    for start in range(0, q.shape[2], step):
        n = slice(start, start + step)
        scores = (q[:, :, n].to(lse.dtype) @ k.mT).mul_(scale)  # [A, B, n, K]
        if bias is not None:
            scores += bias[n]
        lse[:, :, n] = scores.logsumexp(-1)
        o[:, :, n] = scores.sub_(lse[:, :, n, None]).exp_() @ v
    return o, lse


def _product_dtype(x: Tensor) -> torch.dtype:
    """What products are taken in: the dtype of x where it has instructions."""
    if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and BF16_PRODUCTS):
        return x.dtype
    return accumulator(x)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2).contiguous()


def _with(k_all: Tensor, k: Tensor) -> Tensor:
    return torch.cat([k_all, k], 1) if k_all.shape[1] else k
