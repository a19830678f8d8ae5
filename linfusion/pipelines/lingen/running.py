"""What callbacks ask a running pipeline for, and what it gives in the end."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class LinGenPipelineOutput(BaseOutput):
    """Videos.

    Attributes:
        frames: as `output_type` asks: [B, F, H, W, 3] in 0 to 1 ("np"), [B, F, 3, H, W] ("pt"), a
            list of lists of pictures ("pil"), or latents [B, C, T, h, w] ("latent").
    """

    frames: Any


class Running:
    """The state of a call, by the names that diffusers' callbacks know."""

    _guidance_scale = 1.0
    _num_timesteps = 0
    _interrupt = False
    _current_timestep: Any = None

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of a block, as callbacks count them."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop: later blocks are not begun."""
        return self._interrupt
