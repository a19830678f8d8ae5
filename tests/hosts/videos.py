"""Video transformers of diffusers at tiny size."""

from __future__ import annotations

import torch

from tests.hosts.tiny import TEXT, Tiny, ones

T, H, W = 3, 4, 6
FRAMES_BEFORE = (56,)  # those of FramePack's history: 2 + 6 + 48 tokens


def video(r, channels=4, text=16, batch=1, grid=(T, 2 * H, 2 * W), **more):
    return {
        "hidden_states": r(batch, channels, *grid),
        "encoder_hidden_states": r(batch, TEXT, text),
        "timestep": torch.full((batch,), 500),
        **more,
    }


def frames_first(r, channels=4, text=8, batch=2, **more):
    found = video(r, channels, text, batch, **more)
    return found | {"hidden_states": found["hidden_states"].transpose(1, 2)}


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
ANYFLOW = {k: v for k, v in WAN.items() if k != "qk_norm"} | {
    "gate_value": 0.25,
    "deltatime_type": "r",
}
COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT,
}
COSMOS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
}
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 16,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def consisid(r):
    more = {"id_vit_hidden": [torch.ones(2, 2, 2)], "id_cond": torch.ones(2, 2)}
    return frames_first(r, **more)


def ltx(r, **more):
    return {
        "hidden_states": r(2, T * H * W, 4),
        "encoder_hidden_states": r(2, TEXT, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_attention_mask": ones(2, TEXT),
        "num_frames": T,
        "height": H,
        "width": W,
        **more,
    }


def ltx2(r):
    more = {"audio_hidden_states": r(2, 7, 4), "audio_encoder_hidden_states": r(2, TEXT, 16)}
    return ltx(r, audio_num_frames=7, fps=25.0, **more)


def hunyuan(r, **more):
    mask = torch.ones(1, TEXT)
    mask[:, -1] = 0
    return video(
        r,
        pooled_projections=r(1, 8),
        encoder_attention_mask=mask,
        guidance=torch.tensor([500]),
        **more,
    )


def framepack(r):
    return hunyuan(
        r,
        image_embeds=r(1, 3, 8),
        indices_latents=torch.arange(T) + 10,
        latents_clean=r(1, 4, 2, 2 * H, 2 * W),
        indices_latents_clean=torch.arange(2) + 8,
        latents_history_2x=r(1, 4, 2, 2 * H, 2 * W),
        indices_latents_history_2x=torch.arange(2) + 6,
        latents_history_4x=r(1, 4, 4, 2 * H, 2 * W),
        indices_latents_history_4x=torch.arange(4),
    )


def hunyuan15(r):
    masks = {
        "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 0]]),
        "encoder_hidden_states_2": r(1, 4, 8),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 8),
    }
    return video(r, grid=(T, H, W), **masks) | {"timestep": torch.tensor([1.0])}


