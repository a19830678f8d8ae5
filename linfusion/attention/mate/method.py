"""What MATE offers `linearize`, on video transformers that it takes over the weights of."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from torch import nn

from linfusion.attention import cost
from linfusion.attention.grids import video as volumes
from linfusion.attention.mamba2.inherit import inherit as inherit_attention
from linfusion.attention.mamba2.qk_norms import qk_norm_of
from linfusion.attention.mate.processor import _OF_LAYER, NAME, MATEProcessor, Mixer, Mixture
from linfusion.attention.method import Method, channels_of, same_settings

# Processors that compute attention over the video, or text and video, and nothing besides.
_PLAIN = {"WanAttnProcessor", "SanaLinearAttnProcessor3_0", "CogVideoXAttnProcessor2_0"}


_FREE = ("chunk_size",)  # what weights do not depend on


def video_attention(model: nn.Module) -> dict[str, Any]:
    """The self-attention (`attn1`) of Wan, SANA-Video or CogVideoX, by path.

    Raises:
        ValueError: it is another model, a layer runs a processor that would lose something, or its
            weights cannot be taken over.
    """
    if volumes.kind_of(model) is None:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} has no self-attention that MATE knows the grid"
            f" of; expected one of {', '.join(volumes.HOSTS)}, or a pipeline with one"
        )
    found: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if re.fullmatch(r"(transformer_)?blocks\.\d+\.attn1", path)
    }
    for path, attn in found.items():
        processor = attn.processor
        if type(processor).__name__ not in _PLAIN and not isinstance(processor, MATEProcessor):
            raise ValueError(
                f"model_or_pipe: {path} runs {type(processor).__name__}, which MATE would replace;"
                " call model.unfuse_qkv_projections() or model.set_attn_processor with diffusers'"
                " own processor first"
            )
        width = channels_of(attn)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear = attn.get_submodule(name)
            weight = getattr(linear, "base_layer", linear).weight  # LoRA wraps the layer
            if tuple(weight.shape) != (width, width) or not weight.is_floating_point():
                raise ValueError(
                    f"model_or_pipe: {path}.{name} is {tuple(weight.shape)} {weight.dtype}; the"
                    f" scan takes over floating-point weights of {width} by {width}"
                )
        try:
            qk_norm_of(attn)
        except ValueError as error:
            raise ValueError(f"model_or_pipe: {path} of {error}") from None
    return found


def settings(
    found: Mapping[str, Any], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the `Mixture` of every layer, its place, and the norm of its queries and keys.

    Raises:
        ValueError: an option that the weights do not allow.
    """
    mixture = _plain(Mixture(**options))
    if stored is None:
        made = {}
        for layer, (path, attn) in enumerate(found.items()):
            qk_norm, eps = qk_norm_of(attn)
            made[path] = {**mixture, "layer": layer, "qk_norm": qk_norm, "qk_norm_eps": eps}
        return made
    free = {name: mixture[name] for name in options if name in _FREE}
    bound = {name: mixture[name] for name in options if name not in free}
    kept = same_settings(found, stored, bound, typed=options)
    return {path: {**setting, **free} for path, setting in kept.items()}


def _plain(mixture: Mixture) -> dict[str, Any]:
    """As json has it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(mixture).items()}


def inherit(attn: Any, child: nn.Module) -> None:
    """Give the scan of a fresh child the weights of its layer, those of the base model."""
    assert isinstance(child, Mixer)
    to_q, to_k, to_v, out = (
        getattr(linear, "base_layer", linear)  # LoRA wraps the layer
        for linear in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    )
    norms = {"norm_q": attn.norm_q, "norm_k": attn.norm_k}
    inherit_attention(
        child.ma, SimpleNamespace(to_q=to_q, to_k=to_k, to_v=to_v, to_out=[out], **norms)
    )


def _is_fresh(child: nn.Module) -> bool:
    assert isinstance(child, Mixer)
    changed = [child.ma.D, child.ma.D_b] if child.mix is None else list(child.mix.parameters())
    return all(p.is_meta or not p.any() for p in changed)


def break_even_tokens(attn: Any, setting: Mapping[str, Any]) -> int:
    """Tokens N at which both branches have the multiplications of softmax over the whole video.

    Scores and sums are 2·N·C a token. The scan's projections are 5·C², and each of its directions
    has 2·C·P to build and read the state and 2·C·Q inside a chunk, all of it also for the review
    tokens. The projections of attention are the same on both sides.
    """
    mixture = Mixture(**{n: v for n, v in setting.items() if n not in _OF_LAYER})
    channels = channels_of(attn)
    scan = 2.5 * channels + 2 * channels // attn.heads + 2 * (mixture.chunk_size or 64)
    if mixture.review_placement != "none":
        scan *= 1 + 1 / math.prod(mixture.review_pool)
    return math.prod(mixture.window) + math.ceil(scan)


def _passes(attn: Any, setting: Mapping[str, Any], tokens: int) -> list[cost.Pass]:
    """Windows, the scan's projections, both of its directions, and what surrounds all that."""
    mixture = Mixture(**{n: v for n, v in setting.items() if n not in _OF_LAYER})
    channels, heads = channels_of(attn), attn.heads
    head_dim = channels // heads
    read = tokens
    if mixture.review_placement != "none":
        read += math.ceil(tokens / math.prod(mixture.review_pool))
    windows = min(tokens, math.prod(mixture.window))
    scan = cost.scan(1, read, heads, head_dim, head_dim, mixture.chunk_size or 256, heads)
    return [
        *cost.softmax_of_any(tokens, heads, head_dim, windows),
        cost.Pass("gemm", 2 * 7 * read * channels, 2 * 5 * read * channels**2),
        *scan * 2,
        cost.Pass("elementwise", cost.MATE_ONE_PASS * tokens * channels),
    ]


def state_bytes(attn: Any) -> int:
    """fp32 h [H, P, P] of both directions."""
    channels: int = channels_of(attn)
    return 2 * 4 * channels * (channels // attn.heads)


METHOD = Method(
    name=NAME,
    processor=MATEProcessor,
    options=Mixture,
    layers=video_attention,
    setting_key="mixture",
    settings=settings,
    child=lambda attn, setting: Mixer(channels_of(attn), attn.heads, setting),
    inherit=inherit,
    is_fresh=_is_fresh,
    break_even_tokens=break_even_tokens,
    passes=_passes,
    state_bytes=state_bytes,
    student='"mate", weights="a folder of yours"',
    projections=True,
    attach=volumes.attach,
    detach=volumes.detach,
)
