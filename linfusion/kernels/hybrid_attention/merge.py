"""Attention of the same queries over disjoint sets of keys, taken together."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over both sets of keys, from that over each.

    o = (exp(l₁) o₁ + exp(l₂) o₂) / (exp(l₁) + exp(l₂)),  l = log(exp(l₁) + exp(l₂))

    Exact, differentiable in everything, and associative. What has seen no key has l = -inf, and
    its output, if finite, does not matter.

    Args:
        o1, o2: outputs [B, N, H, D].
        lse1, lse2: log-sum-exps [B, N, H], natural logarithm.

    Returns:
        o [B, N, H, D] in the dtype of `o1`, and l [B, N, H].

    Raises:
        ValueError: shapes that do not agree; the message names the argument and both shapes.
    """
    for name, x, shape in (
        ("o2", o2, o1.shape),
        ("lse1", lse1, o1.shape[:-1]),
        ("lse2", lse2, o1.shape[:-1]),
    ):
        if x.shape != shape:
            raise ValueError(
                f"{name}: expected shape {tuple(shape)} beside o1 {tuple(o1.shape)}, got "
                f"{tuple(x.shape)}"
            )
    # Where neither has seen a key, their difference would be NaN.
    apart = torch.where(lse1 == lse2, torch.zeros_like(lse1), lse2 - lse1)
    share = torch.sigmoid(apart)[..., None]  # of the second
    o = torch.lerp(o1.to(share.dtype), o2.to(share.dtype), share)
    return o.to(o1.dtype), torch.logaddexp(lse1, lse2)
