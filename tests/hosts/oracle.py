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

Places = list[tuple[int, tuple[int, ...]]]


def places(row: Tiny, keys: int, sample: int) -> Places:
    """Where every picture of a sample begins among the keys of a call, and its grid."""
    grids = [g for g in row.grids if not row.levels or math.prod(g) == keys]
    # One level of a UNet, or a layer over the first picture alone.
    grids = grids[:1] if row.levels or keys < sum(map(math.prod, grids)) else grids
    start, total = 0, sum(map(math.prod, grids))
    if keys != total:
        start = keys - total if row.before is None else row.before[sample % len(row.before)]
    found = []
    for grid in grids:
        found.append((start, grid))
        start += math.prod(grid)
    return found


def seen(at: Places, queries: int, keys: int, radius: float) -> Tensor:
    """Which keys the queries of one sample see: [queries, keys]."""
    mask = torch.ones(keys, keys, dtype=torch.bool)
    for start, grid in at:
        place = torch.cartesian_prod(*[torch.arange(n) for n in grid])
        near = (place[:, None] - place).square().sum(-1) < radius**2
        mask[start : start + len(near), start : start + len(near)] = near
    first = 0 if queries == keys else at[0][0]  # fewer queries are those of the pixels
    return mask[first : first + queries]


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Tensor,
    hides: Tensor,
    at: Places,
    cell: int,
    scale: float,
) -> Tensor:
    """Softmax where cells of tokens stand for the pixels that a window hides.

    A cell is one more key and value, the averages of its tokens, with the logarithm of the number
    of them that a query does not see on its score.

    Args:
        q, k, v: of one sample, [H, N, D] and [H, M, D].
        sees: [N, M], what windows show.
        hides: [1 or N, M], what the host's own mask hides.
        at: the pictures.
        cell: tokens a side.
        scale: of the scores.
    """
    keys, values, bias = [k], [v], [torch.where(sees & ~hides, 0.0, -torch.inf)]
    for start, grid in at:
        own = slice(start, start + math.prod(grid))
        place = torch.cartesian_prod(*[torch.arange(n) // cell for n in grid])
        cells, number = place.unique(dim=0, return_inverse=True)
        within = F.one_hot(number, len(cells)).to(k.dtype)  # [N, cells]
        average = within / within.sum(0)
        keys.append(average.T @ k[:, own])
        values.append(average.T @ v[:, own])
        bias.append(((~sees[:, own]).to(k.dtype) @ within).log())
    scores = q @ torch.cat(keys, 1).mT * scale + torch.cat(bias, 1)
    return scores.softmax(-1).nan_to_num() @ torch.cat(values, 1)


@contextmanager
def windowed(
    model: nn.Module, paths: Iterable[str], row: Tiny, radius: float, cell: int = 0
) -> Iterator[list[str]]:
    """The attention of the layers `paths` sees windows; gives the paths that were called.

    With a `cell`, cells of so many tokens a side stand for what the windows do not see.
    """
    softmax, inside, called = F.scaled_dot_product_attention, [], []

    def attention(query, key, value, attn_mask=None, *args, **kwargs):
        n, m = query.shape[-2], key.shape[-2]
        if not inside or m < row.least:
            return softmax(query, key, value, attn_mask, *args, **kwargs)
        called.append(inside[-1])
        hides = torch.zeros(1, 1, 1, m, dtype=torch.bool)
        if attn_mask is not None:
            hides = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask < -1e3
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        outs = []
        for i, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            at = places(row, m, i)
            sees, own = seen(at, n, m, radius), hides[i % len(hides), 0]
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            if cell:
                outs.append(dense(q, k, v, sees, own, at, cell, scale))
            else:
                outs.append(softmax(q, k, v, sees & ~own, scale=scale))
        return torch.stack(outs)

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
