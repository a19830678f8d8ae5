"""Windows as nothing of ours computes them: the host's own softmax under a dense mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hosts.tiny import Tiny


def window(grid: tuple[int, ...], radius: float) -> Tensor:
    """Which tokens of a grid see which: [N, N]."""
    axes = [torch.arange(n) for n in grid]
    at = torch.cartesian_prod(*axes) if len(grid) > 1 else axes[0][:, None]
    return (at[:, None] - at).square().sum(-1) < radius**2


def seen(row: Tiny, queries: int, keys: int, radius: float, batch: int) -> Tensor:
    """Which keys the queries of one call see: [batch, 1, queries, keys]."""
    grids = [g for g in row.grids if not row.levels or math.prod(g) == keys]
    grids = grids[:1] if row.levels else grids
    sizes = [math.prod(g) for g in grids]
    if keys < sum(sizes):  # over the first picture alone
        grids, sizes = grids[:1], sizes[:1]
    mask = torch.ones(batch, 1, keys, keys, dtype=torch.bool)
    for sample in range(batch):
        start = 0
        if keys != sum(sizes):
            rest = keys - sum(sizes)
            start = rest if row.before is None else row.before[sample % len(row.before)]
        for grid, size in zip(grids, sizes, strict=True):
            mask[sample, 0, start : start + size, start : start + size] = window(grid, radius)
            start += size
    if queries == keys:
        return mask
    first = row.before[0] if row.before is not None else keys - queries  # queries are the pixels
    return mask[:, :, first : first + queries]


@contextmanager
def masked(model: nn.Module, paths: Iterable[str], row: Tiny, radius: float) -> Iterator[list[str]]:
    """The attention of the layers `paths` goes under the mask; gives the paths that were called."""
    softmax, inside, called = F.scaled_dot_product_attention, [], []

    def attention(query, key, value, attn_mask=None, *args, **kwargs):
        if inside and key.shape[-2] >= row.least:
            called.append(inside[-1])
            own = seen(row, query.shape[-2], key.shape[-2], radius, query.shape[0])
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                attn_mask = attn_mask + torch.where(own, 0.0, -torch.inf)
            else:
                attn_mask = own if attn_mask is None else own & attn_mask
        return softmax(query, key, value, attn_mask, *args, **kwargs)

    def enter(path):
        return lambda *_: inside.append(path)

    handles = []
    for path in paths:
        attn = model.get_submodule(path)
        handles.append(attn.register_forward_pre_hook(enter(path)))
        handles.append(attn.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        with patch.object(F, "scaled_dot_product_attention", attention):
            yield called
    finally:
        for handle in handles:
            handle.remove()
