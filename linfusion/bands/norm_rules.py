"""Norms of `Rows`: group norm by the moments of the whole picture, others row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.bands.rows import RULES, Node, Rows, map_rows


def _layer_norm(func: Any, x: Rows, normalized_shape: Sequence[int], *rest: Any, **kw: Any) -> Any:
    if len(x.node.shape) - len(normalized_shape) <= x.node.axis:
        return NotImplemented
    # The input is a residual stream, which is wanted again; its normalised form is not.
    return map_rows(func, (x, normalized_shape, *rest), kw, expands=True)


def _group_norm(
    func: Any,
    x: Rows,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    node = x.node
    if node.axis == 1:
        return NotImplemented
    engine = node.engine
    engine.settle(node)
    channels = node.shape[1]
    mean, variance = _moments(node, num_groups)
    scale = (variance + eps).rsqrt().repeat_interleave(channels // num_groups, 1)  # [B, C]
    shift = -mean.repeat_interleave(channels // num_groups, 1) * scale
    if weight is not None:
        scale, shift = scale * weight.to(scale.dtype), shift * weight.to(scale.dtype)
    if bias is not None:
        shift = shift + bias.to(scale.dtype)
    unmoved = torch.zeros_like(scale[0]), torch.ones_like(scale[0])

    def normalise(t: Tensor) -> Tensor:
        if t.is_meta:
            return torch.empty_like(t)
        # A batch norm with moments of 0 and 1: the one pass over half precision that torch has.
        done = [
            F.batch_norm(one[None], *unmoved, a, b, eps=0.0)
            for one, a, b in zip(t, scale, shift, strict=True)
        ]
        return done[0] if len(done) == 1 else torch.cat(done)

    return map_rows(normalise, (x,), expands=True)


def _moments(node: Node, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group over the whole picture, [B, G], float32.

    Bands' own moments are merged (Chan et al. 1979), so that nothing cancels, and as means, not
    sums, so that nothing grows. (Float64 for a model in float64: MPS has none.)
    """
    shape, work = (node.shape[0], groups), _work(node.dtype)
    mean, variance = (torch.zeros(shape, dtype=work, device=node.device) for _ in range(2))
    seen = 0
    for _, _, (band,) in node.engine.passes(node):
        parts = band.to(work).unflatten(1, (groups, -1))
        band_variance, band_mean = torch.var_mean(parts, tuple(range(2, parts.ndim)), correction=0)
        seen += (size := band[0].numel())
        share = size / seen
        delta = band_mean - mean
        mean = mean + delta * share
        variance = variance + (band_variance - variance + delta.square() * (1 - share)) * share
    if node.engine.share is not None and not node.engine.dry:
        return node.engine.share.ranks.merge_moments(seen, mean, variance * seen)
    return mean, variance


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


RULES.update({"group_norm": _group_norm, "layer_norm": _layer_norm, "rms_norm": _layer_norm})
