"""What a call of a video pipeline asks for, checked and encoded: a clip to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from torch import Tensor

from linfusion.models.stream import split_blocks
from linfusion.pipelines.lingen.checks import check_call
from linfusion.pipelines.lingen.denoise import Clip, Side, draw_seeds
from linfusion.pipelines.lingen.latents import as_colours, encode_clip, first_frame, latent_frames
from linfusion.pipelines.lingen.prompts import prompt_of_each_block, split_prompt
from linfusion.pipelines.lingen.text import prompts_in_time

logger = logging.get_logger(__name__)


@torch.no_grad()
def prepare_clip(
    pipe: Any,
    prompt: Any,
    *,
    height: int | None,
    width: int | None,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float,
    num_videos_per_prompt: int = 1,
    generator: Any,
    latents: Tensor | None = None,
    callback_on_step_end: Any,
    callback_on_step_end_tensor_inputs: Sequence[str],
    max_sequence_length: int,
    image: Any,
    video: Any,
    output_type: str = "np",
    **text: Any,
) -> Clip:
    """All that is to be drawn; arguments are those of `LinGenPipeline`.

    Raises:
        ValueError: an argument is out of range or does not fit another; it is named.
    """
    config = pipe.transformer.config
    factor = pipe.vae_scale_factor_spatial
    height = pipe.default_size[0] if height is None else height
    width = pipe.default_size[1] if width is None else width
    if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
        callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
    prompt, starts = split_prompt(prompt)
    videos = check_call(
        pipe,
        height,
        width,
        num_frames,
        prompt=prompt,
        starts=starts,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_videos_per_prompt=num_videos_per_prompt,
        generator=generator,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        max_sequence_length=max_sequence_length,
        output_type=output_type,
        image=image,
        video=video,
        **text,
    )
    count = latent_frames(pipe.vae, num_frames, config.patch_size[0])
    made = first_frame(pipe.vae, count)
    if made != num_frames:
        logger.warning(f"num_frames: {num_frames} does not fit the VAE; rounded to {made}")
    blocks = split_blocks(count, config.block_frames) if config.causal_blocks else (count,)
    begins = [first_frame(pipe.vae, sum(blocks[:i])) for i in range(len(blocks))]
    prompts = prompt_of_each_block(starts, begins)

    device, guided = pipe._execution_device, guidance_scale > 1
    given = _given(pipe, image, video, height, width, made, videos, num_videos_per_prompt)
    wanted, mask, unwanted, unwanted_mask = pipe.encode_prompt(
        prompt,
        guided,
        num_videos_per_prompt=num_videos_per_prompt,
        device=device,
        max_sequence_length=max_sequence_length,
        **text,
    )
    sides = [Side(prompts_in_time(wanted, mask, len(starts)))]
    if guided:
        sides.append(Side(prompts_in_time(unwanted, unwanted_mask, len(starts))[:1]))
    shape = (videos, config.in_channels, height // factor, width // factor)
    if latents is not None or not config.causal_blocks:
        latents = pipe.prepare_latents(
            videos,
            config.in_channels,
            height,
            width,
            made,
            torch.float32,
            device,
            generator,
            latents,
        )
    return Clip(
        blocks=blocks,
        shape=shape,
        sides=sides,
        prompts=prompts,
        seeds=draw_seeds(generator, videos),
        noise=latents,
        given=given,
        steps=num_inference_steps,
        guidance_scale=guidance_scale,
        callback=callback_on_step_end,
        callback_tensors=callback_on_step_end_tensor_inputs,
    )


def _given(
    pipe: Any, image: Any, video: Any, height: int, width: int, total: int, videos: int, each: int
) -> Tensor:
    """Latents [B, C, G, h, w] that the clip begins with."""
    config, device = pipe.transformer.config, pipe._execution_device
    name = "image" if video is None else "video"
    if image is not None:
        frames = pipe.video_processor.preprocess(as_colours(image), height, width)[:, :, None]
    elif video is not None:
        frames = pipe.video_processor.preprocess_video(as_colours(video), height, width)
    else:
        factor = pipe.vae_scale_factor_spatial
        shape = (videos, config.in_channels, 0, height // factor, width // factor)
        return torch.zeros(shape, device=device)
    count, patch = frames.shape[2], config.patch_size[0]
    whole = (count - 1) // pipe.vae_scale_factor_temporal + 1
    if (count - 1) % pipe.vae_scale_factor_temporal or whole % patch or count >= total:
        raise ValueError(
            f"{name}: got {count} frames, expected fewer than the {total} of the clip, 1 more"
            f" than a multiple of {pipe.vae_scale_factor_temporal}, that fill tokens of {patch}"
            " latent frames"
        )
    if len(frames) not in (1, videos // each, videos):
        raise ValueError(f"{name}: got {len(frames)}, expected one, or one for each prompt")
    latents = encode_clip(pipe.vae, frames).to(device)
    if len(latents) == 1:
        return latents.expand(videos, -1, -1, -1, -1)
    return latents.repeat_interleave(videos // len(latents), 0)
