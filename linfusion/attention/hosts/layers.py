"""Which layers of a host attend from pixels to pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from linfusion.attention.hosts.table import HOSTS, host_of


def hosted_layers(model: nn.Module, method: str) -> dict[str, Any]:
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
    if kind in _REFUSED and kind not in _NO_GRID:
        raise ValueError(
            f"model_or_pipe: {kind} has no attention from pixels to pixels alone{_why_not(kind)}"
        )
    return None


_LINEAR = "its self-attention is linear already"
_PACKED = "its sequences are packed, and its masks tell queries apart"
_AUDIO = "its tokens are audio"
_PART = "it is a part of other models, which know the grid"

# Models without an attention from pixels to pixels that a window could stand in for.
_REFUSED = {
    "AnyFlowFARTransformer3DModel": "its attention is causal over chunks, by a block mask",
    "Kandinsky6SRTransformer3DModel": "its attention is sparse already, by a block mask",
    "OmniGenTransformer2DModel": "its masks tell queries apart: text is causal",
    "Ideogram4Transformer2DModel": _PACKED,
    "Cosmos3OmniTransformer": _PACKED,
    "MiniMaxH3Transformer3DModel": _PACKED,
    "JoyImageEditPlusTransformer3DModel": _PACKED,
    "WanAnimate2Transformer3DModel": "it attends to keys of an earlier pass",
    "StableCascadeUNet": "its layers attend to pixels and text at the same time",
    "SanaTransformer2DModel": _LINEAR,
    "SanaControlNetModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "nothing it is called with tells the grid of its tokens",
    "ZImageControlNetModel": "it runs layers that it shares with a transformer",
    "PriorTransformer": "its tokens are embeddings of text and of a whole picture",
    "TransformerTemporalModel": "its tokens are the frames of one pixel",
    "Transformer2DModel": _PART,
    "DreamLiteTransformer2DModel": _PART,
    "UNet1DModel": "it has no attention with a processor",
    "AceStepTransformer1DModel": _AUDIO,
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "StableAudio3DiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "RFD4ProteinaTransformer": "its tokens are those of a protein",
}

# Of these, some layers of diffusers' class Attention do attend over pixels, and need no grid.
_NO_GRID = ("Transformer2DModel", "SanaWMLTX2RefinerTransformer3DModel")


def _why_not(kind: str) -> str:
    return f": {_REFUSED[kind]}" if kind in _REFUSED else ""
