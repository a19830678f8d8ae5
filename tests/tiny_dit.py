"""DiT and PixArt at tiny size: real diffusers classes with seeded random weights."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_eps": 1e-6,
}
PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "cross_attention_dim": 24,
    "caption_channels": 10,
}


def tiny_dit(seed: int = 0, **changes: object) -> DiTTransformer2DModel:
    """3 blocks of width 24, 4 heads, 5 classes, learned variance."""
    torch.manual_seed(seed)
    return _lively(DiTTransformer2DModel(**{**DIT, **changes}).eval())


def tiny_pixart(seed: int = 0, **changes: object) -> PixArtTransformer2DModel:
    """2 blocks of width 24, 4 heads, captions of 10 channels."""
    torch.manual_seed(seed)
    return _lively(PixArtTransformer2DModel(**{**PIXART, **changes}).eval())


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Queries and keys large enough that attention is far from an average."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.normal_(std=0.5)
    return model


def dit_inputs(size: int = 8, batch: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(batch, 4, size, size, generator=g),
        "timestep": torch.tensor([3, 700])[:batch],
        "class_labels": torch.tensor([1, 4])[:batch],
    }


def pixart_inputs(height: int = 8, width: int = 8, batch: int = 2) -> dict[str, object]:
    g = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=g),
        "encoder_hidden_states": torch.randn(batch, 3, 10, generator=g),
        "timestep": torch.tensor([3, 700])[:batch],
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def forward(model: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample
