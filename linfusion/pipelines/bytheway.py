"""ByTheWay (Bu et al. 2025, arXiv:2410.06241, first called BroadWay): more motion, no training.

In the first steps it changes the attention maps over frames in the decoder of a motion UNet: they
are drawn towards those of the first decoder level, and what differs from frame to frame is raised.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

# Processors that compute softmax(q·kᵀ/√D)·v from the layer's to_q, to_k and to_v.
_PLAIN = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}


@contextlib.contextmanager
def bytheway(
    pipe: Any, *, alpha: float = 0.6, beta: float = 1.5, tau: int = 7, share: float = 0.2
) -> Iterator[None]:
    """Run an AnimateDiff pipeline with ByTheWay, for as long as the context lasts.

    It takes over the temporal attention of up_blocks.1 to the last. After the first steps, and for
    ever once the context is left, by an exception or not, the layers compute what they did, to the
    bit. See `enhanced` for what is done to the maps. Videos of one batch do not see each other.

        with bytheway(pipe):
            frames = pipe("a corgi on a skateboard", num_frames=16).frames[0]

    Args:
        pipe: any pipeline of diffusers with a UNetMotionModel as `unet`.
        alpha: how far the maps are drawn towards those of up_blocks.1, 0 to 1. The defaults are
            the authors' for AnimateDiff; for VideoCrafter2 they take 0.1 and `beta` 10.
        beta: least factor of the high frequencies, 0 or more.
        tau: frequencies raised on each side of the highest; below half the number of frames.
        share: of the denoising steps, from the first.

    Raises:
        ValueError: an argument out of range, another model, layers with a processor of their own
            or without counterpart in up_blocks.1; before anything changes. While it runs: `tau`
            and the number of frames, or attention with a mask or over text.
    """
    for name, value, low, high in (
        ("alpha", alpha, 0, 1),
        ("beta", beta, 0, math.inf),
        ("tau", tau, 0, math.inf),
        ("share", share, 0, 1),
    ):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or value == math.inf:
            raise ValueError(f"{name}: got {value!r}, accepted is {low} to {high}")
    modules, layers = _temporal(getattr(pipe, "unet", None))
    run = _Run(pipe, alpha, beta, int(tau), share)
    before = [layer.processor for layer, _ in layers]
    hooks = [pipe.unet.register_forward_pre_hook(run.begin, with_kwargs=True)]
    try:
        hooks += [m.register_forward_pre_hook(run.enter, with_kwargs=True) for m in modules]
        for (layer, place), processor in zip(layers, before, strict=True):
            layer.processor = _Processor(run, place, processor)
        yield
    finally:
        for (layer, _), processor in zip(layers, before, strict=True):
            layer.processor = processor
        for hook in hooks:
            hook.remove()


def energy(maps: Tensor) -> Tensor:
    """Energy of attention maps (Bu et al. 2025, eq. 4): mean over pixels, heads and queries.

    E(A) = mean Σ_key A²

    Args:
        maps: [B, P, H, F, F] over pixels, heads, query and key frames.

    Returns:
        [B].
    """
    return maps.square().sum(-1).mean((1, 2, 3))


def enhanced(
    maps: Tensor, first: Tensor, *, alpha: float, beta: float, tau: int, guided: bool
) -> Tensor:
    """Attention maps after self-guidance and motion enhancement (Bu et al. 2025, eq. 3 to 7).

    A' = A + α (A₁ − A);  Â' = DFT of A' along the keys, of which |f − F/2| ≤ τ is high;
    β_c = √((E(A) − E_low(A')) / E_high(A')),  A'' = IDFT(Â'_low + max(β, β_c) Â'_high)

    E_low + E_high = E(A') (Parseval), so that E(A'') ≥ E(A): guidance cannot take motion away.
    Frequency 0 is low, so rows keep their sum of 1, which the authors divide by; single entries
    may become negative. For an even F the high band is the authors'; for an odd one theirs is not
    symmetric, and this one is.

    Args:
        maps: A [B, P, H, F, F] over pixels, heads, query and key frames.
        first: A₁ in the same shape, the maps of up_blocks.1.
        alpha, beta, tau: α, β, τ.
        guided: whether the second half of the batch is the conditional one of classifier-free
            guidance: energies are then those of that half, and each video's factor serves both.

    Returns:
        A'' [B, P, H, F, F].

    Raises:
        ValueError: τ is half the number of frames or more, which would raise frequency 0.
    """
    frames = maps.shape[-1]
    if tau >= frames / 2:
        raise ValueError(f"tau: got {tau} for {frames} frames, accepted is below {frames / 2:g}")
    high = (torch.arange(frames, device=maps.device) - frames / 2).abs() <= tau
    videos = len(maps) // (2 if guided else 1)
    drawn = maps + alpha * (first - maps)
    spectrum = torch.fft.fft(drawn, dim=-1)
    e_high = energy((spectrum[-videos:] * high).abs()) / frames
    e_low = energy((spectrum[-videos:] * ~high).abs()) / frames
    # What guidance took from the high band; less than nothing if the low one alone has gained.
    lost = (energy(maps[-videos:]) - e_low).clamp_min(0)
    factor = torch.where(e_high > 0, (lost / e_high).sqrt(), 0).clamp_min(beta)
    factor = factor.repeat(len(maps) // videos).view(-1, 1, 1, 1, 1)
    return torch.fft.ifft(torch.where(high, spectrum * factor, spectrum), dim=-1).real


@dataclass
class _Run:
    """What the layers share during a forward pass."""

    pipe: Any
    alpha: float
    beta: float
    tau: int
    share: float
    active: bool = False
    grid: tuple[int, int] = (0, 0)  # height and width in the module that is running
    first: dict[tuple[int, ...], tuple[Tensor, tuple[int, int]]] = field(default_factory=dict)

    def begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the UNet: is this one of the first steps?"""
        self.first.clear()
        now = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0]
        # a video-to-video run begins in the middle of the schedule
        steps = self.pipe.scheduler.timesteps[-self.pipe.num_timesteps :]
        count = math.ceil(self.share * len(steps) - 1e-9)
        self.active = bool((steps[:count].cpu() == now.cpu()).any())

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a motion module, which takes [B·F, C, height, width]."""
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.grid = (states.shape[-2], states.shape[-1])

    def map(self, maps: Tensor, place: tuple[int, ...]) -> Tensor:
        """What becomes of the maps [B·P, H, F, F] of the layer at `place`."""
        block, *within = place
        key, pixels = tuple(within), self.grid[0] * self.grid[1]
        if block == 1:
            self.first[key] = (maps, self.grid)
        first = _resized(*self.first[key], self.grid)
        shape = (-1, pixels, *maps.shape[1:])
        return enhanced(
            maps.view(shape),
            first.view(shape),
            alpha=self.alpha,
            beta=self.beta,
            tau=self.tau,
            guided=bool(self.pipe.do_classifier_free_guidance),
        ).flatten(0, 1)


class _Processor:
    """A temporal attention layer with its maps written out; past the first steps, as it was."""

    def __init__(self, run: _Run, place: tuple[int, ...], before: Any) -> None:
        self.run, self.place, self.before = run, place, before

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.run.active:
            found: Tensor = self.before(
                attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs
            )
            return found
        asked = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            **kwargs,
        }
        for name, value in asked.items():
            if value is not None:
                raise ValueError(f"{name}: ByTheWay cannot honour it in temporal attention")

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        maps = (q.float() @ k.float().transpose(-1, -2) * attn.scale).softmax(-1)
        out = self.run.map(maps, self.place).to(v.dtype) @ v
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return attn.to_out[1](out) / attn.rescale_output_factor


def _temporal(unet: Any) -> tuple[list[nn.Module], list[tuple[Attention, tuple[int, ...]]]]:
    """The motion modules of up_blocks.1 on and their layers, each with (block, place in it)."""
    from diffusers import UNetMotionModel
    from diffusers.models.attention import BasicTransformerBlock

    if not isinstance(unet, UNetMotionModel) or len(unet.up_blocks) < 2:
        raise ValueError(
            f"pipe: its unet is {type(unet).__name__}, accepted is a UNetMotionModel of two levels"
            " or more"
        )
    modules: list[nn.Module] = []
    layers: list[tuple[Attention, tuple[int, ...]]] = []
    for b, block in enumerate(unet.up_blocks):
        for m, module in enumerate(block.motion_modules if b else []):
            modules.append(module)
            for t, transformer in enumerate(module.transformer_blocks):
                if type(transformer) is not BasicTransformerBlock:  # FreeNoise: windows of frames
                    raise ValueError(
                        f"pipe: its motion modules are made of {type(transformer).__name__},"
                        " accepted is BasicTransformerBlock (disable_free_noise)"
                    )
                for a, layer in enumerate((transformer.attn1, transformer.attn2)):
                    if layer is not None:
                        layers.append((layer, (b, m, t, a)))
    heads = {place[1:]: layer.heads for layer, place in layers if place[0] == 1}
    for layer, place in layers:
        if type(layer.processor).__name__ not in _PLAIN:
            raise ValueError(
                f"pipe: a temporal layer of up_blocks.{place[0]} has a"
                f" {type(layer.processor).__name__}, accepted are {sorted(_PLAIN)}"
            )
        if heads.get(place[1:]) != layer.heads:
            raise ValueError(
                f"pipe: a temporal layer of up_blocks.{place[0]} has no counterpart of"
                f" {layer.heads} heads in up_blocks.1"
            )
    return modules, layers


def _resized(maps: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Maps [B·P, H, F, F] of pixels on one grid, interpolated to another: rows still sum to 1."""
    if grid == to:
        return maps
    x = maps.unflatten(0, (-1, *grid)).flatten(3).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=to, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, maps.shape[1:])
