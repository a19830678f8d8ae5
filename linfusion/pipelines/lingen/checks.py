"""What a video pipeline refuses, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from linfusion.pipelines.lingen.latents import latent_frames

_OUTPUTS = ("np", "pt", "pil", "latent")


def check_call(
    pipe: Any,
    height: int,
    width: int,
    num_frames: int,
    *,
    prompt: Any = None,
    starts: Sequence[int] = (0,),
    negative_prompt: Any = None,
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    num_videos_per_prompt: int = 1,
    generator: Any = None,
    prompt_embeds: Any = None,
    prompt_attention_mask: Any = None,
    negative_prompt_embeds: Any = None,
    negative_prompt_attention_mask: Any = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = (),
    max_sequence_length: int = 1,
    output_type: str = "np",
    image: Any = None,
    video: Any = None,
) -> int:
    """How many videos a call makes; its arguments are those of `LinGenPipeline`.

    Args:
        starts: the first frame of each prompt over time.

    Raises:
        ValueError: an argument is out of range or does not fit another; it is named.
    """
    for name, number in (
        ("num_frames", num_frames),
        ("num_inference_steps", num_inference_steps),
        ("num_videos_per_prompt", num_videos_per_prompt),
        ("max_sequence_length", max_sequence_length),
    ):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}: got {number!r}, expected a whole number from 1 on")
    _check_scheduler(pipe.scheduler)
    _check_size(pipe, height, width, num_frames)
    number = isinstance(guidance_scale, int | float) and math.isfinite(guidance_scale)
    if not number or guidance_scale < 0:
        raise ValueError(f"guidance_scale: got {guidance_scale!r}, expected 0 or more; 1 is none")
    if output_type not in _OUTPUTS:
        raise ValueError(f"output_type: got {output_type!r}, expected one of {_OUTPUTS}")
    known = pipe._callback_tensor_inputs
    unknown = [name for name in callback_on_step_end_tensor_inputs if name not in known]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: got {unknown[0]!r}, expected of {known}"
        )
    count = check_text(pipe, prompt, prompt_embeds, prompt_attention_mask, "prompt")
    if negative_prompt is not None or negative_prompt_embeds is not None:
        others = check_text(
            pipe,
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            "negative_prompt",
        )
        one = len(starts) > 1  # of one video
        if others != (1 if one else count) and not isinstance(negative_prompt, str):
            expected = "one" if one else f"as many as prompts: {count}"
            raise ValueError(f"negative_prompt: got {others}, expected {expected}")
    if len(starts) > 1:
        if not pipe.transformer.config.causal_blocks:
            raise ValueError(
                "prompt: got pairs, expected one text: a model without causal_blocks draws the"
                " whole clip at once"
            )
        if num_videos_per_prompt > 1:
            raise ValueError(
                f"num_videos_per_prompt: got {num_videos_per_prompt} with pairs of prompts,"
                " expected 1"
            )
        if starts[-1] >= num_frames:
            raise ValueError(f"prompt: got first frame {starts[-1]} of {num_frames} frames")
        count = 1
    videos = count * num_videos_per_prompt
    if isinstance(generator, list) and len(generator) != videos:
        raise ValueError(
            f"generator: got {len(generator)}, expected one, or one for each of {videos} videos"
        )
    if image is not None and video is not None:
        raise ValueError("image: got one beside a video, expected one of them")
    return videos


def check_text(pipe: Any, prompt: Any, embeds: Any, masks: Any, name: str) -> int:
    """How many texts there are, as `prompt` or as its embeddings.

    Raises:
        ValueError: both or neither, something else than texts, or tensors that do not fit the
            transformer or one another.
    """
    dims = pipe.transformer.config.text_dims
    if (prompt is None) == (embeds is None):
        both = "both it and" if embeds is not None else "neither it nor"
        raise ValueError(f"{name}: got {both} {name}_embeds, expected one of them")
    if embeds is None:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{name}: got {prompt!r}, expected a text or a list of texts")
        encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None]
        widths = [e.config.hidden_size for e in encoders]
        if widths != list(dims):
            raise ValueError(
                f"text_encoder: got encoders of {widths} channels, the transformer's text_dims are"
                f" {list(dims)}; pass {name}_embeds, or these encoders"
            )
        if masks is not None:
            raise ValueError(f"{name}_attention_mask: got one without {name}_embeds")
        return len(texts)
    parts = [embeds] if isinstance(embeds, Tensor) else list(embeds)
    shapes = [tuple(t.shape) for t in parts]
    if [s[2:] for s in shapes] != [(dim,) for dim in dims] or len({s[0] for s in shapes}) > 1:
        expected = ", ".join(f"[B, M, {dim}]" for dim in dims)
        raise ValueError(f"{name}_embeds: got {shapes}, expected {expected}")
    given = [masks] * len(parts) if masks is None or isinstance(masks, Tensor) else list(masks)
    sizes = [None if m is None else tuple(m.shape) for m in given]
    if len(sizes) != len(shapes) or any(
        m not in (None, s[:2]) for m, s in zip(sizes, shapes, strict=True)
    ):
        expected = ", ".join(str(s[:2]) for s in shapes)
        raise ValueError(f"{name}_attention_mask: got {sizes}, expected {expected}")
    return shapes[0][0]


def check_stream(
    pipe: Any, prompt: Any, embeds: Any, state: Any, resume: bool, replay: bool
) -> None:
    """Refuse what a stream of one video cannot be.

    Raises:
        ValueError: several prompts, a state that would not be kept, or tiles of a causal VAE.
    """
    if isinstance(prompt, list) and not any(isinstance(p, tuple | list) for p in prompt):
        raise ValueError(
            f"prompt: got a list of {len(prompt)} texts, expected one video: a text, or pairs"
        )
    if embeds is not None and check_text(pipe, None, embeds, None, "prompt") != 1:
        raise ValueError("prompt_embeds: got several prompts, expected one video")
    if state is None and (resume or replay):
        name = "resume" if resume else "replay"
        raise ValueError(f"{name}: got True without state, the folder of the video to go on with")
    if replay and not resume:
        raise ValueError("replay: got True without resume")
    if state is not None and not pipe.transformer.config.causal_blocks:
        raise ValueError(
            "state: got a folder, expected None: a model without causal_blocks draws the whole clip"
            " at once"
        )
    if not isinstance(pipe.vae, AutoencoderKL) and pipe.vae.use_tiling:
        raise ValueError("vae: its tiling is on, and tiles keep no state; use vae.disable_tiling()")


def _check_scheduler(scheduler: Any) -> None:
    config = scheduler.config
    flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    if not flow and not type(scheduler).__name__.startswith("FlowMatch"):
        raise ValueError(
            f"scheduler: got {type(scheduler).__name__}, expected one of flow matching, such as"
            " FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with use_flow_sigmas and"
            ' prediction_type "flow_prediction"'
        )


def _check_size(pipe: Any, height: int, width: int, num_frames: int) -> None:
    config = pipe.transformer.config
    sides = (("height", height, 1), ("width", width, 2))
    for name, pixels, axis in sides:
        step = pipe.vae_scale_factor_spatial * config.patch_size[axis]
        if type(pixels) is not int or pixels < step or pixels % step:
            raise ValueError(f"{name}: got {pixels!r}, expected a positive multiple of {step}")
    patch = config.patch_size[0]
    tokens = latent_frames(pipe.vae, num_frames, patch) // patch
    counted = config.causal_blocks and config.get("time_positions", "video") == "video"
    if counted and tokens > config.pos_embed_size[0]:
        most = (config.pos_embed_size[0] * patch - 1) * pipe.vae_scale_factor_temporal + 1
        raise ValueError(
            f"num_frames: got {num_frames}, the positions of this model (pos_embed_size) reach"
            f" {most}"
        )
