"""The teachers of video transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from linfusion.attention.grids import video as volumes
from linfusion.pipelines.arguments import text_length
from linfusion.training.teachers.base import Batch, Teacher
from linfusion.training.teachers.images import training_target


class VideoTeacher(Teacher):
    """Wan and SANA-Video, which predict the velocity ε − x₀, and CogVideoX, noise or its velocity.

    Flow: x_σ = (1 − σ) x₀ + σ ε, with σ even in 1/1000 … 1 and then shifted as the pipeline's
    scheduler shifts it (rectified flow, Liu et al. 2022). CogVideoX: the forward process of its own
    scheduler.

    Args:
        pipe: a text-to-video pipeline.

    Raises:
        ValueError: it has two denoisers, each for some timesteps, or one that is also given other
            latents (image-to-video), or CogVideoX's scheduler predicts something else.
    """

    attribute = "transformer"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        name = type(pipe).__name__
        if getattr(pipe, "transformer_2", None) is not None:
            raise ValueError(
                f"pretrained_model_name_or_path: {name} has a transformer and a transformer_2, each"
                " for some timesteps; one that has a single denoiser is distilled"
            )
        config = self.model.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"pretrained_model_name_or_path: the transformer of {name} takes"
                f" {config.in_channels} channels and predicts {config.out_channels}; one that makes"
                " videos from text alone is distilled"
            )
        self._kind = volumes.kind_of(self.model)
        self.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        self._sigmas: Tensor | None = None
        if self._kind == volumes.JOINT:
            given = self.scheduler.config.prediction_type
            if given not in ("epsilon", "v_prediction"):
                raise ValueError(
                    f"prediction_type: the scheduler has {given!r}, accepted are epsilon,"
                    " v_prediction"
                )
        else:
            steps = self.scheduler.config.num_train_timesteps
            even = torch.arange(steps, 0, -1) / steps
            options = self.scheduler.config
            shift = options.get("flow_shift", options.get("shift")) or 1.0
            self._sigmas = shift * even / (1 + (shift - 1) * even)

    def text_states(self, captions: Sequence[str]) -> Batch:
        kwargs: dict[str, Any] = {"do_classifier_free_guidance": False}
        if (length := text_length(self.pipe)) is not None:
            kwargs["max_sequence_length"] = length
        name = "complex_human_instruction"  # SANA-Video puts its captions behind one
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        if name in accepted:
            kwargs[name] = accepted[name].default
        found = self.pipe.encode_prompt(list(captions), **kwargs)
        states = {"states": found[0]}
        return states | ({"mask": found[1]} if len(found) == 4 else {})

    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        latents = batch["latents"]  # [B, C, T, h, w]
        noise = torch.randn(latents.shape, generator=generator)
        if self._sigmas is not None:
            chosen = torch.randint(len(self._sigmas), (len(latents),), generator=generator)
            sigma = self._sigmas[chosen]
            s = sigma[:, None, None, None, None]
            inputs: dict[str, Any] = {
                "hidden_states": (1 - s) * latents + s * noise,
                "timestep": sigma * len(self._sigmas),
                "encoder_hidden_states": batch["states"],
            }
            if "mask" in batch:
                inputs["encoder_attention_mask"] = batch["mask"]
            return inputs, noise - latents
        latents, noise = latents.transpose(1, 2), noise.transpose(1, 2)
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        inputs = {
            "hidden_states": self.scheduler.add_noise(latents, noise, timesteps),
            "timestep": timesteps,
            "encoder_hidden_states": batch["states"],
        }
        if self.model.config.use_rotary_positional_embeddings:
            frames, height, width = latents.shape[1], *latents.shape[3:]
            scale = self.pipe.vae_scale_factor_spatial
            inputs["image_rotary_emb"] = self.pipe._prepare_rotary_positional_embeddings(
                height * scale, width * scale, frames, torch.device("cpu")
            )
        return inputs, training_target(self.scheduler, latents, noise, timesteps)

    def feature_layers(self, paths: Sequence[str]) -> list[str]:
        """Every fourth block from the second on."""
        return list(paths[1::4]) or list(paths)
