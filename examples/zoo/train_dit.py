"""Train the zoo's class-conditional DiT on the VAE's latents: LiT's softmax teacher.

    python examples/zoo/train_dit.py --output runs/dit --steps 8000

Loss and network are DiT's (Peebles & Xie 2023) at the size of the zoo: noise and learned variance,
adaLN-zero, labels dropped for classifier-free guidance. A run that was stopped goes on from its
last checkpoint. The folder `pipeline` of the output is a DiTPipeline that diffusers reads as well.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data
import loop
import torch
from classes import CLASSES, class_of
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from linfusion.pipelines import DiTPipeline
from linfusion.training.objectives.hybrid import hybrid_losses

SIZE = 128
DROPPED = 0.1  # of the labels
KD, KD_VARIANCE = 0.5, 0.05  # λ₁ and λ₂ of LiT's class-conditional models
ZOO_VAE = Path(__file__).parents[2] / "linfusion" / "zoo" / "emoji" / "vae"


def build_dit() -> DiTTransformer2DModel:
    """Initialised as DiT is: each block is the identity, the output 0."""
    dit = DiTTransformer2DModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=8,
        num_attention_heads=6,
        attention_head_dim=32,
        num_embeds_ada_norm=len(CLASSES),
        norm_eps=1e-6,
    )
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(dit.pos_embed.proj.weight.data.flatten(1))
    for block in dit.transformer_blocks:
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)
    return dit


def tie_embedders(dit: DiTTransformer2DModel) -> None:
    """One embedding of time and class for all blocks, as in DiT; diffusers has a copy in each."""
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb = dit.transformer_blocks[0].norm1.emb


def untied(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A copy with one embedder a block, as safetensors have no shared tensors."""
    dit = copy.deepcopy(dit)
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(dit.transformer_blocks[0].norm1.emb)
    return dit


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range",
        clip_sample=False,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    batches = [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pixels.split(64)]
    return torch.cat(batches) * vae.config.scaling_factor


def optimizers(dit: DiTTransformer2DModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    named = dict(dit.named_parameters())
    matrices = [p for n, p in named.items() if "transformer_blocks" in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        ),
    ]


def objective(
    dit: Callable[..., Any],
    latents: torch.Tensor,
    classes: torch.Tensor,
    scheduler: DDPMScheduler,
    teacher: Callable[..., Any] | None = None,
) -> Callable[[list[int], int], dict[str, torch.Tensor]]:
    """Losses of a batch of examples by their numbers; with a teacher, LiT's of distillation too."""

    def losses(index: list[int], _: int) -> dict[str, torch.Tensor]:
        clean = latents[index]
        noise = torch.randn_like(clean)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(index),))
        dropped = torch.rand(len(index)) < DROPPED
        labels = torch.where(dropped, len(CLASSES), classes[index])
        noisy = scheduler.add_noise(clean, noise, t)
        taught = None
        with torch.autocast("cpu", torch.bfloat16):
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(noisy, t, labels).sample
            out = dit(noisy, t, labels).sample
        weights = (0.0, 0.0) if teacher is None else (KD, KD_VARIANCE)
        found = hybrid_losses(
            out,
            taught,
            noise,
            noisy,
            clean,
            t,
            scheduler,
            kd_noise=weights[0],
            kd_variance=weights[1],
        )
        return {"loss": found.total, "simple": found.simple, "bound": found.bound}

    return losses


def preview(pipe: DiTPipeline, file: Path) -> None:
    """One picture of each class in the upper row, a second one below, from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [*CLASSES, *CLASSES],
        num_inference_steps=50,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    loop.sheet(images, len(CLASSES), SIZE).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    loop.add_arguments(parser, output="runs/dit", steps=8000, batch_size=32, learning_rate=2e-3)
    parser.add_argument("--vae", type=Path, default=ZOO_VAE)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    items = data.pictures(args.data)
    classes = torch.tensor([CLASSES.index(class_of(item)) for item in items])
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    latents = encode(vae, data.load_pixels(items, SIZE))
    dit, scheduler = build_dit().eval(), build_scheduler()  # eval: we drop the labels, once
    tie_embedders(dit)
    for block in dit.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())  # 64 tokens: faster than fused on the CPU
    names = dict(enumerate(CLASSES))
    pipe = DiTPipeline(dit, vae, scheduler, id2label=names)

    params = list(dit.parameters())
    print(f"{sum(p.numel() for p in params):,} parameters, {len(items)} pictures", flush=True)
    both = optimizers(dit, args.learning_rate)

    losses = objective(torch.compile(dit, dynamic=False), latents, classes, scheduler)
    loop.run(args, params, both, len(items), losses, partial(preview, pipe), warmup=300)
    pipe = DiTPipeline(untied(dit), vae, scheduler, id2label=names)
    pipe.to(torch.float16).save_pretrained(args.output / "pipeline")


if __name__ == "__main__":
    main()
