"""The `guided` strategy: a later stage held to the picture of the one before.

Of LinFusion's `StableDiffusionXLHighResPipeline` and `StableDiffusionXLSuperResPipeline` (Liu et
al. 2024), which follow DemoFusion (Du et al. 2024). With T training timesteps and

    f = (1 + cos(π (T - t) / T)) / 2,  c₁ = f^s₁,  c₂ = f^s₂,  c₃ = 0.99 f^s₃ + 0.01,

a step at timestep t of the stage that enlarges x₀ by the ratio r is

    x ← (1 - c₁) x + c₁ add_noise(x₀, ε, t)                  skip residual; ε is drawn once a stage
    a = step(x, UNet(x))
    b = step(x, UNet with convolutions dilated by r (blur of x, restandardised))
    x ← (1 - c₂) a + c₂ b

and after the stage each channel gets the mean and the deviation it has in the base latents. A
sampler's step is affine in the model's output, so step(x, (1 - c₂) UNet(x) + c₂ UNet'(x)) is the
same blend: the UNet's forward is wrapped and the pipeline's own loop runs. (A scheduler with
`thresholding` or `clip_sample` is affine where it does not clip.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Statistics = tuple[Tensor, Tensor]  # mean and deviation of each channel, [B, C, 1, 1]


@dataclass(frozen=True)
class Scales:
    """Constants of the recipe: s₁, s₂, s₃ above, and the blur's deviation where c₃ is 1, in
    latent pixels."""

    cosine_scale_1: float = 3.0
    cosine_scale_2: float = 1.0
    cosine_scale_3: float = 1.0
    gaussian_sigma: float = 0.8


def weights(t: float, timesteps: int, scales: Scales) -> tuple[float, float, float]:
    """c₁, c₂, c₃ at timestep t; see the module."""
    f = 0.5 * (1 + math.cos(math.pi * (timesteps - t) / timesteps))
    c1, c2, c3 = f**scales.cosine_scale_1, f**scales.cosine_scale_2, f**scales.cosine_scale_3
    return c1, c2, 0.99 * c3 + 0.01


class Dilated(TorchFunctionMode):
    """Within, convolutions of more than one pixel read pixels `ratio` times as far apart.

    Padding grows as dilation does, so sizes stay. The layers are not touched: other threads call
    them as they are.
    """

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and max(args[1].shape[2:]) > 1:
            return self._conv2d(*args, **kwargs)
        # What a convolution with a padding_mode does first.
        if func is F.pad and kwargs.get("mode", "constant") != "constant":
            return F.pad(args[0], [p * self.ratio for p in args[1]], *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if not isinstance(padding, str):
            padding = self._wider(padding)
        return F.conv2d(x, weight, bias, stride, padding, self._wider(dilation), groups)

    def _wider(self, value: Any) -> Any:
        return tuple(
            v * self.ratio for v in (value if isinstance(value, tuple) else (value, value))
        )


def blur(x: Tensor, ratio: int, sigma: float) -> Tensor:
    """Gaussian of 2·ratio - 1 pixels and deviation `sigma` over [B, C, H, W], zeros outside.

    One axis after the other; pixels beyond 8 deviations have weights that float32 cannot add.
    """
    reach = min(ratio - 1, math.ceil(8 * sigma))
    if reach == 0:
        return x
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)]
    kernel = torch.tensor([w / sum(weights) for w in weights], device=x.device)
    channels = x.shape[1]
    out = x.float()
    for shape, padding in (((1, 1, -1, 1), (reach, 0)), ((1, 1, 1, -1), (0, reach))):
        weight = kernel.view(shape).repeat(channels, 1, 1, 1)
        out = F.conv2d(out, weight, padding=padding, groups=channels)
    return out.to(x.dtype)


def statistics(x: Tensor) -> Statistics:
    """Mean and deviation of each channel of each picture, in float32."""
    deviation, mean = torch.std_mean(x.float(), dim=(-2, -1), keepdim=True)
    return mean, deviation


def restandardise(x: Tensor, like: Statistics) -> Tensor:
    """x with the mean and the deviation `like` in each channel."""
    mean, deviation = statistics(x)
    scaled = (x.float() - mean) / deviation.clamp(min=1e-12) * like[1] + like[0]
    return scaled.to(x.dtype)


@dataclass
class Guide:
    """One stage of the recipe.

    Attributes:
        scheduler: of the pipeline that runs the stage.
        start: x₀, the latents of the enlarged picture [1, C, h, w].
        noise: ε, the noise the pipeline itself started from.
        ratio: how much larger the stage is than the size the model was made for.
        scales: the recipe's constants.
    """

    scheduler: Any
    start: Tensor
    noise: Tensor
    ratio: int
    scales: Scales

    def blend(
        self, forward: Any, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor]:
        """(1 - c₂) UNet(x) + c₂ UNet'(blurred x), as `forward` returns it without a dict."""
        _, c2, c3 = self._weights(timestep)
        kwargs["return_dict"] = False
        plain = forward(sample, timestep, *args, **kwargs)[0]
        blurred = blur(sample, self.ratio, self.scales.gaussian_sigma * c3)
        blurred = restandardise(blurred, statistics(sample))
        with Dilated(self.ratio):
            wide = forward(blurred, timestep, *args, **kwargs)[0]
        return (torch.lerp(plain.float(), wide.float(), c2).to(plain.dtype),)

    def pull(self, latents: Tensor, t: Any) -> Tensor:
        """The skip residual, applied to the latents that the step at timestep t starts from."""
        c1, _, _ = self._weights(t)
        t = torch.as_tensor(t, device=latents.device).reshape(1)
        start, noise = self.start.to(latents), self.noise.to(latents)
        reference = self.scheduler.add_noise(start, noise, t)
        return torch.lerp(latents.float(), reference.float(), c1).to(latents.dtype)

    def _weights(self, t: Any) -> tuple[float, float, float]:
        return weights(float(t), self.scheduler.config.num_train_timesteps, self.scales)
