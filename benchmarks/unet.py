"""One step of Stable Diffusion 1.5's UNet (860 M random parameters), softmax and linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Row, compare

SIZES = (512, 1024, 1536)


def sd15_unet(dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.5's UNet: diffusers' default but for three sizes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for weight in unet.parameters():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02)
    return unet


def unet(pixels: tuple[int, ...] = SIZES) -> Iterator[list[Row]]:
    """Softmax through SDPA against every self-attention layer linear, and `auto`, also fused."""
    import linfusion
    from linfusion.layers.record import record_of

    dtype = torch.bfloat16
    model = sd15_unet(dtype)
    text = torch.randn(1, 77, 768).to(dtype)

    def switch(layers: str | None, size: int, linear: bool, fused: bool) -> None:
        """From whatever ran before; `restore` drops its learned and fused weights."""
        if record_of(model) is not None:
            linfusion.restore(model)
        if linear:
            linfusion.linearize(model, layers=layers, size=size if layers else None)
        if fused:
            linfusion.fuse(model)

    for size in pixels:
        sample = torch.randn(1, 4, size // 8, size // 8).to(dtype)

        def step(sample: torch.Tensor = sample) -> object:
            return model(sample, 500, text).sample

        before: dict[str, Callable[[], object]] = {
            "softmax": partial(switch, None, size, linear=False, fused=False),
            "linfusion": partial(switch, None, size, linear=True, fused=False),
            "linfusion+fuse": partial(switch, None, size, linear=True, fused=True),
            "auto+fuse": partial(switch, "auto", size, linear=True, fused=True),
        }
        rivals: dict[str, Callable[[], object]] = dict.fromkeys(before, step)
        runs = 5 if size <= 512 else 3 if size <= 1024 else 2
        yield compare("unet", size, dtype, rivals, runs=runs, before=before)
