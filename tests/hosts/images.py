"""Image transformers of diffusers at tiny size."""

from __future__ import annotations

import torch

from tests.hosts.tiny import TEXT, Tiny, ids, ones

H, W = 4, 6
N = H * W


def flux_like(r, channels=4, text=16, axes=3, batch=1, **more):
    return {
        "hidden_states": r(batch, N, channels),
        "encoder_hidden_states": r(batch, TEXT, text),
        "img_ids": ids(H, W, axes),
        "txt_ids": torch.zeros(TEXT, axes),
        "timestep": torch.full((batch,), 0.5),
        **more,
    }


def latents(r, channels=4, text=16, batch=2, **more):
    return {
        "hidden_states": r(batch, channels, 2 * H, 2 * W),
        "encoder_hidden_states": r(batch, TEXT, text),
        "timestep": torch.full((batch,), 500.0),
        **more,
    }


def shapes(r, batch=1, **more):
    return {
        "hidden_states": r(batch, N, 16),
        "encoder_hidden_states": r(batch, TEXT, 16),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, H, W)]] * batch,
        **more,
    }


def cog_view(r):
    size = torch.tensor([[64, 64]] * 2)
    return latents(r, 4, 8, original_size=size, target_size=size, crop_coords=0 * size)


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
POOLED = FLUX | {"pooled_projection_dim": 16}
QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
}
HUNYUAN_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "cross_attention_dim_t5": 8,
    "pooled_projection_dim": 4,
    "hidden_size": 16,
    "text_len": 4,
    "text_len_t5": 4,
}
GRID = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4}


