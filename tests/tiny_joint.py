"""FLUX and Stable Diffusion 3 at tiny size: real diffusers classes with seeded random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from tests.tiny import TEXT_WIDTH, _text_config, tiny_text_encoder, tiny_tokenizer

# Two latent pixels to a token, two pixels to a latent: 32 px are 8 by 8 tokens.
PIXELS = 4
TEXT = 6

FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * TEXT_WIDTH,
    "pos_embed_max_size": 16,
}
# As Stable Diffusion 3.5 medium: queries and keys are normed, some blocks attend twice.
SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}


def tiny_flux(seed: int = 0, **changes: object) -> FluxTransformer2DModel:
    """One double and two single blocks, 2 heads of 16."""
    torch.manual_seed(seed)
    return _lively(FluxTransformer2DModel(**{**FLUX, **changes}).eval())


def tiny_flux_controlnet(seed: int = 1) -> FluxControlNetModel:
    """One double and one single block, with residuals that are not zero."""
    torch.manual_seed(seed)
    config = {k: v for k, v in FLUX.items() if k != "num_single_layers"}
    return _lively(FluxControlNetModel(**config, num_single_layers=1).eval())


def tiny_sd3(seed: int = 0, **changes: object) -> SD3Transformer2DModel:
    """Two joint blocks, the last of which returns no text."""
    torch.manual_seed(seed)
    return _lively(SD3Transformer2DModel(**{**SD3, **changes}).eval())


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Queries and keys large enough that attention is far from an average."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.fill_(2.0)
            elif ".controlnet" in f".{name}" or name.endswith(("to_q.weight", "to_k.weight")):
                parameter.normal_(std=0.3)
    return model


def flux_inputs(
    height: int = 8, width: int = 8, text: int = TEXT, batch: int = 1, seed: int = 0, **more: object
) -> dict[str, object]:
    """Arguments of one forward at a grid of height by width tokens."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()
    return {
        "hidden_states": torch.randn(batch, height * width, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, TEXT_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
        **more,
    }


def sd3_inputs(
    height: int = 8, width: int = 8, text: int = TEXT, batch: int = 1, seed: int = 0, **more: object
) -> dict[str, object]:
    """Arguments of one forward at a grid of height by width tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, 2 * TEXT_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        **more,
    }


def forward(model: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return model(**inputs).sample


def tiny_flow_vae(seed: int = 0) -> AutoencoderKL:
    """2 pixels to one latent, 4 channels, with the shift that flow models have."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_t5(seed: int = 0) -> T5EncoderModel:
    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    ).eval()


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """One token a letter, built in memory."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    )


def tiny_flux_pipeline(cls: type = FluxPipeline, **more: object) -> FluxPipeline:
    """A FLUX pipeline; `more` are further or other components."""
    pipe = cls(
        **{
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": tiny_flow_vae(),
            "text_encoder": tiny_text_encoder(),
            "tokenizer": tiny_tokenizer(),
            "text_encoder_2": tiny_t5(),
            "tokenizer_2": tiny_t5_tokenizer(),
            "transformer": tiny_flux(),
            **more,
        }
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_pipeline(cls: type = StableDiffusion3Pipeline, **more: object) -> object:
    def clip(seed: int) -> CLIPTextModelWithProjection:
        torch.manual_seed(seed)
        return CLIPTextModelWithProjection(_text_config()).eval()

    pipe = cls(
        **{
            "transformer": tiny_sd3(joint_attention_dim=2 * TEXT_WIDTH),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": tiny_flow_vae(),
            "text_encoder": clip(0),
            "tokenizer": tiny_tokenizer(),
            "text_encoder_2": clip(1),
            "tokenizer_2": tiny_tokenizer(),
            "text_encoder_3": None,
            "tokenizer_3": None,
            **more,
        }
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
