"""A clip drawn block by block: noise of its own, denoised with the past frozen, then committed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from linfusion.models.stream import StreamState
from linfusion.pipelines.lingen.text import Text


@dataclass
class Side:
    """A side of classifier-free guidance: what is wanted, or what is not.

    Attributes:
        texts: (embeddings, masks) of each prompt over time, as the transformer takes them.
        state: the past as it was drawn with these texts; one stays empty without blocks.
    """

    texts: list[tuple[Text, Text]]
    state: StreamState = field(default_factory=StreamState)

    def text(self, prompt: int) -> tuple[Text, Text]:
        """Of a prompt over time; what is not wanted is one for all of them."""
        return self.texts[min(prompt, len(self.texts) - 1)]


@dataclass
class Clip:
    """A clip to be drawn: everything that decides it, checked and encoded.

    Attributes:
        blocks: latent frames of each; one block of them all, for a model without blocks.
        shape: (videos, channels, height, width) of the latents.
        sides: what is wanted and, under guidance, what is not.
        prompts: which text each block is drawn with.
        seeds: of the noise, one a video.
        noise: [B, C, T, h, w] of the whole clip; None draws it block by block from the seeds.
        given: [B, C, G, h, w], clean latents that the clip begins with; G may be 0.
        steps, guidance_scale: of the call.
        callback, callback_tensors: of the call.
    """

    blocks: tuple[int, ...]
    shape: tuple[int, int, int, int]
    sides: list[Side]
    prompts: list[int]
    seeds: list[int]
    noise: Tensor | None
    given: Tensor
    steps: int
    guidance_scale: float
    callback: Callable[..., Any] | None = None
    callback_tensors: Sequence[str] = ("latents",)

    def span(self, index: int) -> tuple[int, int]:
        """The first latent frame of a block, and the one after its last."""
        start = sum(self.blocks[:index])
        return start, start + self.blocks[index]

    def to_draw(self, first: int = 0) -> int:
        """Blocks from `first` on that are not given whole."""
        ends = [self.span(i)[1] for i in range(first, len(self.blocks))]
        return sum(end > self.given.shape[2] for end in ends)


def draw_seeds(generator: Any, count: int) -> list[int]:
    """A seed for each video, drawn from the generator, from one for each, or from torch's own."""
    each = generator if isinstance(generator, list) else [generator] * count
    return [
        int(torch.randint(2**63 - 1, (), generator=g, device="cpu" if g is None else g.device))
        for g in each
    ]


def block_seed(seed: int, index: int) -> int:
    """Seed of a block's noise: the same everywhere and always, whatever was drawn before."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def draw_blocks(pipe: Any, clip: Clip, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Draw the blocks from `first` on, whose past the sides of the clip hold.

    Yields:
        The index of a block and its latents [B, C, f, h, w], float32. Where the pipeline was
        interrupted, the last block is as its last step left it.
    """
    causal = pipe.transformer.config.causal_blocks
    pipe.scheduler.set_timesteps(clip.steps, device=pipe._execution_device)
    steps = len(pipe.scheduler.timesteps)
    with pipe.progress_bar(total=steps * clip.to_draw(first)) as bar:
        for index in range(first, len(clip.blocks)):
            pipe._guidance_scale = clip.guidance_scale  # another stream may have set its own
            start, end = clip.span(index)
            latents = clip.given[:, :, start:end]
            if latents.shape[2] < end - start:
                latents = _denoised(pipe, clip, index, latents, bar)
            if causal and end < sum(clip.blocks) and not pipe.interrupt:
                for side in clip.sides:
                    text, mask = side.text(clip.prompts[index])
                    block = latents.to(pipe.transformer.dtype)
                    pipe.transformer.commit(block, text, mask, state=side.state)
            yield index, latents
            if pipe.interrupt:
                return


def _denoised(pipe: Any, clip: Clip, index: int, given: Tensor, bar: Any) -> Tensor:
    """The latents of a block, of which the given ones stay clean."""
    scheduler, model, device = pipe.scheduler, pipe.transformer, pipe._execution_device
    x, generators = _noise(clip, index, device)
    held = given.shape[2]
    x[:, :, :held] = given
    texts = [side.text(clip.prompts[index]) for side in clip.sides]
    names = ("prompt_embeds", "negative_prompt_embeds")
    tensors = dict(zip(names, (text for text, _ in texts), strict=False))
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = generators if len(generators) > 1 else generators[0]
    patch = model.config.patch_size[0]
    clean = torch.arange(x.shape[2] // patch, device=device) < held // patch

    scheduler.set_timesteps(clip.steps, device=device)  # what a scheduler remembers is of one block
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    timesteps = scheduler.timesteps
    pipe._num_timesteps = len(timesteps)
    with ExitStack() as stack:
        for side in clip.sides:
            stack.enter_context(side.state.frozen())
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            time = t * (1000 / scheduler.config.num_train_timesteps)
            if held:
                time = torch.where(clean, 0.0, time).expand(len(x), -1)
            predicted: list[Tensor] = []
            for side, name, (_, mask) in zip(clip.sides, names, texts, strict=False):
                if predicted and not pipe.do_classifier_free_guidance:
                    break
                state = side.state if model.config.causal_blocks else None
                out = model(x.to(model.dtype), time, tensors[name], mask, state, return_dict=False)
                predicted.append(out[0].float())
            v = predicted[0]
            if len(predicted) > 1:
                v = predicted[1] + pipe.guidance_scale * (v - predicted[1])
            x = scheduler.step(v, t, x, **extra, return_dict=False)[0].float()
            x[:, :, :held] = given
            if clip.callback is not None:
                tensors["latents"] = x
                wanted = {name: tensors.get(name) for name in clip.callback_tensors}
                tensors |= clip.callback(pipe, i, t, wanted) or {}
                x = tensors["latents"]
            bar.update()
    pipe._current_timestep = None
    return x


def _noise(clip: Clip, index: int, device: Any) -> tuple[Tensor, list[torch.Generator]]:
    """The noise of a block [B, C, f, h, w], and what draws that of its steps."""
    generators = [torch.Generator().manual_seed(block_seed(seed, index)) for seed in clip.seeds]
    start, end = clip.span(index)
    if clip.noise is not None:
        return clip.noise[:, :, start:end].clone(), generators
    channels, height, width = clip.shape[1:]
    shape = (1, channels, end - start, height, width)
    parts = [randn_tensor(shape, g, device=device, dtype=torch.float32) for g in generators]
    return torch.cat(parts), generators
