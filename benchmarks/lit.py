"""LiT's attention at the width of DiT-XL/2 against softmax: the core, its heads, whole steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, compare
from linfusion.attention.lit import LinearMixer

WIDTH, SOFTMAX_HEADS = 1152, 16
TOKENS = (256, 1024, 4096, 16384)  # 256, 512, 1024 and 2048 px
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (256, 512, 1024, 2048)
BLOCKS = 2  # of 28 that are all the same: at 2048 px softmax takes a minute for these


def _tokens(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Projections [1, N, C]."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, count, WIDTH).to(dtype)
    return q, k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (SOFTMAX_HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _lit(q: Tensor, k: Tensor, v: Tensor, **form: Any) -> Callable[[], Tensor]:
    """Attention and convolution of one layer, projections excluded."""
    mixer = LinearMixer(WIDTH, form).to(q.dtype)
    if mixer.dwc is not None:
        mixer.dwc.reset_parameters()
    side = math.isqrt(q.shape[1])
    return partial(mixer, q, k, v, v, (side, side))


def core() -> Iterator[list[Row]]:
    """Two heads and the convolution against SDPA with 16 heads."""
    for dtype in DTYPES:
        for count in TOKENS:
            x = _tokens(count, dtype)
            rivals: dict[str, Callable[[], object]] = {
                "sdpa": partial(_sdpa, *x),
                "lit h=2": _lit(*x, heads=2),
                "lit h=2, no conv": _lit(*x, heads=2, conv=None),
            }
            turns = {256: 25, 1024: 15, 4096: 5}.get(count, 3)
            yield compare("lit core", count, dtype, rivals, runs=turns)


def heads() -> Iterator[list[Row]]:
    """Cost against the number of heads h: state and read take 2·N·C²/h, softmax 2·N²·C."""
    for count in (256, 1024, 4096):
        x = _tokens(count, torch.float32)
        rivals: dict[str, Callable[[], object]] = {"sdpa": partial(_sdpa, *x)}
        rivals |= {f"lit h={h}": _lit(*x, heads=h) for h in (1, 2, 4, 8, 16, 32)}
        yield compare("lit heads", count, torch.float32, rivals, runs=9 if count < 4096 else 3)


def convolution() -> Iterator[list[Row]]:
    """The shared filter as a call for all heads, channels last, against one over [B·h, d, H, W]."""
    for dtype in DTYPES:
        for count in (1024, 4096):
            v = _tokens(count, dtype)[2]
            conv = LinearMixer(WIDTH, {"heads": 2}).dwc
            assert conv is not None
            conv.reset_parameters()
            side = math.isqrt(count)

            def authors(v: Tensor = v, conv: Any = conv, side: int = side) -> Tensor:
                image = v.float().view(1, -1, 2, WIDTH // 2).permute(0, 2, 3, 1)
                image = image.reshape(2, WIDTH // 2, side, side)
                out = F.conv2d(image, conv.weight, conv.bias, padding=2, groups=len(conv.weight))
                return out.view(1, WIDTH, -1).transpose(1, 2)

            rivals = {"authors": authors, "lit": partial(conv, v, (side, side))}
            yield compare("lit conv", count, dtype, rivals, runs=9)


def dit_xl(blocks: int, dtype: torch.dtype) -> Any:
    """DiT-XL/2 with random weights."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=8, num_layers=blocks, norm_eps=1e-6)
    positions = DiTTransformer2DModel(out_channels=8, num_layers=1).pos_embed
    for block in model.transformer_blocks[1:]:  # one embedder for all, as DiT has
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    model.pos_embed = positions.to(dtype)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.normal_(std=0.02)
    return model


def step(sizes: tuple[int, ...] = SIZES, blocks: int = BLOCKS) -> Iterator[list[Row]]:
    """Blocks of DiT-XL/2 in bfloat16: softmax, LiT in every layer, and `auto`."""
    import linfusion
    from linfusion.layers.record import record_of

    dtype = torch.bfloat16

    def switch(model: Any, layers: str | None, size: int, linear: bool) -> None:
        if record_of(model) is not None:
            linfusion.restore(model)
        if not linear:
            return
        try:
            linfusion.linearize(model, "lit", heads=2, layers=layers, size=size if layers else None)
        except ValueError as error:
            if "found no layer" not in str(error):  # where softmax costs less, auto keeps it
                raise

    model = dit_xl(blocks, dtype)
    for size in sizes:
        latent = torch.randn(1, 4, size // 8, size // 8).to(dtype)
        run = partial(model, latent, torch.tensor([500]), torch.tensor([207]))
        before: dict[str, Callable[[], object]] = {
            "softmax": partial(switch, model, None, size, linear=False),
            "lit h=2": partial(switch, model, None, size, linear=True),
        }
        if size == SIZES[0]:
            before["lit h=2, auto"] = partial(switch, model, "auto", size, linear=True)
        rivals: dict[str, Callable[[], object]] = dict.fromkeys(before, run)
        runs = 3 if size < 1024 else 1
        yield compare("DiT-XL/2", size, dtype, rivals, runs=runs, before=before)
