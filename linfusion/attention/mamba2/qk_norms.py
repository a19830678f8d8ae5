"""Norms of the queries and keys of attention, by the names that diffusers has for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.attention.base import untouched
from linfusion.kernels.elementwise import gated_rms_norm, one_pass

QK_NORMS = ("rms_norm", "rms_norm_across_heads", "layer_norm", "layer_norm_across_heads")


def qk_norm_of(attn: Any) -> tuple[str | None, float | None]:
    """Which of `QK_NORMS` an attention has on its queries and keys, or None, and its eps.

    Raises:
        ValueError: another one, or one on queries or keys alone.
    """
    norms = [attn.norm_q, attn.norm_k]
    if norms == [None, None]:
        return None, 1e-6
    found = set()
    for norm in norms:
        kind = type(norm).__name__
        name = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}.get(kind)
        size = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
        channels = 0 if name is None else math.prod(size or ())
        across = {attn.inner_dim // attn.heads: "", attn.inner_dim: "_across_heads"}
        if name is None or channels not in across:
            raise ValueError(
                f"attn: norms queries and keys with {norms[0]} and {norms[1]}; the scan has a place"
                f" for {', '.join(QK_NORMS)}"
            )
        found.add((name + across[channels], norm.eps))
    if len(found) > 1:
        raise ValueError(f"attn: norm_q and norm_k differ: {sorted(found)}")
    return found.pop()


def make_qk_norm(
    kind: str | None, eps: float | None, channels: int, across: int
) -> nn.Module | None:
    """One of `QK_NORMS` over the `channels` of a head or those `across` all heads, or None."""
    if kind is None:
        return None
    size = across if kind.endswith("across_heads") else channels
    if kind.startswith("rms"):
        return nn.RMSNorm(size, eps=eps)
    return nn.LayerNorm(size, eps=1e-5 if eps is None else eps)


def normed(norm: nn.Module | None, x: Tensor, scale: float = 1.0) -> Tensor:
    """norm(x) · scale, [..., D]: in one pass where the norm is PyTorch's RMSNorm, on a GPU."""
    if norm is None:
        return x if scale == 1 else x * scale
    if not one_pass(x) or not untouched(norm, nn.RMSNorm, x):
        out: Tensor = norm(x)
        return out if scale == 1 else out * scale
    assert isinstance(norm, nn.RMSNorm)
    weight = norm.weight if scale == 1 else norm.weight.float() * scale
    rows = x.flatten(0, -3)[None] if x.dim() > 3 else x[:, :, None]  # [B, L, G, D]
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    out = gated_rms_norm(rows, weight.expand(rows.shape[2], -1), eps=eps)
    return out.view(x.shape)
