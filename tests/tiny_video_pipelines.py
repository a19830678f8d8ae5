"""Text-to-video pipelines of diffusers at tiny size, without files."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DPMSolverMultistepScheduler,
    SanaVideoPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from transformers import Gemma2Config, Gemma2Model

from tests.tiny_joint import tiny_t5, tiny_t5_tokenizer
from tests.tiny_video_hosts import TEXT_WIDTH, tiny_cogvideox, tiny_sana, tiny_wan

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def tiny_wan_vae() -> AutoencoderKLWan:
    """2 frames and 2 pixels to a latent, 4 channels."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.8, 1.0, 1.2],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    ).eval()


def tiny_wan_pipeline(**more: object) -> WanPipeline:
    return WanPipeline(
        **{
            "tokenizer": tiny_t5_tokenizer(),
            "text_encoder": tiny_t5(),
            "vae": tiny_wan_vae(),
            "scheduler": UniPCMultistepScheduler(**FLOW),
            "transformer": tiny_wan(),
            **more,
        }
    )


def tiny_sana_pipeline() -> SanaVideoPipeline:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return SanaVideoPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=Gemma2Model(config).eval(),
        vae=tiny_wan_vae(),
        transformer=tiny_sana(),
        scheduler=DPMSolverMultistepScheduler(**FLOW),
    )


def tiny_cogvideox_pipeline(**options: object) -> CogVideoXPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(),
        vae=vae.eval(),
        transformer=tiny_cogvideox(),
        scheduler=CogVideoXDDIMScheduler(**{"prediction_type": "v_prediction", **options}),
    )
