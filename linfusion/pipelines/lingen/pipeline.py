"""Text, a picture or a clip to video with LinGen's transformer, whole or as a stream of frames."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel

from linfusion.models.lingen import LinGenTransformer3DModel
from linfusion.pipelines.lingen.checks import check_call, check_stream, check_text
from linfusion.pipelines.lingen.denoise import Clip, draw_blocks
from linfusion.pipelines.lingen.latents import as_decoded, decode_clip, latent_frames, ratios
from linfusion.pipelines.lingen.prepare import prepare_clip
from linfusion.pipelines.lingen.running import LinGenPipelineOutput, Running
from linfusion.pipelines.lingen.session import Session
from linfusion.pipelines.lingen.text import Text, encode_texts, repeated
from linfusion.pipelines.state import seed_of


class LinGenPipeline(Running, DiffusionPipeline):
    """Video with `LinGenTransformer3DModel` (Wang et al. 2024, LinGen, arXiv:2412.09856).

    A model without `causal_blocks` denoises the whole clip at once. One with them draws it block by
    block: noise of the block's own, denoised with the past frozen, then one clean pass that commits
    the block to the past, whose size does not depend on the length of the video. `stream` gives the
    frames of every block as soon as it is decoded, in memory that does not grow; a call gives the
    same frames, all at the end.

    Args:
        tokenizer, text_encoder: CLIP's text model or a T5 encoder; tokens that only fill up are
            masked.
        vae: AutoencoderKLWan, AutoencoderKLCogVideoX, or an AutoencoderKL, which takes the frames
            one by one.
        scheduler: of flow matching: FlowMatchEulerDiscreteScheduler and its like, or
            UniPCMultistepScheduler with flow sigmas.
        transformer: the denoiser.
        tokenizer_2, text_encoder_2: of a transformer with two `text_dims`.

    Raises:
        ValueError: a VAE of another class.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    _optional_components = ["tokenizer_2", "text_encoder_2"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: CLIPTextModel | T5EncoderModel | UMT5EncoderModel,
        vae: AutoencoderKLWan | AutoencoderKLCogVideoX | AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: LinGenTransformer3DModel,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: CLIPTextModel | T5EncoderModel | UMT5EncoderModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
        )
        self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = ratios(vae)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the positions of the transformer were made for."""
        config, factor = self.transformer.config, self.vae_scale_factor_spatial
        height, width = (config.pos_embed_size[i] * config.patch_size[i] * factor for i in (1, 2))
        return height, width

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Text | None = None,
        negative_prompt_embeds: Text | None = None,
        prompt_attention_mask: Text | None = None,
        negative_prompt_attention_mask: Text | None = None,
        max_sequence_length: int = 512,
    ) -> tuple[Text, Text, Text, Text]:
        """Encode prompts, or repeat what was encoded before.

        Args:
            prompt: one, or a list; None with `prompt_embeds`.
            do_classifier_free_guidance: whether to encode the negative prompt.
            negative_prompt: one for all or one for each; None is "".
            num_videos_per_prompt: how often each is repeated, one after the other.
            device: where to; the pipeline's by default.
            prompt_embeds, negative_prompt_embeds: [B, M, D], a list of one for each encoder where
                there are two.
            prompt_attention_mask, negative_prompt_attention_mask: [B, M] of them, 1 where there is
                a token; None for tokens throughout.
            max_sequence_length: tokens, fewer where the encoder knows fewer.

        Returns:
            Embeddings and mask of the prompts, then of the negative ones; the last two are None
            without guidance.

        Raises:
            ValueError: prompts and negative prompts differ in number.
        """
        check_text(self, prompt, prompt_embeds, prompt_attention_mask, "prompt")
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            prompt_embeds, prompt_attention_mask = encode_texts(
                self, prompts, device, max_sequence_length
            )
        count = len(prompt_embeds if isinstance(prompt_embeds, Tensor) else prompt_embeds[0])
        wanted = repeated(prompt_embeds, prompt_attention_mask, num_videos_per_prompt, device)
        if not do_classifier_free_guidance:
            return *wanted, None, None
        if negative_prompt_embeds is None:
            texts = negative_prompt
            if not isinstance(texts, list):
                texts = [texts or ""] * count
            if len(texts) != count:
                raise ValueError(
                    f"negative_prompt: got {len(texts)}, expected one, or one for each of {count}"
                    " prompts"
                )
            negative_prompt_embeds, negative_prompt_attention_mask = encode_texts(
                self, texts, device, max_sequence_length
            )
        unwanted = repeated(
            negative_prompt_embeds, negative_prompt_attention_mask, num_videos_per_prompt, device
        )
        return *wanted, *unwanted

    def check_inputs(self, height: int, width: int, num_frames: int, **call: Any) -> None:
        """Refuse a call before any work is done.

        Args:
            height, width: in pixels.
            num_frames: in all.
            **call: other arguments of the call, by their names.

        Raises:
            ValueError: an argument is out of range or does not fit another; it is named.
        """
        check_call(self, height, width, num_frames, **call)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise [B, C, T, h, w] of a whole clip: what was given, or drawn from the generator.

        Raises:
            ValueError: `latents` of another shape.
        """
        patch = self.transformer.config.patch_size[0]
        shape = (
            batch_size,
            num_channels_latents,
            latent_frames(self.vae, num_frames, patch),
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected {shape}")
        return latents.to(device=device, dtype=dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[tuple[int, str]] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Text | None = None,
        prompt_attention_mask: Text | None = None,
        negative_prompt_embeds: Text | None = None,
        negative_prompt_attention_mask: Text | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        image: Any = None,
        video: Any = None,
    ) -> LinGenPipelineOutput | tuple[Any]:
        """Videos of prompts.

        Args:
            prompt: a text; or a list of texts, one a video; or, for one video of a model with
                `causal_blocks`, a list of pairs (first frame, text), the first from frame 0 on: a
                block is drawn with the text that holds at its first frame.
            negative_prompt: one for all videos, or one for each prompt; not read without guidance.
            height, width: in pixels; those of the learned positions by default.
            num_frames: in all, given ones included. What the VAE cannot make is rounded, with a
                warning: 4 k + 1 frames are whole for Wan, 8 k + 1 for CogVideoX, any number for an
                image VAE.
            num_inference_steps: of the scheduler, for every block.
            guidance_scale: s in v∅ + s (v - v∅); 1 is none.
            num_videos_per_prompt: the videos of a prompt follow one another.
            generator: of all noise; one, or one a video. With `causal_blocks` one number is drawn
                from it for each video, and the noise of each block comes from that number and the
                index of the block.
            latents: noise [B, C, T, h, w] of the whole clip, instead.
            prompt_embeds, prompt_attention_mask: of `encode_prompt`, instead of prompt.
            negative_prompt_embeds, negative_prompt_attention_mask: likewise.
            output_type: "np", "pt", "pil" or "latent"; see `LinGenPipelineOutput`.
            return_dict: whether to return an output object or a tuple.
            callback_on_step_end: called as (pipeline, i, t, tensors) after each step i of a block;
                the latents are those of the block.
            callback_on_step_end_tensor_inputs: which tensors it gets.
            max_sequence_length: tokens of a prompt.
            image: the first frame: a picture, or floats of 0 to 1 or bytes [3, H, W] as a tensor,
                [H, W, 3] as an array; one for all videos or a list or batch. It is resized.
            video: what the clip begins with, likewise: a list of pictures, [F, 3, H, W] or
                [F, H, W, 3]; F as `num_frames`, and less.

        Raises:
            ValueError: an argument is out of range or does not fit another; it is named.
        """
        clip = self._prepare(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            image=image,
            video=video,
        )
        drawn = torch.cat([latents for _, latents in draw_blocks(self, clip)], 2)
        frames: Any = drawn
        if output_type != "latent":
            samples = decode_clip(self.vae, drawn)
            frames = self.video_processor.postprocess_video(samples, output_type=output_type)
        self.maybe_free_model_hooks()
        return LinGenPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: str | list[tuple[int, str]] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        generator: torch.Generator | None = None,
        prompt_embeds: Text | None = None,
        prompt_attention_mask: Text | None = None,
        negative_prompt_embeds: Text | None = None,
        negative_prompt_attention_mask: Text | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        image: Any = None,
        video: Any = None,
        state: str | Path | None = None,
        resume: bool = False,
        replay: bool = False,
    ) -> Iterator[np.ndarray]:
        """One video, as it is drawn: the frames of a call with the same arguments, to the bit.

        With `causal_blocks`, no more than a block is held at a time. Without, the whole clip is
        denoised first and then decoded piece by piece. Arguments are checked before the first frame
        is asked for.

        Args:
            prompt, ..., video: as for a call, of one video.
            state: a folder that keeps, after every block and before its frames are given, all that
                the next one depends on: constant in size, and the latents of each block beside it.
            resume: go on after the last block in `state`, if there is one; without `generator`,
                with the seed that it has.
            replay: on `resume`, give the frames of the blocks that are done, too, decoded again
                from their latents: for a file that is to be written from its start.

        Yields:
            uint8 [f, H, W, 3], once a block; a CogVideoX decoder may hold a frame until the next.

        Raises:
            ValueError: an argument is out of range or does not fit another; or `state` holds a
                video of another model, prompt, size, seed or position; before anything is drawn.
        """
        check_stream(self, prompt, prompt_embeds, state, resume, replay)
        seed = seed_of(state) if resume and generator is None else None
        clip = self._prepare(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            image=image,
            video=video,
        )
        if seed is not None:
            clip.seeds = [seed]
        about = {"prompt": prompt, "negative_prompt": negative_prompt, "size": clip.shape[2:]}
        session = Session(state, self, clip, about, resume=resume)
        return self._streamed(clip, session, replay)

    @torch.no_grad()
    def _streamed(self, clip: Clip, session: Session, replay: bool) -> Iterator[np.ndarray]:
        try:
            decoder = session.open_decoder(self.vae)
            if replay:
                decoder.reset()
                for latents in session.blocks():
                    yield from _frames(decoder, as_decoded(self.vae, latents))
            for index, latents in draw_blocks(self, clip, session.done):
                if self.interrupt:
                    return
                z = as_decoded(self.vae, latents)
                if not self.transformer.config.causal_blocks:
                    for piece in z.split(self.transformer.config.block_frames, 2):
                        yield from _frames(decoder, piece)
                    continue
                frames = list(_frames(decoder, z))
                session.save(index, latents, decoder)
                del latents, z  # not held with the next block
                yield from frames
        finally:
            session.close()
            self.maybe_free_model_hooks()

    def _prepare(self, prompt: Any, **call: Any) -> Clip:
        """All that is to be drawn, checked, and then encoded; what callbacks see starts anew."""
        clip = prepare_clip(self, prompt, **call)
        self._guidance_scale, self._interrupt = clip.guidance_scale, False
        self._current_timestep = None
        return clip


def _frames(decoder: Any, latents: Tensor) -> Iterator[np.ndarray]:
    """The frames of some latents as one array, or nothing where all of them wait."""
    frames = list(decoder.frames(latents))
    if frames:
        yield np.concatenate(frames)
