"""Teachers that predict noise and its variance: DiT and PixArt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from linfusion.lit.pipeline import with_learned_variance
from linfusion.training.teachers.base import Batch, Teacher
from linfusion.training.teachers.images import noise_scheduler


class VarianceTeacher(Teacher):
    """What DiT and PixArt have in common.

    `example` gives as target noise and clean latents side by side, [B, 2C, h, w]: the bound on the
    variance needs both.

    Raises:
        ValueError: a scheduler that does not predict noise.
    """

    attribute = "transformer"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.scheduler = noise_scheduler(self.pipe.scheduler)
        if self.scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"prediction_type: {type(pipe).__name__} has"
                f" {self.scheduler.config.prediction_type!r}; LiT's loss is that of 'epsilon'"
            )

    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        latents = batch["latents"]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        inputs = {
            "hidden_states": self.scheduler.add_noise(latents, noise, timesteps),
            "timestep": timesteps,
            **self.conditions(batch),
        }
        return inputs, torch.cat([noise, latents], 1)

    @abstractmethod
    def conditions(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the denoiser that say what is in the picture."""


class ClassTeacher(VarianceTeacher):
    """DiT, whose captions are the names of its classes; the empty caption is no class."""

    squares_only = True

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(with_learned_variance(pipe))

    def text_states(self, captions: Sequence[str]) -> Batch:
        none = self.model.config.num_embeds_ada_norm
        labels = {"": none, **self.pipe.labels}
        unknown = [caption for caption in captions if caption not in labels]
        if unknown:
            raise ValueError(
                f"caption_column: {unknown[0]!r} is none of the model's classes:"
                f" {', '.join(list(self.pipe.labels)[:20])}"
            )
        return {"labels": torch.tensor([labels[caption] for caption in captions])}

    def conditions(self, batch: Batch) -> dict[str, Any]:
        return {"class_labels": batch["labels"]}


class PixArtTeacher(VarianceTeacher):
    """PixArt-α and PixArt-Σ."""

    def text_states(self, captions: Sequence[str]) -> Batch:
        states, mask, _, _ = self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False
        )
        return {"states": states, "mask": mask}

    def _draw(self, *args: Any, **kwargs: Any) -> Any:
        # The pipeline would go to the nearest size of its own list.
        return super()._draw(*args, use_resolution_binning=False, **kwargs)

    def conditions(self, batch: Batch) -> dict[str, Any]:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:  # PixArt-α of 1,024 px is told its size
            size = batch["time_ids"][:, 4:]
            added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        return {
            "encoder_hidden_states": batch["states"],
            "encoder_attention_mask": batch["mask"],
            "added_cond_kwargs": added,
        }
