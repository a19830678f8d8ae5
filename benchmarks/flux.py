"""One step of a transformer of FLUX's width, cut to 2 double and 4 single blocks of 19 and 38."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Row, compare

SIZES = (1024, 2048)
TEXT = 512  # tokens


def flux_transformer(dtype: torch.dtype) -> Any:
    """1.25 billion random parameters: width 3072, 24 heads of 128."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02)
    return model


def flux(pixels: tuple[int, ...] = SIZES) -> Iterator[list[Row]]:
    """Full attention through SDPA against CLEAR, radius 8."""
    import linfusion
    from linfusion.layers.record import record_of

    dtype = torch.bfloat16
    model = flux_transformer(dtype)
    common = {
        "encoder_hidden_states": torch.randn(1, TEXT, 4096).to(dtype),
        "pooled_projections": torch.randn(1, 768).to(dtype),
        "timestep": torch.tensor([0.5]).to(dtype),
        "guidance": torch.tensor([3.5]).to(dtype),
        "txt_ids": torch.zeros(TEXT, 3),
    }

    def switch(radius: int | None) -> None:
        if record_of(model) is not None:
            linfusion.restore(model)
        if radius is not None:
            linfusion.linearize(model, "clear", radius=radius)

    for size in (256, *pixels):  # the first one is small: it warms up and is not reported
        side = size // 16
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()
        tokens = torch.randn(1, side * side, 64).to(dtype)

        def step(tokens: torch.Tensor = tokens, ids: torch.Tensor = ids) -> object:
            return model(hidden_states=tokens, img_ids=ids, **common).sample

        before: dict[str, Callable[[], object]] = {
            "softmax": partial(switch, None),
            "clear 8": partial(switch, 8),
        }
        rivals: dict[str, Callable[[], object]] = dict.fromkeys(before, step)
        runs = 3 if size <= 1024 else 1
        rows = compare("flux", size, dtype, rivals, runs=runs, before=before, warm=False)
        if size in pixels:
            yield rows
