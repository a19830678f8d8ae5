"""Wan, SANA-Video and CogVideoX at tiny size: real diffusers classes with seeded random weights."""

from __future__ import annotations

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    SanaVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

TEXT_WIDTH = 32
TEXT = 5

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": TEXT_WIDTH,
    "sample_size": 8,
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}


def tiny_wan(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    """Three blocks, 2 heads of 12, 2 by 2 latents of a frame to a token."""
    torch.manual_seed(seed)
    return _lively(WanTransformer3DModel(**{**WAN, **changes}).eval())


def tiny_sana(seed: int = 0, **changes: object) -> SanaVideoTransformer3DModel:
    """Three blocks of linear attention, as Wan otherwise."""
    torch.manual_seed(seed)
    return _lively(SanaVideoTransformer3DModel(**{**SANA, **changes}).eval())


def tiny_cogvideox(seed: int = 0, **changes: object) -> CogVideoXTransformer3DModel:
    """Three joint blocks, 2 heads of 16."""
    torch.manual_seed(seed)
    return _lively(CogVideoXTransformer3DModel(**{**COGVIDEOX, **changes}).eval())


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Queries and keys large enough that attention is far from an average, and gates open."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.normal_(2.0, 0.3)
            elif name.endswith(("to_q.weight", "to_k.weight")) or "norm1.linear" in name:
                parameter.normal_(std=0.3)
    return model


def inputs(
    model: torch.nn.Module,
    grid: tuple[int, int, int] = (5, 4, 3),
    batch: int = 2,
    seed: int = 0,
    **more: object,
) -> dict[str, object]:
    """Arguments of one forward at a grid of (frames, height, width) tokens."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    size = (frames, 4) if isinstance(model, CogVideoXTransformer3DModel) else (4, frames)
    found = {
        "hidden_states": torch.randn(batch, *size, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, TEXT_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }
    if isinstance(model, CogVideoXTransformer3DModel):
        config = model.config
        if config.patch_size_t:
            found["hidden_states"] = found["hidden_states"].repeat(1, config.patch_size_t, 1, 1, 1)
        if config.use_rotary_positional_embeddings:
            found["image_rotary_emb"] = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                crops_coords=((0, 0), (height, width)),
                grid_size=(height, width),
                temporal_size=frames,
            )
    return {**found, **more}


def forward(model: torch.nn.Module, given: dict[str, object]) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return model(**given)[0]
