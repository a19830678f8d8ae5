"""Train the zoo's VAE: a stock AutoencoderKL that downsamples by 8, first on crops.

    python examples/zoo/train_vae.py --output runs/vae --steps 1250

A run that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import data
import loop
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

SIZE = 128
NOISE = 0.1  # on the latents while training, in their standard deviations: keeps them smooth


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[24, 48, 96, 128],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def batch(pictures: list[torch.Tensor], n: int, size: int, g: torch.Generator) -> torch.Tensor:
    """Squares of `size` px: two thirds of the 128 px pictures, a third of those of 256 px."""
    out = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for i, u in enumerate(torch.rand(n, 5, generator=g).tolist()):
        source = pictures[u[0] < 1 / 3]
        room = source.shape[-1] - size + 1
        y, x = int(u[1] * room), int(u[2] * room)
        square = source[int(u[3] * len(source)), :, y : y + size, x : x + size]
        out[i] = square.flip(-1) if u[4] < 0.5 else square
    return out.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def whiten(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Fold the latents' mean and deviation into the 1×1 convolutions: scaling_factor is 1."""
    with torch.no_grad():
        means = [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pixels.split(64)]
        latents = torch.cat(means)
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:4] /= std[:, None, None, None]
        before.bias[:4] = (before.bias[:4] - mean) / std
        before.weight[4:] = 0
        before.bias[4:] = 2 * math.log(NOISE)
        after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
        after.weight *= std[None, :, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the pictures; fetched when not given")
    parser.add_argument("--output", type=Path, default=Path("runs/vae"))
    parser.add_argument("--crop-steps", type=int, default=750, help="first, on 64 px crops")
    parser.add_argument("--steps", type=int, default=1250, help="in all; the rest on 128 px")
    parser.add_argument("--batch-size", type=int, default=8, help="at 128 px; 4 times it on crops")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    items = data.pictures(args.data)
    whole = data.load_pixels(items, SIZE)
    pictures = [whole, data.load_pixels(items, 2 * SIZE)]

    vae = build()
    vae.to(memory_format=torch.channels_last)
    params = list(vae.parameters())
    optimizer = torch.optim.AdamW(params, args.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    ema = [p.detach().clone() for p in params]
    first = 0
    checkpoint = args.output / "checkpoint.pt"
    if state := loop.load(checkpoint):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]
        g.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
    clock = loop.Clock(25)
    for step in range(first + 1, args.steps + 1):
        rate = loop.learning_rate(step, args.steps, args.learning_rate, 50)
        optimizer.param_groups[0]["lr"] = rate
        if step <= args.crop_steps:
            x = batch(pictures, 4 * args.batch_size, SIZE // 2, g)
        else:
            x = batch(pictures, args.batch_size, SIZE, g)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.quant_conv(vae.encoder(x))[:, :4]
            z = mean + NOISE * mean.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(mean)
            y = vae.decoder(vae.post_quant_conv(z)).float()
        l1 = F.l1_loss(y, x)
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        sharp = 0.0 if step < 300 else 0.5  # from the start, it would hold the pictures flat
        (l1 + F.mse_loss(y, x) + sharp * edge).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loop.ema_update(ema, params, min(0.995, (1 + step) / (10 + step)))
        clock.log(
            step,
            l1=l1.detach(),
            edge=edge.detach(),
            psnr=-10 * (F.mse_loss(y, x).detach() / 4).log10(),
        )
        if step % args.checkpoint_every == 0 or step == args.steps:
            loop.save(
                checkpoint,
                model=vae.state_dict(),
                optimizer=optimizer.state_dict(),
                ema=ema,
                step=step,
                rng=g.get_state(),
                torch_rng=torch.get_rng_state(),
            )

    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    whiten(vae, whole)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.output / "vae")
    with torch.no_grad():
        x = whole[::13].float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    print(f"PSNR on {len(x)} pictures: {10 * torch.log10(4 / F.mse_loss(y, x)):.2f} dB")


if __name__ == "__main__":
    main()
