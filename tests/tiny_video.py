"""A LinGen pipeline at tiny size, with random weights that move everything."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
)

from linfusion import LinGenPipeline, LinGenTransformer3DModel
from tests.tiny import TEXT_WIDTH, tiny_text_encoder, tiny_tokenizer

CHANNELS = 4


def tiny_wan() -> AutoencoderKLWan:
    """4 frames and 4 pixels to a latent."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.8, 1.0, 1.2],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def tiny_cogvideox() -> AutoencoderKLCogVideoX:
    """4 frames and 4 pixels to a latent."""
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
    ).eval()


def tiny_image_vae() -> AutoencoderKL:
    """2 pixels to a latent."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


def tiny_transformer(causal: bool = True, **changes: object) -> LinGenTransformer3DModel:
    """Two layers; blocks of 3 latent frames."""
    torch.manual_seed(0)
    options = {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_dims": (TEXT_WIDTH,),
        "pos_embed_size": (160, 4, 4),
        "d_state": 4,
        "tesa_window": (4, 2, 2),
        "causal_blocks": causal,
        "block_frames": 3,
    }
    model = LinGenTransformer3DModel(**{**options, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tiny_lingen(causal: bool = True, make_vae=tiny_image_vae, **more: object) -> LinGenPipeline:
    """A pipeline of 16 px (32 px with a causal VAE); `more` are other components."""
    components = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": make_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_transformer(causal),
    }
    pipe = LinGenPipeline(**{**components, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe
