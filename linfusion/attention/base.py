"""What a method has to offer, and which attention layers one may take over."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

# Attention over frames, which sees one pixel through time: linear in the number of pixels already.
_TEMPORAL = re.compile(r"(^|\.)(motion_modules|temp_\w+|temporal_\w+|transformer_in)(\.|$)")

# Processors that compute softmax(q·kᵀ/√D)·v and nothing besides. A layer that carries any other one
# (rotary embedding, joint text stream, a method of its own) would lose something.
_PLAIN = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}


@dataclass(frozen=True)
class Method:
    """One published mechanism.

    Attributes:
        name: what `linearize(model, name)` takes.
        processor: class of the stateless processor; constructible without arguments.
        fused_name: where `fuse` hangs what it made of the layer.
        child: `(attn, projection_mid_dim) -> module`, the freshly initialised learned part that
            hangs on the layer as `attn.<name>`; a fresh one changes nothing.
        fused: `(attn, child, dtype) -> module`, the layer for inference with fewer GEMMs.
        is_fresh: whether a child still has the weights it was made with.
        break_even_tokens: `(attn, projection_mid_dim) -> tokens` from which on the layer costs less
            than softmax.
        state_bytes: bytes of the fp32 state a layer keeps per picture.
        pag_processors: the pair for `pipe.set_pag_applied_layers(layers, pair)`.
    """

    name: str
    processor: type
    fused_name: str
    child: Callable[[Attention, int | None], nn.Module]
    fused: Callable[[Attention, nn.Module | None, torch.dtype], nn.Module]
    is_fresh: Callable[[nn.Module], bool]
    break_even_tokens: Callable[[Attention, int | None], int]
    state_bytes: Callable[[Attention], int]
    pag_processors: Callable[[], tuple[object, object]]


def unsupported(attn: Attention) -> str | None:
    """Why the weights of this layer have no linear form here, or None if they have."""
    if attn.added_kv_proj_dim is not None:
        return "it projects a second stream of keys (added_kv_proj_dim)"
    if attn.is_causal:
        return "it is causal"
    if attn.inner_kv_dim != attn.inner_dim:
        return f"its keys have {attn.inner_kv_dim} channels, its queries {attn.inner_dim}"
    if attn.to_out is None:
        return "it has no output projection (pre_only)"
    return None


def self_attention(model: nn.Module, *, processor: type) -> dict[str, Attention]:
    """The layers of `model` that a method may take over, by path.

    These are the modules of diffusers' class `Attention` that attend from pixels to pixels: not to
    text, not from frame to frame.

    Args:
        model: any module.
        processor: the method's own processor class, which counts as plain.
    """
    from diffusers.models.attention_processor import Attention

    return {
        path: module
        for path, module in model.named_modules()
        if path
        and isinstance(module, Attention)
        and not module.is_cross_attention
        and not _TEMPORAL.search(path)
        and unsupported(module) is None
        and (type(module.processor).__name__ in _PLAIN or isinstance(module.processor, processor))
    }
