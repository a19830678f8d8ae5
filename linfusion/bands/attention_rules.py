"""Attention of `Rows`: which keys have to be whole, and what a band of queries needs."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from linfusion.bands.hollow import hollow
from linfusion.bands.rows import RULES, Node, Rows, map_rows
from linfusion.bands.token_rules import held, whole
from linfusion.kernels import LinearState, linear_read, linear_state
from linfusion.kernels.window_attention.blocks import forward_tile, plan


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not isinstance(query, Rows) or query.node.axis != len(query.node.shape) - 2 or is_causal:
        return NotImplemented
    if dropout_p or (attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] > 1):
        return NotImplemented
    engine = query.node.engine
    pixels = [t.node for t in (key, value) if isinstance(t, Rows)]
    engine.settle_common([query.node], pixels)
    # Counted for as long as they are used, not only while the model holds them.
    counted = [t for t in (key, value) if isinstance(t, Rows)]
    key, value = (held(t) if isinstance(t, Rows) else t for t in (key, value))
    options: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale, "enable_gqa": enable_gqa}
    if key.is_meta:  # a dry run: keys of pixels were not computed

        def attend(q: Tensor, _counted: Any = counted) -> Tensor:
            return q.new_empty(*q.shape[:-1], value.shape[-1])
    else:

        def attend(q: Tensor, _counted: Any = counted) -> Tensor:
            if q.is_meta:
                return q.new_empty(*q.shape[:-1], value.shape[-1])
            return F.scaled_dot_product_attention(q, key, value, **options)

    work = 2 * math.prod(query.node.shape[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])
    return map_rows(attend, (query,), flops=work)


def _linear_attention(
    func: Any, q: Any, k: Any, v: Any, *, key_weight: Tensor | None = None, **options: Any
) -> Any:
    if not all(isinstance(t, Rows) and t.node.axis == 1 for t in (q, k, v)):
        return NotImplemented
    if options.get("impl") == "reference":
        return NotImplemented
    engine, line = q.node.engine, k.node.line
    engine.settle_common([q.node], [k.node, v.node])
    state: LinearState | None = None
    normalizer, eps = options.pop("normalizer"), options.pop("eps")
    for start, stop, (keys, values) in engine.passes(k.node, v.node):
        piece = None if key_weight is None else key_weight[:, start * line : stop * line]
        part = linear_state(keys, values, key_weight=piece, **options)
        state = part if state is None else state.merge(part)
    if engine.share is not None and state is not None:
        state = engine.share.ranks.merge_states(state)
    width, dtype = v.node.shape[-1], v.node.dtype

    def read(t: Tensor) -> Tensor:
        if t.is_meta:
            return t.new_empty(*t.shape[:-1], width, dtype=dtype)
        assert state is not None
        return linear_read(t, state, normalizer=normalizer, eps=eps, **options).to(dtype)

    dim = q.node.shape[-1]
    engine.flops += 2 * math.prod(k.node.shape) * width
    return map_rows(read, (q,), flops=2 * math.prod(q.node.shape[:-1]) * dim * width)


def _window_attention(
    func: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, ...],
    radius: float,
    context: Any = None,
    pooled: Any = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Whole queries, keys and values, as windows overlap; the kernel itself needs no more."""
    rows = [t for t in (q, k, v) if isinstance(t, Rows)]
    if return_lse or any(t.node.axis != 1 or t.node.line != 1 for t in rows):
        return NotImplemented
    engine = rows[0].node.engine
    q_, k_, v_ = (whole(t) for t in (q, k, v))
    seen = [None if pair is None else tuple(whole(t) for t in pair) for pair in (context, pooled)]
    keys = sum(pair[0].shape[1] for pair in seen if pair is not None)
    keys += min(k_.shape[1], math.ceil(math.pi * radius**2))
    engine.flops += 4 * math.prod(q_.shape) * keys
    with engine.store.beside(_scratch(q_, grid, radius)):
        if engine.dry:
            out = hollow(q_.shape, v_.dtype, rows[0].device)
        else:
            out = func(
                q_, k_, v_, grid=grid, radius=radius, context=seen[0], pooled=seen[1], **options
            )
        return Rows(Node.leaf(engine, engine.store.adopt(out, 1, 1)))


def _scratch(q: Tensor, grid: tuple[int, ...], radius: float) -> int:
    """Bytes of the blocked kernel's copies of a block of tiles, and of what comes of them."""
    tile = forward_tile(grid, radius, q.dtype)
    block = plan(grid, radius, q.shape[2], q.shape[3], tile)
    return 4 * (3 * block.queries + 2 * block.keys)


RULES.update(
    {
        "scaled_dot_product_attention": _attention,
        "linear_attention": _linear_attention,
        "window_attention": _window_attention,
    }
)
