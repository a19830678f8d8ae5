"""The hosts of diffusers, one row a class, and rows from outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from linfusion.attention.hosts import grids
from linfusion.attention.hosts.grids import latent, levels, numbers, position_ids
from linfusion.attention.hosts.host import Arguments, Host

_BLOCKS = r"(single_)?transformer_blocks\.\d+\.attn"
_FIRST = r"transformer_blocks\.\d+\.attn1"
_WAN = r"blocks\.\d+\.attn1"
# Not temp_attentions and motion_modules, which see one pixel through time.
_UNET = r"(.*\.)?(base_|ctrl_)?attentions\.\d+\.transformer_blocks\.\d+\.attn1"

_LATENT = latent()
_FRAMES_FIRST = latent(axes=(1, 3, 4))  # [B, frames, C, h, w]
_CHANNELS_LAST = latent(axes=(1, 2, 3))  # [B, frames, h, w, C]
_IDS = position_ids("img_ids")
_FLUX = Host(_BLOCKS, _IDS)
_JOINT = Host(_BLOCKS, _LATENT, text_first=False)
_QWEN = Host(_BLOCKS, grids.image_shapes)
_SD3 = Host(r"transformer_blocks\.\d+\.attn2?", _LATENT, text_first=False)
_COG = Host(_FIRST, _LATENT)
_COG_VIDEO = Host(_FIRST, _FRAMES_FIRST)
_HUNYUAN_DIT = Host(_WAN, _LATENT)
_WAN_VIDEO = Host(r"(vace_)?blocks\.\d+\.attn1", _LATENT)
_UNETS = Host(_UNET, levels)
_LTX = Host(_FIRST, numbers("num_frames", "height", "width"))

HOSTS = {
    # pictures
    "FluxTransformer2DModel": _FLUX,
    "FluxControlNetModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "Flux3Transformer2DModel": Host(
        r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn",
        position_ids("img_ids", "image_cond_ids"),
    ),
    "ChromaTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": _FLUX,
    "BriaFibo2Transformer2DModel": Host(r"(noise_refiner|layers)\.\d+\.attention", grids.fibo2),
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": _QWEN,
    "QwenImageControlNetModel": _QWEN,
    "QwenImage21Transformer2DModel": Host(
        _BLOCKS, grids.qwen21, text_lengths=grids.qwen21_before, other_calls=True
    ),
    "NucleusMoEImageTransformer2DModel": Host(_BLOCKS, grids.image_shapes, text_first=False),
    "ZImageTransformer2DModel": Host(
        r"(noise_refiner|layers)\.\d+\.attention", grids.z_image, text_first=False
    ),
    "Lumina2Transformer2DModel": Host(
        r"(noise_refiner|layers)\.\d+\.attn",
        _LATENT,
        text_lengths=lambda arguments: arguments["encoder_attention_mask"].sum(1).tolist(),
    ),
    "LuminaNextDiT2DModel": Host(r"layers\.\d+\.attn1", _LATENT),
    "SD3Transformer2DModel": _SD3,
    "SD3ControlNetModel": _SD3,
    "AuraFlowTransformer2DModel": Host(r"(joint|single)_transformer_blocks\.\d+\.attn", _LATENT),
    "PRXTransformer2DModel": Host(r"blocks\.\d+\.attention", _LATENT),
    "HiDreamImageTransformer2DModel": Host(
        r"(double|single)_stream_blocks\.\d+\.block\.attn1", _LATENT, text_first=False
    ),
    "CogView3PlusTransformer2DModel": _COG,
    "CogView4Transformer2DModel": _COG,
    "GlmImageTransformer2DModel": _COG,
    "ErnieImageTransformer2DModel": Host(r"layers\.\d+\.self_attention", _LATENT, text_first=False),
    "Krea2Transformer2DModel": Host(r"transformer_blocks\.\d+\.attn", grids.krea2),
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "HunyuanDiT2DControlNetModel": _HUNYUAN_DIT,
    "HunyuanImageTransformer2DModel": _JOINT,
    "DiTTransformer2DModel": _COG,
    "PixArtTransformer2DModel": _COG,
    # videos
    "WanTransformer3DModel": _WAN_VIDEO,
    "WanVACETransformer3DModel": _WAN_VIDEO,
    "WanAnimateTransformer3DModel": _WAN_VIDEO,
    "ChronoEditTransformer3DModel": _WAN_VIDEO,
    "SkyReelsV2Transformer3DModel": _WAN_VIDEO,
    "AnyFlowTransformer3DModel": Host(_WAN, _FRAMES_FIRST),
    "HeliosTransformer3DModel": _WAN_VIDEO,
    "CosmosTransformer3DModel": _COG,
    "CosmosControlNetModel": Host(r"control_blocks\.\d+\.attn1", latent("controls_latents")),
    "AllegroTransformer3DModel": _COG,
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _LTX,
    "HunyuanVideoTransformer3DModel": _JOINT,
    "HunyuanVideo15Transformer3DModel": _JOINT,
    "HunyuanVideoFramepackTransformer3DModel": Host(_BLOCKS, grids.frame_pack, text_first=False),
    "MotifVideoTransformer3DModel": _JOINT,
    "MochiTransformer3DModel": Host(_FIRST, _LATENT, text_first=False),
    "EasyAnimateTransformer3DModel": _COG,
    "JoyImageEditTransformer3DModel": Host(r"double_blocks\.\d+\.attn", _LATENT, text_first=False),
    "CogVideoXTransformer3DModel": _COG_VIDEO,
    "ConsisIDTransformer3DModel": _COG_VIDEO,
    "Kandinsky5Transformer3DModel": Host(
        r"visual_transformer_blocks\.\d+\.self_attention", _CHANNELS_LAST
    ),
    "Kandinsky6Transformer3DModel": Host(
        r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", _CHANNELS_LAST
    ),
    "LatteTransformer3DModel": Host(_FIRST, latent(axes=(3, 4))),  # frame by frame
    # UNets: attention within a frame
    "UNet2DConditionModel": _UNETS,
    "UNet2DModel": Host(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+", levels),
    "UNet3DConditionModel": _UNETS,
    "UNetMotionModel": _UNETS,
    "UNetSpatioTemporalConditionModel": _UNETS,
    "I2VGenXLUNet": _UNETS,
    "UNetControlNetXSModel": _UNETS,
    "DreamLiteUNetModel": _UNETS,
    "UVit2DModel": Host(r"transformer_layers\.\d+\.attn1", grids.uvit),
    "Kandinsky3UNet": Host(r"(down|up)_blocks\.\d+\.attentions\.0\.attention", levels),
    "ControlNetModel": _UNETS,
    "ControlNetUnionModel": _UNETS,
    "SparseControlNetModel": _UNETS,
}


def describe_host(
    name: str,
    *,
    layers: str,
    grid: Callable[[Arguments, Arguments], Any],
    text_first: bool = True,
    text_lengths: Callable[[Arguments], list[int]] | None = None,
) -> None:
    """Teach the methods "clear" and "hybrid" a model that linfusion does not know.

    Args:
        name: of its class, or of one that it derives from; a row there is, is replaced.
        layers: regular expression, matched in full, of the paths of its layers that attend from
            pixels to pixels, with a `processor` of diffusers' kind.
        grid: (arguments of its forward by name, its config) -> (h, w) or (t, h, w) in tokens of
            its picture or video, or a list of such grids and of numbers of other tokens, in the
            order of the sequence.
        text_first: whether text comes before the pixels where both attend to one another.
        text_lengths: arguments -> tokens before the pixels of each sample, where samples have
            different numbers of them in one sequence.

    Raises:
        ValueError: `layers` is no regular expression, or `name` no name of a class.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: got {name!r}, expected the name of a model's class")
    try:
        re.compile(layers)
    except (re.error, TypeError) as error:
        raise ValueError(f"layers: {layers!r} is no regular expression: {error}") from None
    if not callable(grid):
        raise ValueError(f"grid: got {grid!r}, expected a function of arguments and config")
    HOSTS[name] = Host(layers, grid, text_first, text_lengths)


def host_of(model: nn.Module) -> Host | None:
    """The row of a model's class or of one it derives from, or None."""
    kinds = (kind.__name__ for kind in type(model).__mro__)
    return next((HOSTS[kind] for kind in kinds if kind in HOSTS), None)
