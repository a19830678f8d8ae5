"""CLEAR's definition with nothing of ours in it: diffusers' processors under a dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

Sizes = list[tuple[int, int]]


def window_mask(sizes: Sizes, radius: float, text: int, *, text_first: bool = True) -> torch.Tensor:
    """Which key (column) a query (row) sees, among text and the tokens of the pictures."""
    picture = torch.cat([torch.full((h * w,), i) for i, (h, w) in enumerate(sizes)])
    places = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sizes])
    distance = (places[:, None] - places).square().sum(-1)
    image = (distance < radius**2) | (picture[:, None] != picture)
    mask = torch.ones(text + len(picture), text + len(picture), dtype=torch.bool)
    if text_first:
        mask[text:, text:] = image
    else:
        mask[: len(picture), : len(picture)] = image
    return mask


@contextmanager
def masked(*masks: torch.Tensor) -> Iterator[None]:
    """Softmax attention over as many keys as one of the masks has columns goes under that mask."""
    by_length = {mask.shape[1]: mask for mask in masks}
    softmax = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **kwargs):
        mask = by_length.get(key.shape[-2]) if query.shape[-2] == key.shape[-2] else None
        return softmax(query, key, value, attn_mask if mask is None else mask, **kwargs)

    with patch.object(F, "scaled_dot_product_attention", attention):
        yield
