"""The definition of hybrid attention: dense scores and dense features, plain autograd, never fast.

Sums are float32, or float64 for float64 inputs. It is differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.hybrid_attention.merge import merge
from linfusion.kernels.linear_attention.common import LinearState
from linfusion.kernels.window_attention.common import coordinates, window


def joined(
    v: Tensor,
    near: Tensor,
    lse: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    rotated_q: Tensor,
    rotated_k: Tensor,
    log_weight: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    exclude: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] in the dtype of v, and log-sum-exp [B, N, H].

    Args:
        v: values [B, N, H, D], N tokens of a raster grid.
        near, lse: output and log-sum-exp of the windows.
        phi_q, phi_k: features [B, N, H, F] of the denominator.
        rotated_q, rotated_k: those of the numerator.
        log_weight: [H].
        grid, radius, shape: of the windows.
        exclude: whether the far part leaves out what the window sees.
    """
    dtype = accumulator(v)
    at = coordinates(grid, v.device)
    far = torch.ones(len(at[0]), len(at[0]), dtype=dtype, device=v.device)
    if exclude:
        far = (~window([x[:, None] - x[None, :] for x in at], radius, shape)).to(dtype)
    below, above = (
        torch.einsum("bnhf,bmhf,nm->bnhm", a.to(dtype), b.to(dtype), far)
        for a, b in ((phi_q, phi_k), (rotated_q, rotated_k))
    )
    den = below.sum(-1)  # [B, N, H]
    num = torch.einsum("bnhm,bmhd->bnhd", above, v.to(dtype))
    return _joined(v, near, lse, num, den, log_weight)


def read(
    near: Tensor,
    lse: Tensor,
    phi_q: Tensor,
    rotated_q: Tensor,
    state: LinearState,
    log_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same where the far part is a state of other tokens."""
    count = state.count[:, None, None]
    num = torch.einsum("bnhf,bhfd->bnhd", rotated_q.to(lse.dtype), state.kv) * count[..., None]
    den = torch.einsum("bnhf,bhf->bnh", phi_q.to(lse.dtype), state.k_mean) * count
    return _joined(near, near, lse, num, den, log_weight)


def _joined(
    v: Tensor, near: Tensor, lse: Tensor, num: Tensor, den: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor]:
    empty = den <= 0
    den = den.masked_fill(empty, 1)
    num = num.masked_fill(empty[..., None], 0) / den[..., None]
    far_lse = (log_weight.to(den.dtype) + den.log()).masked_fill(empty, float("-inf"))
    o, lse = merge(near.to(den.dtype), lse, num, far_lse)
    return o.to(v.dtype).contiguous(), lse
