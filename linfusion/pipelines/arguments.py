"""What one request means to pipelines whose calls are named differently."""

from __future__ import annotations

import inspect
import math
from typing import Any


def draw_arguments(
    pipe: Any,
    count: int | None = None,
    *,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
) -> dict[str, Any]:
    """Arguments of `pipe(...)` for guidance and the length of the text.

    A FLUX model without a guidance embedding takes classifier-free guidance as `true_cfg_scale`,
    beside a negative prompt. A T5 tokenizer that was made for fewer tokens than the pipeline asks
    for by default is asked for no more than those.

    Args:
        pipe: a text-to-image pipeline.
        count: of the prompts, where they are a list.
        guidance_scale: of classifier-free guidance, or of the model's embedding of it; None leaves
            the pipeline's own default.
        negative_prompt: for all prompts; None is that of the pipeline.

    Raises:
        ValueError: a negative prompt that would not be read; an infinite guidance.
    """
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}; accepted are finite numbers")
    accepted = inspect.signature(type(pipe).__call__).parameters
    denoiser = getattr(pipe, "transformer", None)
    embedded = getattr(getattr(denoiser, "config", None), "guidance_embeds", None)
    found: dict[str, Any] = {}
    if "true_cfg_scale" in accepted and embedded is False:
        scale = 1.0 if guidance_scale is None else guidance_scale
        if scale > 1:
            found["true_cfg_scale"] = scale
            negative_prompt = negative_prompt or ""
        elif negative_prompt:
            raise ValueError(
                f"negative_prompt: {type(pipe).__name__} reads it only with a guidance_scale above"
                f" 1; got {scale}"
            )
    elif guidance_scale is not None:
        found["guidance_scale"] = guidance_scale
    if negative_prompt is not None:
        found["negative_prompt"] = negative_prompt if count is None else [negative_prompt] * count
    if (length := text_length(pipe)) is not None:
        found["max_sequence_length"] = length
    return found


def text_length(pipe: Any) -> int | None:
    """Tokens of a T5 tokenizer made for fewer than the pipeline takes by default, or None."""
    default = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    name = "tokenizer_3" if hasattr(pipe, "tokenizer_3") else "tokenizer_2"
    tokenizer = getattr(pipe, name, None)
    if default is None or tokenizer is None or tokenizer.model_max_length >= default.default:
        return None
    return int(tokenizer.model_max_length)


def pixel_multiple(pipe: Any) -> int:
    """What height and width in pixels have to be multiples of."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    # FLUX packs 2×2 latents into a token, which its patch_size does not say.
    patch = 2 if "axes_dims_rope" in config else config.get("patch_size") or 1
    if not isinstance(patch, int):  # frames, height, width
        patch = patch[-1]
    # Pipelines for videos have one for space and one for time.
    name = "vae_scale_factor" if hasattr(pipe, "vae_scale_factor") else "vae_scale_factor_spatial"
    return int(getattr(pipe, name) * patch)
