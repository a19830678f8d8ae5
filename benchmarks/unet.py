"""One step of Stable Diffusion 1.5's UNet (860 M random parameters), softmax and linear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measure import Row, compare


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


def unet(pixels: tuple[int, ...] = (512, 1024, 1536)) -> Iterator[list[Row]]:
    """Softmax through SDPA against every self-attention layer linear, and against `auto`, fused."""
    import linfusion

    dtype = torch.bfloat16
    model = sd15_unet(dtype)
    text = torch.randn(1, 77, 768).to(dtype)
    now: dict[str, Any] = {"provider": "softmax"}

    for size in pixels:
        sample = torch.randn(1, 4, size // 8, size // 8).to(dtype)

        def switch(provider: str, layers: str | None = None, size: int = size) -> None:
            if now["provider"] == (provider, size):
                return
            if now["provider"] != "softmax":
                linfusion.restore(linfusion.unfuse(model))
                now["provider"] = "softmax"
            if provider != "softmax":
                linfusion.linearize(model, layers=layers, size=size if layers else None)
                linfusion.fuse(model)
                now["provider"] = (provider, size)

        def step(sample: torch.Tensor = sample) -> object:
            return model(sample, 500, text).sample

        before = {
            "softmax": lambda: switch("softmax"),
            "linfusion+fuse": lambda: switch("linfusion+fuse"),
            "auto+fuse": lambda: switch("auto+fuse", "auto"),
        }
        rivals = dict.fromkeys(before, step)
        runs = {512: 5, 1024: 3}.get(size, 2)
        yield compare("unet", size, dtype, rivals, runs=runs, before=before)
        switch("softmax")
