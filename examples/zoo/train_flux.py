"""Train the zoo's FLUX-shaped teacher: a flow-matching transformer with its own T5 and CLIP.

    python examples/zoo/train_flux.py --vae linfusion/zoo/emoji/vae --output runs/flux --steps 6000

A run that was stopped goes on from its last checkpoint. The folder `pipeline` of the output is a
stock FluxPipeline.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import data
import loop
import text
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from train_unet import PROMPTS, encode
from transformers import T5EncoderModel

SIZE = 128
# The transformer sees padding: it meets several lengths, so that it does not depend on one.
LENGTHS = (16, 16, 16, 24)


def build_transformer() -> FluxTransformer2DModel:
    """Stock initialisation, but for modulations and output of zero (DiT's adaLN-Zero)."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=7,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    for name, parameter in model.named_parameters():
        modulation = name.endswith(("norm.linear.weight", "norm.linear.bias")) or any(
            f".{norm}.linear." in name for norm in ("norm1", "norm1_context")
        )
        if modulation or name.startswith(("proj_out.", "norm_out.")):
            torch.nn.init.zeros_(parameter)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """A shift that grows with the side of the picture: 1 at 64 tokens (128 px), 4 at 1,024."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.0,
        max_shift=1.386,
        base_image_seq_len=64,
        max_image_seq_len=1024,
    )


def build_pipeline(vae: AutoencoderKL, captions: list[str]) -> FluxPipeline:
    tokenizer, tokenizer_2 = text.build_tokenizer(captions), text.build_t5_tokenizer(captions)
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=text.build_text_encoder(tokenizer, width=64, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=text.build_t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=build_transformer(),
    )


def standardised(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents of mean 0 and deviation 1; the VAE is told how, as FLUX's own pipeline reads it."""
    mean, deviation = latents.mean().item(), latents.std().item()
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)
    return (latents - mean) / deviation


def velocity(
    pipe: FluxPipeline,
    transformer: Callable[..., tuple[torch.Tensor]],
    latents: torch.Tensor,
    sigma: torch.Tensor,
    captions: list[str],
    length: int,
) -> torch.Tensor:
    """Noise − picture [B, C, H, W] at x_σ = `latents`, as `transformer` (of `pipe`) guesses it."""
    b, c, h, w = latents.shape
    states = _states(pipe.tokenizer_2, pipe.text_encoder_2, captions, length).last_hidden_state
    pooled = _states(pipe.tokenizer, pipe.text_encoder, captions, text.LENGTH).pooler_output
    guess = transformer(
        hidden_states=pipe._pack_latents(latents, b, c, h, w),
        timestep=sigma,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(length, 3),
        img_ids=pipe._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(guess, h * 8, w * 8, 8)


def _states(tokenizer, encoder: T5EncoderModel, captions: list[str], length: int):
    tokens = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return encoder(tokens.input_ids)


@torch.no_grad()
def preview(pipe: FluxPipeline, size: int, file: Path) -> None:
    """One row of pictures for PROMPTS, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS,
        negative_prompt=[""] * len(PROMPTS),
        true_cfg_scale=3.0,
        height=size,
        width=size,
        num_inference_steps=16,
        max_sequence_length=text.T5_LENGTH,
        generator=torch.Generator().manual_seed(0),
    ).images
    loop.sheet(images, len(images), size).save(file)


def optimizers(
    pipe: FluxPipeline, learning_rate: float
) -> tuple[list[torch.nn.Parameter], list[torch.optim.Optimizer]]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    named = [(n, p) for part in parts for n, p in part.named_parameters()]
    matrices = [
        p
        for n, p in pipe.transformer.named_parameters()
        if "transformer_blocks" in n and p.ndim == 2
    ]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [p for _, p in named], [
        torch.optim.Muon(
            matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    loop.add_arguments(
        parser,
        output="runs/flux",
        steps=6000,
        batch_size=48,
        learning_rate=2e-3,
        preview_every=500,
    )
    parser.add_argument("--vae", type=Path, default=Path("linfusion/zoo/emoji/vae"))
    parser.add_argument("--init", type=Path, help="pipeline whose weights to go on from")
    parser.add_argument("--size", type=int, default=SIZE, help="of the pictures, in pixels")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    items = data.pictures(args.data)
    start = args.output / "start"  # of tokenizers above all: ties fall differently every time
    if not start.exists():
        if args.init:
            pipe = FluxPipeline.from_pretrained(args.init, dtype=torch.float32)
        else:
            vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32)
            standardised(vae, encode(vae, data.load_pixels(items, args.size)))
            pipe = build_pipeline(vae, [c for item in items for c in item.captions])
        pipe.save_pretrained(args.output / "start.tmp")
        (args.output / "start.tmp").rename(start)
    pipe = FluxPipeline.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(args.seed)  # building it took some draws, or did not
    config = pipe.vae.config
    raw = encode(pipe.vae, data.load_pixels(items, args.size)) / config.scaling_factor
    latents = (raw - config.shift_factor) * config.scaling_factor
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.train()

    # 80 tokens: the CPU's fused attention takes a quarter of a step in its backward pass.
    pipe.transformer.set_attention_backend("_native_math")
    transformer = torch.compile(pipe.transformer, dynamic=False)
    params, both = optimizers(pipe, args.learning_rate)

    def losses(index: list[int], _: int) -> dict[str, torch.Tensor]:
        captions = [text.vary(items[i].captions, rng) for i in index]
        clean = latents[index]
        noise = torch.randn_like(clean)
        sigma = torch.randn(len(index)).sigmoid()  # logit-normal, as Stable Diffusion 3
        s = sigma[:, None, None, None]
        noisy = (1 - s) * clean + s * noise
        with torch.autocast("cpu", torch.bfloat16):
            v = velocity(pipe, transformer, noisy, sigma, captions, rng.choice(LENGTHS))
        return {"loss": F.mse_loss(v.float(), noise - clean)}

    draw = partial(preview, pipe, args.size)
    loop.run(args, params, both, len(items), losses, draw, rng=rng)
    pipe.to(torch.float16).save_pretrained(args.output / "pipeline")


if __name__ == "__main__":
    main()
