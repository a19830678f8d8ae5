"""What a teacher offers the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from linfusion.pipelines.arguments import draw_arguments, pixel_multiple
from linfusion.pipelines.load import in_one_dtype
from linfusion.training.config import TrainConfig

Batch = dict[str, Tensor]


class Teacher(ABC):
    """A pipeline whose denoiser is teacher and student at once.

    Args:
        pipe: the pipeline.

    Attributes:
        pipe: the pipeline.
        attribute: name of its denoiser.
        multiple: what every side in pixels is a multiple of.
        squares_only: whether it draws nothing else.
    """

    attribute: str
    squares_only = False

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe: Any = pipe
        self.multiple = pixel_multiple(pipe)

    @property
    def model(self) -> Any:
        """The denoiser, perhaps wrapped for the run."""
        return getattr(self.pipe, self.attribute)

    @model.setter
    def model(self, model: nn.Module) -> None:
        setattr(self.pipe, self.attribute, model)

    @abstractmethod
    def text_states(self, captions: Sequence[str]) -> Batch:
        """{"states": [B, L, D]} and, where the model reads one, {"pooled": [B, D']}."""

    @abstractmethod
    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the denoiser for a noised batch, and what it is to predict.

        Args:
            batch: "latents" [B, C, h, w] and what `text_states` gave.
            generator: the only source of noise and time.
        """

    def feature_layers(self, paths: Sequence[str]) -> list[str]:
        """Those of the replaced layers whose outputs are compared unless the run says others."""
        return list(paths)

    def latents(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        config: TrainConfig,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Scaled latents [B, C, h, w] of pictures the teacher draws."""
        drawn: Tensor = self._draw(prompts, size, config, generators, output_type="latent")
        return drawn

    def pictures(self, config: TrainConfig) -> list[Image.Image]:
        """One for each validation prompt, all from the same noise."""
        size = (config.resolution, config.resolution)
        return [
            self._draw([p], size, config, [torch.Generator().manual_seed(config.seed)])[0]
            for p in config.validation_prompts
        ]

    def _draw(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        config: TrainConfig,
        generators: list[torch.Generator],
        **kwargs: Any,
    ) -> Any:
        arguments = draw_arguments(
            self.pipe, len(prompts), guidance_scale=config.teacher_guidance_scale
        )
        with in_one_dtype(self.pipe):
            return self.pipe(
                list(prompts),
                **arguments,
                height=size[0],
                width=size[1],
                num_inference_steps=config.teacher_steps,
                generator=generators,
                **kwargs,
            ).images
