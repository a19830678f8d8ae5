"""What a bidirectional scan takes over of trained softmax attention (LinGen-Uni's idea)."""

from __future__ import annotations

import math
from typing import Any

import torch

from linfusion.attention.mamba2.bidirectional import BiMamba2
from linfusion.attention.mamba2.qk_norms import qk_norm_of

_OPEN_GATE = 1.2784645427610738  # silu of it is 1


def from_attention(attn: Any, **options: Any) -> BiMamba2:
    """A layer that starts from the weights of softmax attention.

    It is `BiMamba2.like_attention` with what `inherit` takes over.

    Args:
        attn: self-attention of diffusers, all of whose projections have C rows.
        options: of `like_attention`.

    Raises:
        ValueError: the attention has norms that are none of `QK_NORMS`, or another number of
            channels inside or of key and value heads than outside; an option there is not.
    """
    projections = [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]]
    width = attn.to_q.in_features
    if any(p.weight.shape != (width, width) for p in projections):
        shapes = [tuple(p.weight.shape) for p in projections]
        raise ValueError(f"attn: expected projections of {width} by {width}, got {shapes}")
    qk_norm, eps = qk_norm_of(attn)
    layer = BiMamba2.like_attention(
        width, attn.heads, qk_norm=qk_norm, qk_norm_eps=eps, **options
    ).to(attn.to_q.weight)
    inherit(layer, attn)
    return layer


@torch.no_grad()
def inherit(layer: BiMamba2, attn: Any) -> None:
    """Give a layer that is like an attention the weights of it.

    C <- to_q / √P, B <- to_k, x <- to_v, out_proj <- to_out.0; with norms, C <- to_q and the
    norms of C and B <- those of queries and keys. The gate is 1, there is no further norm, the
    convolution passes its input on, and Δ A is so small that the scan hardly forgets:
    y_i = Σ_j Δ exp(-Δ |i - j|) (q_i·k_j / √P) v_j, the token itself counted twice. Rotary
    embeddings have no place in it: q and k are those before.

    Args:
        layer: of `BiMamba2.like_attention`.
        attn: with plain projections to_q, to_k, to_v, to_out.0 and perhaps norm_q and norm_k.
    """
    scale = layer.headdim**-0.5 if layer.qk_norm is None else 1.0
    sources = [(attn.to_v, 1.0), (attn.to_k, 1.0), (attn.to_q, scale)]
    width, (*_, bc, _) = layer.d_inner, layer.rows
    layer.in_proj.weight.zero_()
    layer.in_proj.bias.zero_()
    layer.in_proj.bias[:width] = _OPEN_GATE
    starts = [(width, sources)]
    if bc:
        starts.append((4 * width + layer.heads, sources[1:]))
    for start, taken in starts:
        for source, factor in taken:
            rows = slice(start, start + width)
            layer.in_proj.weight[rows] = source.weight.to(layer.in_proj.weight) * factor
            if source.bias is not None:
                layer.in_proj.bias[rows] = source.bias.to(layer.in_proj.bias) * factor
            start += width
    out = attn.to_out[0]
    layer.out_proj.weight.copy_(out.weight)
    layer.out_proj.bias.zero_() if out.bias is None else layer.out_proj.bias.copy_(out.bias)
    for ours, theirs in ((layer.norm_q, attn.norm_q), (layer.norm_k, attn.norm_k)):
        for name, parameter in () if ours is None else ours.named_parameters():
            given = getattr(theirs, name, None)
            if given is None:
                parameter.fill_(float(name == "weight"))
            else:
                parameter.copy_(given)
    for conv in (layer.conv1d, layer.conv1d_b):
        conv.weight.zero_()[..., -1] = 1
        assert conv.bias is not None
        conv.bias.zero_()
    for zero in (layer.D, layer.D_b, layer.A_log, layer.A_log_b):
        zero.zero_()
    for steps in (layer.dt_bias, layer.dt_bias_b):
        steps.fill_(math.log(math.expm1(1e-3)))