def wan_animate(r):
    return {
        "hidden_states": r(1, 12, 21, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": r(1, TEXT, 16),
        "encoder_hidden_states_image": r(1, TEXT, 16),
        "pose_hidden_states": r(1, 4, 20, 8, 8),
        "face_pixel_values": r(1, 3, 77, 16, 16),
    }


def helios(r):
    return video(
        r,
        indices_hidden_states=torch.arange(T)[None] + 6,
        indices_latents_history_short=torch.arange(1)[None] + 5,
        indices_latents_history_mid=torch.arange(1)[None] + 4,
        indices_latents_history_long=torch.arange(4)[None],
        latents_history_short=r(1, 4, 1, 2 * H, 2 * W),
        latents_history_mid=r(1, 4, 1, 2 * H, 2 * W),
        latents_history_long=r(1, 4, 4, 2 * H, 2 * W),
    )


def kandinsky5(r):
    return {
        "hidden_states": r(1, T, 2 * H, 2 * W, 4),
        "encoder_hidden_states": r(1, TEXT, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": r(1, 8),
        "visual_rope_pos": [torch.arange(n) for n in (T, H, W)],
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6(r):
    return {
        "hidden_states": r(1, T, 2 * H, 2 * W, 4),
        "encoder_hidden_states": r(1, TEXT, 16),
        "pooled_projections": r(1, 8),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": r(1, 7, 4),
    }


def cosmos_control(r):
    return {
        "controls_latents": r(1, 4, T, 2 * H, 2 * W),
        "latents": r(1, 4, T, 2 * H, 2 * W),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": (r(1, TEXT, 16), r(1, 4, 8)),
        "condition_mask": torch.ones(1, 1, T, 2 * H, 2 * W),
        "padding_mask": torch.zeros(1, 1, 2 * H, 2 * W),
    }


VIDEOS = {
    "WanTransformer3DModel": Tiny(WAN, video, grids=((T, H, W),)),
    "WanVACETransformer3DModel": Tiny(
        WAN | {"vace_layers": [0], "vace_in_channels": 12},
        lambda r: video(r, control_hidden_states=r(1, 12, T, 2 * H, 2 * W)),
        grids=((T, H, W),),
    ),
    "WanAnimateTransformer3DModel": Tiny(
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        wan_animate,
        grids=((21, 4, 4),),
    ),
    "ChronoEditTransformer3DModel": Tiny(
        WAN | {"rope_temporal_skip_len": 8},
        lambda r: video(r, grid=(2, 2 * H, 2 * W)),
        grids=((2, H, W),),
    ),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, video, grids=((T, H, W),)),
    "AnyFlowTransformer3DModel": Tiny(
        ANYFLOW,
        lambda r: (
            frames_first(r, text=16, batch=1)
            | {"timestep": torch.full((1, T), 500.0), "r_timestep": torch.full((1, T), 250.0)}
        ),
        grids=((T, H, W),),
    ),
    "HeliosTransformer3DModel": Tiny(
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
        | {
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        helios,
        grids=((T, H, W),),
        before=None,
    ),
    "CosmosTransformer3DModel": Tiny(
        COSMOS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "concat_padding_mask": False,  # True takes torchvision
            "extra_pos_embed_type": "learnable",
        },
        lambda r: video(
            r,
            attention_mask=torch.ones(1, TEXT),
            fps=30,
        ),
        grids=((T, H, W),),
    ),
    "CosmosControlNetModel": Tiny(
        COSMOS
        | {
            "n_controlnet_blocks": 2,
            "in_channels": 6,
            "latent_channels": 6,
            "model_channels": 24,
            "extra_pos_embed_type": None,
            "img_context_dim_in": 8,
            "img_context_dim_out": 8,
            "use_crossattn_projection": False,
        },
        cosmos_control,
        needs="torchvision",
        moved="controls_latents",
        grids=((T, H, W),),
    ),
    "AllegroTransformer3DModel": Tiny(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "caption_channels": 8,
        },
        lambda r: video(r, text=8, batch=2),
        grids=((T, H, W),),
    ),
    "LTXVideoTransformer3DModel": Tiny(LTX, ltx, grids=((T, H, W),)),
    "LTX2VideoTransformer3DModel": Tiny(
        LTX
        | {
            "patch_size": 1,
            "patch_size_t": 1,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "rope_double_precision": False,
        },
        ltx2,
        grids=((T, H, W),),
    ),
    "HunyuanVideoTransformer3DModel": Tiny(HUNYUAN, hunyuan, grids=((T, H, W),), before=(0,)),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
        },
        hunyuan15,
        grids=((T, H, W),),
        before=(0,),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        framepack,
        grids=((T, H, W),),
        before=FRAMES_BEFORE,
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda r: video(r, grid=(T, H, W)),
        grids=((T, H, W),),
        before=(0,),
    ),
    "MochiTransformer3DModel": Tiny(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
        },
        lambda r: video(
            r,
            batch=2,
            encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool(),
        ),
        grids=((T, H, W),),
        before=(0,),
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 2,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        lambda r: video(r, batch=2),
        grids=((T, H, W),),
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        video,
        grids=((T, H, W),),
        before=(0,),
    ),
    "CogVideoXTransformer3DModel": Tiny(COGVIDEO, frames_first, grids=((T, H, W),)),
    "ConsisIDTransformer3DModel": Tiny(
        COGVIDEO
        | {
            "num_layers": 1,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        consisid,
        grids=((T, H, W),),
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,  # rounds to bfloat16 on the way
            "axes_dims": (4, 6, 6),
        },
        kandinsky5,
        grids=((T, H, W),),
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,  # rounds to bfloat16 on the way
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        kandinsky6,
        grids=((T, H, W),),
    ),
    "LatteTransformer3DModel": Tiny(
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 4,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": T,
        },
        lambda r: video(r, text=8, batch=2, grid=(T, 8, 8)),
        grids=((4, 4),),
    ),
}
