"""Which layers of a host attend from pixels to pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from linfusion.attention.hosts.table import HOSTS, host_of


def pixel_attention(model: nn.Module, method: str) -> dict[str, Any]:
    """The layers of a host that a method may put windows on, by path.

    Args:
        model: a model that has a row in the table of hosts.
        method: name of the method, for the message.

    Raises:
        ValueError: the model has no row, none of its layers is named there, or a layer runs a
            processor that would lose something.
    """
    host = host_of(model)
    kind = type(model).__name__
    if host is None:
        raise ValueError(
            f"model_or_pipe: {kind} is no host that {method!r} knows the grid of its tokens of"
            f"{_why_not(kind)}; it knows {len(HOSTS)} classes of diffusers (docs, support matrix),"
            " and linfusion.describe_host makes it know another"
        )
    pattern = re.compile(host.layers)
    found: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if pattern.fullmatch(path) and getattr(module, "processor", None) is not None
    }
    if not found:
        raise ValueError(
            f"model_or_pipe: no layer of this {kind} has a path that matches {host.layers!r}"
        )
    for path, attn in found.items():
        if isinstance(attn.processor, nn.Module):
            raise ValueError(
                f"model_or_pipe: {path} runs {type(attn.processor).__name__}, which has weights of"
                f" its own and attends to more than pixels, as those of an IP-Adapter; {method!r}"
                " would not know which attention is which: unload it first"
            )
    return found


def pixel_layers(model: nn.Module) -> Callable[[str], bool] | None:
    """Whether a path is that of a layer that attends from pixels to pixels.

    Returns:
        The test, or None for a model that nothing is known of.

    Raises:
        ValueError: none of its layers does.
    """
    host, kind = host_of(model), type(model).__name__
    if host is not None:
        pattern = re.compile(host.layers)
        return lambda path: pattern.fullmatch(path) is not None
    if kind in _REFUSED:
        raise ValueError(
            f"model_or_pipe: {kind} has no attention from pixels to pixels alone{_why_not(kind)}"
        )
    return None


# Attention that is not from pixels to pixels with a softmax, and so has no window.
_REFUSED = {
    "StableCascadeUNet": "its layers attend to pixels and text at the same time",
    "TransformerTemporalModel": "its tokens are the frames of one pixel",
    "PriorTransformer": "its tokens are embeddings of text and of a whole picture",
    "SanaTransformer2DModel": "its self-attention is linear already",
    "SanaControlNetModel": "its self-attention is linear already",
    "SanaVideoTransformer3DModel": "its self-attention is linear already",
    "AnyFlowFARTransformer3DModel": "its attention is causal over chunks, by a block mask",
    "Kandinsky6SRTransformer3DModel": "its attention is sparse already, by a block mask",
    "OmniGenTransformer2DModel": "its masks tell queries apart: text is causal",
    "Ideogram4Transformer2DModel": "its masks tell queries apart: samples are packed in a sequence",
    "Cosmos3OmniTransformer": "its sequences are packed, with causal text",
    "MiniMaxH3Transformer3DModel": "its sequences are packed, of video, audio and text",
    "JoyImageEditPlusTransformer3DModel": "its patches are packed, a batch of small pictures",
}


def _why_not(kind: str) -> str:
    return f": {_REFUSED[kind]}" if kind in _REFUSED else ""
