"""Between the frames of a clip and its latents: how many, how large, encoded and decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from linfusion.pipelines.lingen.streaming_vae import StreamingVAEDecoder

VAES = (AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderKL)


def ratios(vae: Any) -> tuple[int, int]:
    """Frames to a latent frame after the first, and pixels to a latent along a side.

    Raises:
        ValueError: a VAE of another class.
    """
    if not isinstance(vae, VAES):
        names = ", ".join(kind.__name__ for kind in VAES)
        raise ValueError(f"vae: got {type(vae).__name__}, expected one of {names}")
    config = vae.config
    if isinstance(vae, AutoencoderKLWan):
        return config.scale_factor_temporal, config.scale_factor_spatial
    frames = 1 if isinstance(vae, AutoencoderKL) else config.temporal_compression_ratio
    return frames, 2 ** (len(config.block_out_channels) - 1)


def first_frame(vae: Any, latent: int) -> int:
    """The first frame that a latent frame becomes: as many come from the ones before it."""
    return 1 + (latent - 1) * ratios(vae)[0] if latent else 0


def latent_frames(vae: Any, frames: int, patch: int) -> int:
    """Latent frames of the clip of nearly so many frames that the VAE and the model can make.

    As WanPipeline rounds, which is down or one up to 1 more than a multiple of the ratio; then down
    to a multiple of `patch`, the latent frames of a token. CogVideoX decodes latent frames in pairs
    after the first, so an even number would give frames that were never encoded: one less.

    Args:
        vae: one of `VAES`.
        frames: wanted, from 1 on.
        patch: latent frames of a token.

    Raises:
        ValueError: there is no such clip at all.
    """
    ratio = ratios(vae)[0]
    paired = isinstance(vae, AutoencoderKLCogVideoX)
    if paired and patch % 2 == 0:
        raise ValueError(f"vae: {type(vae).__name__} decodes odd numbers; patch_size is {patch}")
    count = (frames - 1) // ratio + 1 if (frames - 1) % ratio == 0 else frames // ratio + 1
    count = max(count // patch, 1) * patch
    if paired and count % 2 == 0:
        count -= patch
    return count


def encode_clip(vae: Any, video: Tensor) -> Tensor:
    """Latents as the transformer knows them, the mode of each; drawn from nothing random.

    Args:
        vae: one of `VAES`.
        video: [B, 3, F, H, W] in -1 to 1; F - 1 a multiple of the ratio.

    Returns:
        [B, C, T, h, w], float32.
    """
    found = []
    for one in video.to(get_module_execution_device(vae), vae.dtype).split(1):
        # An image VAE has no frames: one after the other.
        pieces = one.unbind(2) if isinstance(vae, AutoencoderKL) else [one]
        modes = [vae.encode(piece).latent_dist.mode() for piece in pieces]
        found.append(torch.stack(modes, 2) if isinstance(vae, AutoencoderKL) else modes[0])
    latents = torch.cat(found).float()
    mean, std = _moments(vae, latents)
    return (latents - mean) / std


def as_decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents as `vae.decode` takes them, where the VAE is."""
    mean, std = _moments(vae, latents.float())
    return (latents.float() * std + mean).to(get_module_execution_device(vae), vae.dtype)


def decode_clip(vae: Any, latents: Tensor) -> Tensor:
    """Frames [B, 3, F, H, W] in about -1 to 1, from latents [B, C, T, h, w].

    Each video as `StreamingVAEDecoder` gives it, to the bit; where a causal VAE is set to tiles,
    which that does not do, as `vae.decode` does.
    """
    z = as_decoded(vae, latents)
    if not isinstance(vae, AutoencoderKL) and vae.use_tiling:
        return vae.decode(z, return_dict=False)[0]
    videos = (StreamingVAEDecoder(vae, z.shape[2]).samples(one) for one in z.split(1))
    return torch.cat([torch.cat(list(samples), 2) for samples in videos])


def as_colours(frames: Any) -> Any:
    """What diffusers' processors take: pictures in RGB, bytes as floats of 0 to 1, others as is."""
    if isinstance(frames, list | tuple):
        return [as_colours(frame) for frame in frames]
    if isinstance(frames, Image.Image):
        return frames.convert("RGB")
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8:
        return frames.astype(np.float32) / 255
    if isinstance(frames, Tensor) and frames.dtype == torch.uint8:
        return frames.float() / 255
    return frames


def _moments(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's own latents, for each channel."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    mean = latents.new_tensor((config.get("shift_factor") or 0.0) if mean is None else mean)
    std = latents.new_tensor(1.0 if std is None else std) / (config.get("scaling_factor") or 1.0)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
