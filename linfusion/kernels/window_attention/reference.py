"""The definition of window attention: a dense mask, plain autograd, never fast.

Scores, their softmax and sums are float32, or float64 for float64 inputs. It is differentiable any
number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.window_attention.common import coordinates, window


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    everywhere: tuple[Tensor, Tensor] | None,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] in the dtype of v, and log-sum-exp [B, N, H].

    Args:
        q, k, v: [B, N, H, D], N tokens of a raster grid.
        everywhere: (k, v) [B, T, H, D] that every query sees.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    at = coordinates(grid, q.device)
    seen = window([x[:, None] - x[None, :] for x in at], radius, shape)  # [N, N]
    keys, values = k, v
    if everywhere is not None:
        keys, values = torch.cat([everywhere[0], k], 1), torch.cat([everywhere[1], v], 1)
        always = torch.ones(len(seen), everywhere[0].shape[1], dtype=torch.bool, device=q.device)
        seen = torch.cat([always, seen], 1)
    scores = torch.einsum("bnhd,bmhd->bnhm", q.to(dtype), keys.to(dtype)) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    o = torch.einsum("bnhm,bmhd->bnhd", (scores - lse[..., None]).exp(), values.to(dtype))
    return o.to(v.dtype).contiguous(), lse