def hunyuan_dit(r, **more):
    return {
        "hidden_states": r(2, 4, 8, 8),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": r(2, 4, 8),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": r(2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.tensor([[64, 64, 16, 16, 0, 0]] * 2).float(),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
        **more,
    }


def bria_fibo(r):
    more = {"text_encoder_layers": [r(1, TEXT, 8)] * 2}
    return flux_like(r, **more)


def krea(r):
    positions = torch.cat([torch.zeros(TEXT, 3), ids(H, W)])
    mask = ones(1, TEXT)
    mask[:, -1] = False
    return {
        "hidden_states": r(1, N, 4),
        "encoder_hidden_states": r(1, TEXT, 2, 8),
        "timestep": torch.tensor([0.5]),
        "position_ids": positions,
        "encoder_attention_mask": mask,
    }


def hi_dream(r):
    return {
        "hidden_states": r(2, 4, 8, 12),
        "encoder_hidden_states_t5": r(2, TEXT, 8),
        "encoder_hidden_states_llama3": r(2, 2, TEXT, 4),
        "pooled_embeds": r(2, 8),
        "timesteps": torch.full((2,), 500),
    }


def z_image(r, **more):
    return {
        "x": [r(16, 1, 2 * H, 2 * W), r(16, 1, 2 * H, 2 * W)],
        "cap_feats": [r(TEXT, 16), r(TEXT, 16)],
        "t": torch.tensor([0.3, 0.3]),
        **more,
    }


def hunyuan_image(r):
    mask = torch.ones(1, TEXT)
    mask[:, -1] = 0
    return {
        "hidden_states": r(1, 4, H, W),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": r(1, TEXT, 16),
        "encoder_attention_mask": mask,
    }


def lumina2(r):
    mask = ones(2, TEXT)
    mask[1, 3:] = False  # the second sample has three tokens of text
    return latents(r, 4, 16, encoder_attention_mask=mask) | {"timestep": torch.tensor([0.3, 0.3])}


IMAGES = {
    "FluxTransformer2DModel": Tiny(POOLED, lambda r: flux_like(r, pooled_projections=r(1, 16))),
    "FluxControlNetModel": Tiny(
        POOLED,
        lambda r: flux_like(r, pooled_projections=r(1, 16), controlnet_cond=r(1, N, 4)),
    ),
    "Flux2Transformer2DModel": Tiny(
        FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        lambda r: flux_like(r, axes=4, guidance=torch.tensor([1.0])),
    ),
    "Flux3Transformer2DModel": Tiny(
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "mlp_ratio": 2.0,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda r: flux_like(
            r,
            axes=4,
            image_cond_hidden_states=r(1, 6, 4),
            image_cond_ids=ids(2, 3, 4, picture=10),
        ),
        grids=((4, 6), (2, 3)),
    ),
    "ChromaTransformer2DModel": Tiny(
        FLUX
        | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        flux_like,
    ),
    "BriaTransformer2DModel": Tiny(
        POOLED | {"pooled_projection_dim": None, "axes_dims_rope": (0, 8, 8)}, flux_like
    ),
    "BriaFiboTransformer2DModel": Tiny(
        POOLED
        | {"pooled_projection_dim": None, "axes_dims_rope": (0, 8, 8), "text_encoder_dim": 8},
        bria_fibo,
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 4, 8),
            "axes_lens": (32, 32, 32),
        },
        lambda r: {
            "hidden_states": r(1, 4, 2 * H, 2 * W),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": r(1, 2, TEXT, 8),
            "context_latents": [r(1, 4, 4, 4)],
        },
        grids=((4, 6), (2, 2)),
        before=None,
    ),
    "LongCatImageTransformer2DModel": Tiny(
        POOLED, lambda r: flux_like(r, guidance=torch.tensor([3.5]))
    ),
    "OvisImageTransformer2DModel": Tiny(FLUX | {"out_channels": 4}, flux_like),
    "QwenImageTransformer2DModel": Tiny(QWEN, shapes),
    "QwenImageControlNetModel": Tiny(QWEN, lambda r: shapes(r, controlnet_cond=r(1, N, 16))),
    "QwenImage21Transformer2DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "mlp_ratio": 2,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, N, 4),
            "encoder_hidden_states": r(1, TEXT, 16),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, H, W)]],
            "img_mask": torch.cat([torch.zeros(1, TEXT), torch.ones(1, N // 4)], 1).bool(),
        },
        least=TEXT + N,
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        QWEN | {"moe_enabled": False, "capacity_factors": [8.0, 8.0]}, shapes, before=(0,)
    ),
    "ZImageTransformer2DModel": Tiny(
        {
            "in_channels": 16,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        z_image,
        moved="x",
        before=(0,),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 16,
        },
        lumina2,
        before=(5, 3),
    ),
    "LuminaNextDiT2DModel": Tiny(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 16,
        },
        lambda r: {
            "hidden_states": r(2, 4, 8, 8),
            "encoder_hidden_states": r(2, TEXT, 16),
            "timestep": torch.tensor([0.3, 0.3]),
            "encoder_mask": ones(2, TEXT),
            "image_rotary_emb": torch.polar(torch.ones(384, 384, 4), r(384, 384, 4)),
            "cross_attention_kwargs": {},
        },
        grids=((4, 4),),
    ),
    "SD3Transformer2DModel": Tiny(
        SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda r: latents(r, pooled_projections=r(2, 16)),
        before=(0,),
    ),
    "SD3ControlNetModel": Tiny(
        SD3,
        lambda r: latents(r, pooled_projections=r(2, 16), controlnet_cond=r(2, 4, 2 * H, 2 * W)),
        before=(0,),
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 256,
        },
        latents,
        loud=("to_v", "to_out", "linear_1", "norm1.linear"),
        before=None,  # it has tokens of its own before those of the text
    ),
    "PRXTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        latents,
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        hi_dream,
        before=(0,),
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        cog_view,
    ),
    "CogView4Transformer2DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (64, 64),
        },
        cog_view,
    ),
    "GlmImageTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        lambda r: latents(
            r,
            batch=1,
            prior_token_id=torch.zeros(1, dtype=torch.long),
            prior_token_drop=~ones(1),
            target_size=torch.tensor([[8.0, 12.0]]),
            crop_coords=torch.zeros(1, 2),
        ),
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(2, 4, H, W),
            "timestep": torch.ones(2),
            "text_bth": r(2, TEXT, 16),
            "text_lens": torch.tensor([TEXT, 3]),
        },
        before=(0,),
    ),
    "Krea2Transformer2DModel": Tiny(
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        krea,
    ),
    "HunyuanDiT2DModel": Tiny(HUNYUAN_DIT | {"num_layers": 2}, hunyuan_dit, grids=((4, 4),)),
    "HunyuanDiT2DControlNetModel": Tiny(
        HUNYUAN_DIT | {"transformer_num_layers": 4},
        lambda r: hunyuan_dit(r, controlnet_cond=r(2, 4, 8, 8)),
        grids=((4, 4),),
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        hunyuan_image,
        before=(0,),
    ),
    "DiTTransformer2DModel": Tiny(
        GRID | {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
        lambda r: {
            "hidden_states": r(2, 4, 8, 8),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([1, 2]),
        },
        grids=((4, 4),),
    ),
    "PixArtTransformer2DModel": Tiny(
        GRID
        | {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        lambda r: latents(r, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "UVit2DModel": Tiny(
        {
            "hidden_size": 16,
            "cond_embed_dim": 8,
            "micro_cond_encode_dim": 2,
            "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 8,
            "vocab_size": 32,
            "codebook_size": 24,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 8,
        },
        lambda r: {
            "input_ids": torch.arange(24).reshape(1, 4, 6),
            "encoder_hidden_states": r(1, TEXT, 8),
            "pooled_text_emb": r(1, 8),
            "micro_conds": torch.ones(1, 5),
        },
    ),
}
