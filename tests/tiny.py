"""Real diffusers classes at tiny size, with seeded random weights: what the tests run on.

`tiny_*` builds one part or one whole pipeline. Every call gives fresh objects with the same weights
for the same seed, so a test may change what it gets.
"""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT_WIDTH = 32
XL_TEXT_WIDTH = 2 * TEXT_WIDTH


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer built in memory: one token a character."""
    letters = string.ascii_lowercase + string.digits + ",.-"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        projection_dim=TEXT_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    return CLIPTextModel(_text_config()).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """8 pixels to one latent, 4 channels, as in Stable Diffusion."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
    )
    return vae.eval()


UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL = {
    "cross_attention_dim": XL_TEXT_WIDTH,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
}


def tiny_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """A UNet of two levels with 7 self-attention layers; `changes` go to its constructor."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**UNET, **changes}).eval()


def tiny_xl_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    return tiny_unet(seed, **{**XL, **changes})


def tiny_motion_unet(seed: int = 0) -> UNetMotionModel:
    torch.manual_seed(seed)
    adapter = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
    )
    return UNetMotionModel.from_unet2d(tiny_unet(seed), adapter).eval()


def tiny_controlnet(unet: UNet2DConditionModel | None = None) -> ControlNetModel:
    """A ControlNet of the UNet's shape whose residuals are not zero."""
    net = ControlNetModel.from_unet(
        tiny_unet() if unet is None else unet, conditioning_channels=3
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.normal_(std=0.05)
    return net


def tiny_image_encoder(seed: int = 0) -> CLIPVisionModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_sd_components(seed: int = 0, **unet_changes: object) -> dict[str, object]:
    """The parts of a Stable Diffusion pipeline, as `pipe.components` names them."""
    return {
        "vae": tiny_vae(seed),
        "text_encoder": tiny_text_encoder(seed),
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_unet(seed, **unet_changes),
        "scheduler": tiny_scheduler(),
        "safety_checker": None,
        "feature_extractor": CLIPImageProcessor(size=32, crop_size=32),
        "image_encoder": tiny_image_encoder(seed),
    }


def tiny_sd_pipeline(
    cls: type = StableDiffusionPipeline, seed: int = 0, **more: object
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of 64 px.

    `cls` may be img2img, ControlNet, ...; `more` are further or other components.
    """
    components = {**tiny_sd_components(seed), **more}
    pipe = cls(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_pipeline(
    cls: type = StableDiffusionXLPipeline, seed: int = 0, **more: object
) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    components = {
        "vae": tiny_vae(seed),
        "text_encoder": tiny_text_encoder(seed),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config()).eval(),
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "unet": tiny_xl_unet(seed),
        "scheduler": tiny_scheduler(),
        **more,
    }
    pipe = cls(**components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_image(seed: int = 0, size: int = 64) -> Image.Image:
    """Smooth random colours, `size` pixels a side."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((size, size), Image.Resampling.BICUBIC)


def run(pipe: object, seed: int = 0, **kwargs: object) -> torch.Tensor:
    """Latents or pixels of a two-step run, reproducible: [B, C, H, W]."""
    arguments = {
        "prompt": "a red apple",
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
        **kwargs,
    }
    return pipe(**arguments).images


def unet_inputs(
    unet: torch.nn.Module, size: int = 8, batch: int = 1, seed: int = 0
) -> dict[str, object]:
    """Keyword arguments for one forward of `tiny_unet`, `tiny_xl_unet` or a UNet of their kind."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    inputs = {
        "sample": torch.randn(batch, config.in_channels, size, size, generator=generator),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(
            batch, 5, config.cross_attention_dim, generator=generator
        ),
    }
    if getattr(config, "addition_embed_type", None) == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, TEXT_WIDTH, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1),
        }
    return inputs


def denoise(unet: torch.nn.Module, **inputs: object) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return unet(**{**unet_inputs(unet), **inputs}).sample
