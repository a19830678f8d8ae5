"""The definition of window attention: a dense mask, plain autograd, never fast.

Scores, their softmax and sums are float32, or float64 for float64 inputs. It is differentiable any
number of times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.window_attention.cells import log_counts
from linfusion.kernels.window_attention.common import coordinates, window


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
    cells: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] in the dtype of v, and log-sum-exp [B, N, H].

    Args:
        q, k, v: [B, N, H, D], N tokens of a raster grid.
        k_all, v_all: [B, T, H, D] that every query sees.
        cells: of the last of those tokens, see `cells`; empty if they are tokens like others.
    """
    dtype = accumulator(q)
    at = coordinates(grid, q.device)
    seen = window([x[:, None] - x[None, :] for x in at], radius, shape)  # [N, N]
    bias = torch.zeros(len(seen), k_all.shape[1], dtype=dtype, device=q.device)
    if cells:
        counted = log_counts(grid, cells, radius, shape, q)  # [N, P]
        bias[:, bias.shape[1] - counted.shape[1] :] = counted
    seen = torch.cat([bias > float("-inf"), seen], 1)  # [N, T + N]
    keys, values = torch.cat([k_all, k], 1), torch.cat([v_all, v], 1)
    scores = torch.einsum("bnhd,bmhd->bnhm", q.to(dtype), keys.to(dtype)) * scale
    scores = scores + F.pad(bias, (0, len(seen)))[:, None]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    # No product of a weight 0 and a value that is not finite: that reaches who sees it.
    broken = ~values.isfinite().all(-1)  # [B, T + N, H]
    values = values.to(dtype).masked_fill(broken[..., None], 0)
    o = torch.einsum("bnhm,bmhd->bnhd", (scores - lse[..., None]).exp(), values)
    reached = torch.einsum("nm,bmh->bnh", seen.to(dtype), broken.to(dtype)) > 0
    o = o.masked_fill(reached[..., None], float("nan"))
    return o.to(v.dtype).contiguous(), lse
