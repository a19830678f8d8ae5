"""Teachers of pictures: what the trainer has to know of their pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from linfusion.pipelines.arguments import text_length
from linfusion.training.config import TrainConfig
from linfusion.training.teachers.base import Batch, Teacher


class NoiseTeacher(Teacher):
    """Stable Diffusion 1.5, 2.1 and XL: a UNet that predicts noise or velocity.

    Raises:
        ValueError: a prediction type other than epsilon and v_prediction, or a UNet that is also
            given something else than text.
    """

    attribute = "unet"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        refuse_other_inputs(self.pipe, self.model)
        config = self.model.config
        conditions = {
            name: config.get(name)
            for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
        }
        if config.get("addition_embed_type") != "text_time":
            conditions["addition_embed_type"] = config.get("addition_embed_type")
        for name, value in conditions.items():
            if value is not None:
                raise ValueError(
                    f"pretrained_model_name_or_path: the UNet of {type(pipe).__name__} is also"
                    f" conditioned by {name}={value!r}; one that draws from text alone is distilled"
                )
        if self.pipe.config.get("requires_aesthetics_score"):
            raise ValueError(
                f"pretrained_model_name_or_path: {type(pipe).__name__} is a refiner, which is told"
                " an aesthetic score; one that draws from text alone is distilled"
            )
        self.scheduler = noise_scheduler(self.pipe.scheduler)

    def text_states(self, captions: Sequence[str]) -> Batch:
        found = self.pipe.encode_prompt(
            list(captions),
            device=self.pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"states": found[0]} | ({"pooled": found[2]} if len(found) == 4 else {})

    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        latents = batch["latents"]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        inputs: dict[str, Any] = {
            "sample": self.scheduler.add_noise(latents, noise, timesteps),
            "timestep": timesteps,
            "encoder_hidden_states": batch["states"],
        }
        if "pooled" in batch:
            inputs["added_cond_kwargs"] = {
                "text_embeds": batch["pooled"],
                "time_ids": batch["time_ids"],
            }
        return inputs, training_target(self.scheduler, latents, noise, timesteps)


class FlowTeacher(Teacher):
    """FLUX and Stable Diffusion 3: a transformer that predicts the velocity ε − x₀.

    x_σ = (1 − σ) x₀ + σ ε, with σ drawn evenly from those of the scheduler's training steps
    (rectified flow, Liu et al. 2022; CLEAR's recipe).

    Args:
        pipe: the pipeline.
        guidance: what a guidance embedding is told; CLEAR's authors take 3.5.

    Raises:
        ValueError: a transformer that is also given a picture (FLUX Fill, Control).
    """

    attribute = "transformer"

    def __init__(self, pipe: DiffusionPipeline, guidance: float = 3.5) -> None:
        super().__init__(pipe)
        refuse_other_inputs(self.pipe, self.model)
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        self._sigmas = scheduler.sigmas[: scheduler.config.num_train_timesteps].float()
        self._packs = hasattr(self.pipe, "_pack_latents")
        self._guidance = guidance if self.model.config.get("guidance_embeds") else None

    def text_states(self, captions: Sequence[str]) -> Batch:
        length = text_length(self.pipe)
        kwargs: dict[str, Any] = {} if length is None else {"max_sequence_length": length}
        if not self._packs:
            kwargs |= {"prompt_3": None, "do_classifier_free_guidance": False}
        found = self.pipe.encode_prompt(prompt=list(captions), prompt_2=None, **kwargs)
        return {"states": found[0], "pooled": found[1 if self._packs else 2]}

    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        latents = batch["latents"]
        noise = torch.randn(latents.shape, generator=generator)
        chosen = torch.randint(len(self._sigmas), (len(latents),), generator=generator)
        sigma = self._sigmas[chosen]
        s = sigma[:, None, None, None]
        inputs: dict[str, Any] = {
            "hidden_states": self._packed((1 - s) * latents + s * noise),
            "encoder_hidden_states": batch["states"],
            "pooled_projections": batch["pooled"],
            # FLUX's transformer multiplies by 1000 itself.
            "timestep": sigma if self._packs else sigma * len(self._sigmas),
        }
        if self._packs:
            height, width = latents.shape[2:]
            inputs |= {
                "img_ids": self.pipe._prepare_latent_image_ids(
                    len(latents), height // 2, width // 2, latents.device, torch.float32
                ),
                "txt_ids": torch.zeros(batch["states"].shape[1], 3),
            }
        if self._guidance is not None:
            inputs["guidance"] = torch.full((len(latents),), self._guidance)
        return inputs, self._packed(noise - latents)

    def feature_layers(self, paths: Sequence[str]) -> list[str]:
        """As CLEAR's authors: every fourth single block from the second on; in SD3 joint blocks."""
        single = [p for p in paths if p.startswith("single_transformer_blocks.")] or list(paths)
        return single[1::4] or single

    def latents(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        config: TrainConfig,
        generators: list[torch.Generator],
    ) -> Tensor:
        drawn = super().latents(prompts, size, config, generators)
        if self._packs:
            drawn = self.pipe._unpack_latents(drawn, *size, self.pipe.vae_scale_factor)
        return drawn

    def _packed(self, latents: Tensor) -> Tensor:
        if not self._packs:
            return latents
        packed: Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed


def refuse_other_inputs(pipe: DiffusionPipeline, model: Any) -> None:
    """Refuse a denoiser that is given more channels than it predicts: a picture, a mask.

    Raises:
        ValueError: it is.
    """
    config = model.config
    made = config.get("out_channels") or config.in_channels
    if config.in_channels != made:
        raise ValueError(
            f"pretrained_model_name_or_path: the denoiser of {type(pipe).__name__} takes"
            f" {config.in_channels} channels and predicts {made}, so it is also given a picture or"
            " a mask; one that draws from text alone is distilled"
        )


def noise_scheduler(scheduler: Any) -> DDPMScheduler:
    """The forward process of a pipeline's scheduler.

    Raises:
        ValueError: a prediction type other than epsilon and v_prediction.
    """
    given = scheduler.config.get("prediction_type", "epsilon")
    if given not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type: the scheduler has {given!r}, accepted are epsilon, v_prediction"
        )
    # diffusers drops what a config lists there, even if it was changed since.
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return DDPMScheduler.from_config(config)


def training_target(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the UNet is to predict: ε, or v = √ᾱ ε − √(1−ᾱ) x₀."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)
