"""LinGen's transformer as the host of its own training: flow matching, a noise level a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from linfusion.models.stream import split_blocks
from linfusion.training.teachers.base import Batch, Teacher

HISTORY = 0.2  # the most noise of a block of the past


def noise_levels(
    batch: int, blocks: Sequence[int], shift: float, generator: torch.Generator | None = None
) -> Tensor:
    """t of every frame of every clip, [B, T]: one a block, of which the first few are history.

    As in diffusion forcing (Chen et al. 2024, arXiv:2407.01392) blocks differ in noise, so that one
    pass trains all of them: t = s σ / (1 + (s - 1) σ), σ logit-normal (Esser et al. 2024). Up to a
    block drawn for each clip they are as a stream commits them: half of them clean, half with up to
    `HISTORY` of noise.

    Args:
        batch: clips.
        blocks: frames of each block.
        shift: s.
        generator: of all draws; None is PyTorch's own.
    """
    count = len(blocks)
    sigma = torch.randn(batch, count, generator=generator).sigmoid()
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise, clean = torch.rand(2, batch, count, generator=generator)
    first = torch.randint(count, (batch, 1), generator=generator)  # that a stream would be at
    history = HISTORY * noise * (clean < 0.5)
    t = torch.where(torch.arange(count) < first, history, sigma)
    return t.repeat_interleave(torch.tensor(blocks), 1)


class LinGenHost(Teacher):
    """A pipeline whose LinGen transformer learns from data alone.

    x_t = (1 - t) x + t ε, and the target is ε - x; frames differ in t where the model has
    `causal_blocks`.

    Args:
        pipe: the pipeline.
    """

    attribute = "transformer"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        patch = self.model.config.patch_size
        self.multiple = self.pipe.vae_scale_factor_spatial * max(patch[1:])
        options = self.pipe.scheduler.config
        self._shift = options.get("flow_shift", options.get("shift")) or 1.0

    def text_states(self, captions: Sequence[str]) -> Batch:
        states, mask, *_ = self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False
        )
        pairs = [(states, mask)] if isinstance(states, Tensor) else zip(states, mask, strict=True)
        found: Batch = {}
        for i, (text, there) in enumerate(pairs):
            found |= {f"states_{i}": text, f"mask_{i}": there}
        return found

    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        config, clean = self.model.config, batch["latents"]
        noise = torch.randn(clean.shape, generator=generator)
        patch = config.patch_size[0]
        tokens = clean.shape[2] // patch
        blocks: Sequence[int] = (tokens,)
        if config.causal_blocks:
            blocks = split_blocks(tokens, config.block_frames // patch)
        t = noise_levels(len(clean), blocks, self._shift, generator)
        s = t.repeat_interleave(patch, 1)[:, None, :, None, None]
        encoders = range(len(config.text_dims))
        inputs = {
            "hidden_states": (1 - s) * clean + s * noise,
            "timestep": 1000 * t,
            "encoder_hidden_states": [batch[f"states_{i}"] for i in encoders],
            "encoder_attention_mask": [batch[f"mask_{i}"] for i in encoders],
        }
        return inputs, noise - clean
