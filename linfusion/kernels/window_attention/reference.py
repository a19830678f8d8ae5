"""The definition of window attention: a dense mask, plain autograd, never fast.

Scores, their softmax and sums are float32, or float64 for float64 inputs. It is differentiable any
number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.window_attention.common import accumulator, coordinates, window


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
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] in the dtype of v, and log-sum-exp [B, N, H].

    Args:
        q, k, v: [B, N, H, D], N tokens of a raster grid.
        k_all, v_all: [B, T, H, D] that every query sees.
    """
    dtype = accumulator(q)
    at = coordinates(grid, q.device)
    seen = window([x[:, None] - x[None, :] for x in at], radius, shape)  # [N, N]
    always = torch.ones(len(seen), k_all.shape[1], dtype=torch.bool, device=q.device)
    seen = torch.cat([always, seen], 1)  # [N, T + N]
    keys, values = torch.cat([k_all, k], 1), torch.cat([v_all, v], 1)
    scores = torch.einsum("bnhd,bmhd->bnhm", q.to(dtype), keys.to(dtype)) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    o = torch.einsum("bnhm,bmhd->bnhd", (scores - lse[..., None]).exp(), values.to(dtype))
    return o.to(v.dtype).contiguous(), lse
