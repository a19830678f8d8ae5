"""Low-resolution guidance: a large stage held to the picture of the one before by its flow.

Of I-Max (Du et al. 2024, arXiv:2410.07536, section 2.2, "projected flow"), with the constants of
its code for FLUX. Without it, windows that do not see one another make blocks above 4K. With the
latents g of the enlarged picture, a step i of n at noise level σ, where the model says v for x, is

    x₀ = x - σ v                                       the clean latents it expects
    x₀' = x₀ + w cᵢ (P g - P x₀),  cᵢ = (1 + cos(π i / n)) / 2
    v' = (x - x₀') / σ

P keeps what the smaller picture has, the lowest band of Haar's wavelets: every r by r block becomes
its average, r being 2 where the picture doubled. As P P = P, at the first step of w = 1 P x₀' is
P g: low frequencies are those of the picture before, high ones the model's own. I-Max writes it
with velocities; since P is linear that is the same. It commutes with classifier-free guidance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from linfusion.pipelines.highres.hosts import is_packed, unpacked
from linfusion.pipelines.highres.stages import Stage


def low_frequencies(x: Tensor, block: int) -> Tensor:
    """P: [B, C, H, W] with every block of `block` by `block` at its average, float32.

    Blocks at the lower and right border may be cut off; they have the average of what is there.
    """
    height, width = x.shape[-2:]
    small = F.avg_pool2d(x.float(), block, ceil_mode=True, count_include_pad=False)
    large = small.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return large[..., :height, :width]


@dataclass
class Projection:
    """One stage under low-resolution guidance.

    Attributes:
        runs: the pipeline that runs the stage.
        stage: with the weight w as `pull`.
        start: g, the latents of the enlarged picture [1, C, h, w].
    """

    runs: Any
    stage: Stage
    start: Tensor

    def __post_init__(self) -> None:
        self.block = 2 ** max(1, round(math.log2(self.stage.enlarged)))
        self.low = low_frequencies(self.start, self.block)

    def follow(self, forward: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """v' for the v of `forward`; goes around the transformer."""
        x = args[0] if args else kwargs["hidden_states"]
        v = forward(*args, **kwargs)[0]
        scheduler = self.runs.scheduler
        at = scheduler.step_index
        done = 0 if at is None else at - scheduler.begin_index
        sigma = float(scheduler.sigmas[scheduler.begin_index + done])
        weight = self.stage.pull * 0.5 * (1 + math.cos(math.pi * done / self.runs.num_timesteps))
        clean = self._picture(x).float() - sigma * self._picture(v).float()
        missing = self.low.to(clean.device) - low_frequencies(clean, self.block)
        return ((v.float() - weight / sigma * self._tokens(missing)).to(v.dtype),)

    def _picture(self, x: Tensor) -> Tensor:
        return unpacked(self.runs, x, self.stage.height, self.stage.width)

    def _tokens(self, x: Tensor) -> Tensor:
        return self.runs._pack_latents(x, *x.shape) if is_packed(self.runs) else x
