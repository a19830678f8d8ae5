"""Train the zoo's text-to-video model: a block-causal LinGen with its own CLIP text encoder.

    python examples/zoo/train_video.py --output runs/video --steps 8000

Flow matching on emoji that move and emoji that stand still, in every batch. As in diffusion forcing
(Chen et al. 2024, arXiv:2407.01392) each block of frames has a noise level of its own, so that one
pass trains all of them. Up to a block drawn for each clip they are history, clean or nearly so, as
the committed blocks of a stream are; what is entirely clean has no loss.

A run that was stopped goes on from its last checkpoint. The folder `pipeline` of the output is a
LinGenPipeline.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import clips
import data
import loop
import numpy as np
import text
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from train_unet import encode
from transformers import CLIPTextModel, CLIPTokenizer

from linfusion.models import LinGenTransformer3DModel, split_blocks
from linfusion.pipelines import LinGenPipeline
from linfusion.training.teachers.lingen import noise_levels

ZOO = Path(__file__).parents[2] / "linfusion" / "zoo" / "emoji"
SIZE = 128  # the VAE loses the faces at 64 px: 21 dB, against 26
FPS = 12
LOOP = 36  # frames: most animations are loops of 3 s
BLOCK = 4
SHIFT = 2.0
PROMPTS = ["a red heart", "cat face", "rocket", "grinning face with big eyes", "bee", "a hot drink"]


def build_transformer(size: int, mixer: str) -> LinGenTransformer3DModel:
    """8 by 8 tokens a frame, whatever the size."""
    patch = size // 64
    return LinGenTransformer3DModel(
        in_channels=4,
        patch_size=(1, patch, patch),
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        text_dims=(128,),
        mlp_ratio=3.0,
        pos_embed_size=(3 * BLOCK, 8, 8),
        d_state=32,
        expand=1,
        tesa_window=(16, 4, 4),
        causal_blocks=True,
        block_frames=BLOCK,
        time_positions="block",
        self_attention=mixer,
    )


def load_latents(args: argparse.Namespace, vae: AutoencoderKL, films: list[data.Emoji]) -> dict:
    """Means of the VAE, encoded once: `clips` [n, 36, 4, h, w] and `stills` [m, 4, h, w]."""
    path = args.output / "latents.pt"
    if not path.exists():
        pixels = clips.load_clips(films, args.size, LOOP)
        moving = [
            encode(vae, torch.from_numpy(np.array(clip)).permute(0, 3, 1, 2))
            for clip in tqdm(pixels, "encoding")
        ]
        still = encode(vae, data.load_pixels(data.pictures(args.data), args.size))
        loop.save(path, clips=torch.stack(moving).half(), stills=still.half())
    return loop.load(path)


def tokens(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Text states [B, 32, 128] and their mask [B, 32]."""
    found = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=text.LENGTH,
        return_tensors="pt",
    )
    return encoder(found.input_ids).last_hidden_state, found.attention_mask


def flow_loss(transformer, clean: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """MSE to ε - x over the frames that have noise; clean [B, T, C, h, w]."""
    clean = clean.float().transpose(1, 2)
    noise = torch.randn_like(clean)
    t = noise_levels(len(clean), split_blocks(clean.shape[2], BLOCK), SHIFT)
    s = t[:, None, :, None, None]
    v = transformer((1 - s) * clean + s * noise, 1000 * t, states, mask, return_dict=False)[0]
    error = (v.float() - (noise - clean)).square().mean((1, 3, 4))
    return error[t > 0].mean()


def preview(pipe: LinGenPipeline, frames: int, file: Path) -> None:
    """A row for each of PROMPTS, every second frame, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        PROMPTS,
        num_frames=frames,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pil",
    ).frames
    shown = [clip[::2] for clip in found]
    images = [image for clip in shown for image in clip]
    loop.sheet(images, len(shown[0]), images[0].height).save(file)


def optimizers(
    pipe: LinGenPipeline, learning_rate: float
) -> tuple[list[torch.nn.Parameter], list[torch.optim.Optimizer]]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    blocks = pipe.transformer.transformer_blocks
    matrices = [p for n, p in blocks.named_parameters() if p.ndim == 2 and "table" not in n]
    chosen = {id(p) for p in matrices}
    params = [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()]
    return params, [
        torch.optim.Muon(
            matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [p for p in params if id(p) not in chosen],
            learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            foreach=True,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    loop.add_arguments(
        parser,
        output="runs/video",
        steps=8000,
        batch_size=4,
        learning_rate=2e-3,
        preview_every=1000,
    )
    parser.add_argument("--clips", type=Path, help="folder of the clips; fetched when not given")
    parser.add_argument("--init", type=Path, default=ZOO, help="where vae and text come from")
    parser.add_argument("--size", type=int, default=SIZE, help="of the frames, in pixels")
    parser.add_argument("--stills", type=int, default=12, help="in a batch, beside the clips")
    parser.add_argument("--mixer", choices=("mate", "softmax"), default="mate")
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=(8, 16, 32),
        help="of the clips, as training goes on; the batch, whose size is for the first, shrinks",
    )
    args = parser.parse_args()
    if args.size % 64:
        parser.error(f"--size: expected a multiple of 64, got {args.size}")

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    films, pictures = clips.animations(args.clips), data.pictures(args.data)
    encoder = CLIPTextModel.from_pretrained(args.init / "text_encoder", dtype=torch.float32)
    pipe = LinGenPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(args.init / "tokenizer"),
        text_encoder=encoder.train(),
        vae=AutoencoderKL.from_pretrained(args.init / "vae", dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=build_transformer(args.size, args.mixer).train(),
    )
    latents = load_latents(args, pipe.vae, films)
    torch.manual_seed(args.seed)  # encoding took some draws, or did not
    params, both = optimizers(pipe, args.learning_rate)
    print(f"{sum(p.numel() for p in params):,} parameters, {len(films)} clips", flush=True)

    # the few keys of a window: faster than fused, on the CPU
    attention = partial(sdpa_kernel, SDPBackend.MATH) if args.mixer == "mate" else nullcontext

    def stage(step: int) -> int:
        """Frames of a clip."""
        return args.frames[(step - 1) * len(args.frames) // args.steps]

    def losses(index: list[int], step: int) -> dict[str, Tensor]:
        frames = stage(step)
        index = index[: max(1, len(index) * args.frames[0] // frames)]
        frames += rng.choice((0, 0, 0, *range(1, BLOCK)))  # first blocks may be longer than others
        starts = [rng.choice((0, rng.randrange(LOOP))) for _ in index]
        moving = torch.stack(
            [
                latents["clips"][i, (s + torch.arange(frames)) % LOOP]
                for i, s in zip(index, starts, strict=True)
            ]
        )
        others = torch.randint(len(pictures), (args.stills,)).tolist()
        captions = [text.vary(films[i].captions, rng) for i in index]
        captions += [text.vary(pictures[i].captions, rng) for i in others]
        with attention(), torch.autocast("cpu", torch.bfloat16):
            states, mask = tokens(pipe.tokenizer, pipe.text_encoder, captions)
            n = len(index)
            picked = latents["stills"][others][:, None]
            video = flow_loss(pipe.transformer, moving, states[:n], mask[:n])
            still = flow_loss(pipe.transformer, picked, states[n:], mask[n:])
        return {"loss": video + 0.5 * still, "video": video, "still": still}

    draw = partial(preview, pipe, max(args.frames))
    loop.run(args, params, both, len(films), losses, draw, rng=rng)
    pipe.to(torch.float16).save_pretrained(args.output / "pipeline")


if __name__ == "__main__":
    main()
