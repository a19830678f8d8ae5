"""UNets of diffusers, their ControlNets, and the like, at tiny size."""

from __future__ import annotations

import torch

from tests.hosts.tiny import TEXT, Tiny

UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "out_channels": 4,
    "in_channels": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}
HALF = {k: v for k, v in UNET.items() if k not in ("up_block_types", "out_channels", "sample_size")}


LEVELS = ((8, 12), (4, 6), (2, 3))


def unet(r, text=16, batch=1, frames=(), **more):
    return {
        "sample": r(batch, 4, *frames, 8, 12),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": r(batch, TEXT, text),
        **more,
    }


CONTROL = {"conditioning_channels": 3, "conditioning_embedding_out_channels": (4, 4)}
CROSS3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
}


def without(config, *names):
    return {k: v for k, v in config.items() if k not in names}


def union(r):
    return unet(
        r,
        controlnet_cond=[r(1, 3, 16, 24)],
        control_type=torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
        control_type_idx=[0],
    )


def i2vgen(r):
    return unet(
        r,
        frames=(3,),
        fps=torch.tensor([8]),
        image_latents=r(1, 4, 3, 8, 12),
        image_embeddings=r(1, 16),
    )


def svd(r):
    return {
        "sample": r(1, 3, 4, 8, 12),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": r(1, 1, 16),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02]]),
    }


UNETS = {
    "UNet2DConditionModel": Tiny(UNET, unet, moved="sample", grids=LEVELS, levels=True),
    "UNet2DModel": Tiny(
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        lambda r: {"sample": r(1, 3, 16, 24), "timestep": torch.tensor([10])},
        moved="sample",
        grids=((16, 24), (8, 12)),
        levels=True,
    ),
    "UNet3DConditionModel": Tiny(
        UNET | CROSS3D, lambda r: unet(r, frames=(3,)), moved="sample", grids=LEVELS, levels=True
    ),
    "UNetMotionModel": Tiny(
        without(UNET, "attention_head_dim") | MOTION,
        lambda r: unet(r, frames=(3,)) | {"encoder_hidden_states": r(3, TEXT, 16)},
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
    "UNetSpatioTemporalConditionModel": Tiny(
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 16,
            "num_attention_heads": (2, 4),
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "sample_size": 8,
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
        },
        svd,
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
    "I2VGenXLUNet": Tiny(
        UNET | CROSS3D | {"attention_head_dim": 8},
        i2vgen,
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
    "Kandinsky3UNet": Tiny(
        {
            "in_channels": 4,
            "time_embedding_dim": 16,
            "groups": 8,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (32, 32),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
        lambda r: unet(r, encoder_attention_mask=torch.ones(1, TEXT)) | {"sample": r(1, 4, 8, 12)},
        moved="sample",
        grids=((8, 12), (4, 6)),
        levels=True,
    ),
    "DreamLiteUNetModel": Tiny(
        {
            "block_out_channels": (16, 16, 32),
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "layers_per_block": 1,
            "ff_mult": 2,
        },
        lambda r: unet(r) | {"sample": r(1, 4, 16, 24)},
        moved="sample",
        grids=((16, 24), *LEVELS),
        levels=True,
    ),
    "UNetControlNetXSModel": Tiny(
        without(UNET, "attention_head_dim", "out_channels", "in_channels", "layers_per_block")
        | {
            "num_attention_heads": 2,
            "ctrl_block_out_channels": [8, 8],
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
            "ctrl_conditioning_embedding_out_channels": (4, 4),
        },
        lambda r: unet(r, controlnet_cond=r(1, 3, 16, 24)),
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
    "ControlNetModel": Tiny(
        HALF | CONTROL,
        lambda r: unet(r, controlnet_cond=r(1, 3, 16, 24)),
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
    "ControlNetUnionModel": Tiny(
        HALF
        | CONTROL
        | {
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48,
        },
        union,
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
    "SparseControlNetModel": Tiny(
        without(HALF, "down_block_types")
        | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "conditioning_channels": 4,
            "conditioning_embedding_out_channels": (4, 4),
            "motion_num_attention_heads": 2,
            "concat_conditioning_mask": False,
            "use_simplified_condition_embedding": True,
        },
        lambda r: (
            unet(r, frames=(3,), controlnet_cond=r(1, 4, 3, 8, 12))
            | {"encoder_hidden_states": r(3, TEXT, 16)}
        ),
        moved="sample",
        grids=LEVELS,
        levels=True,
    ),
}
