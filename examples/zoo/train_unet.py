"""Train the zoo's text encoder and UNet together on the VAE's latents: the softmax teacher.

    python examples/zoo/train_unet.py --vae runs/vae/vae --output runs/unet --steps 9900

A run that was stopped goes on from its last checkpoint. The folder `pipeline` of the output is a
stock StableDiffusionPipeline.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import data
import loop
import text
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

SIZE = 128
PROMPTS = [
    "a red heart",
    "pizza",
    "cat face",
    "a red apple",
    "rocket",
    "grinning face with big eyes",
    "a purple apple",
    "a cat with a hat",
]


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=[64, 128, 160],
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: the usual schedule cannot reach a pure white ground."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


def load_tokenizer(folder: Path, init: Path | None, items: list[data.Emoji]) -> CLIPTokenizer:
    """The tokenizer of the run, or of `init`; built once, as ties fall differently every time."""
    if not folder.exists() and init:
        return CLIPTokenizer.from_pretrained(init / "tokenizer")
    if not folder.exists():
        tokenizer = text.build_tokenizer([c for item in items for c in item.captions])
        tmp = folder.with_suffix(".tmp")
        tokenizer.save_pretrained(tmp)
        tmp.rename(folder)
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    batches = [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pixels.split(64)]
    return torch.cat(batches) * vae.config.scaling_factor


def preview(pipe: StableDiffusionPipeline, file: Path) -> None:
    """One row of pictures for PROMPTS, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS,
        height=SIZE,
        width=SIZE,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    loop.sheet(images, len(images), SIZE).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    loop.add_arguments(parser, output="runs/unet", steps=9900, batch_size=32, learning_rate=1.3e-3)
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument(
        "--init", type=Path, help="pipeline whose text encoder and UNet to go on from"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    items = data.pictures(args.data)
    vae = AutoencoderKL.from_pretrained(args.vae)
    latents = encode(vae, data.load_pixels(items, SIZE))
    tokenizer = load_tokenizer(args.output / "tokenizer", args.init, items)
    text_encoder, unet = text.build_text_encoder(tokenizer), build_unet()
    if args.init:
        text_encoder = text_encoder.from_pretrained(args.init / "text_encoder", dtype=torch.float32)
        unet = unet.from_pretrained(args.init / "unet", dtype=torch.float32)
    text_encoder.train()
    unet.train().to(memory_format=torch.channels_last)
    # Heads of 16 channels: the CPU's fused attention takes 35 % of a step in its backward pass.
    unet.set_attn_processor(AttnProcessor())
    scheduler = build_scheduler()
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    params = [*text_encoder.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(
        params, args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
    )

    def losses(index: list[int], _: int) -> dict[str, torch.Tensor]:
        captions = [text.vary(items[i].captions, rng) for i in index]
        tokens = tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=text.LENGTH,
            return_tensors="pt",
        ).input_ids
        clean = latents[index].to(memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(index),))
        with torch.autocast("cpu", torch.bfloat16):
            states = text_encoder(tokens).last_hidden_state
            v = unet(scheduler.add_noise(clean, noise, t), t, states).sample
        return {"loss": F.mse_loss(v.float(), scheduler.get_velocity(clean, noise, t))}

    loop.run(args, params, [optimizer], len(items), losses, partial(preview, pipe), rng=rng)
    pipe.to(torch.float16).save_pretrained(args.output / "pipeline")


if __name__ == "__main__":
    main()
