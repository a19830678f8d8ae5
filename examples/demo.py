"""Softmax teacher and linear student side by side: the size they were trained at, 2×, 4× and 8×.

    make demo

Writes every picture and a contact sheet into demo/, and prints what each size cost. Seconds and
memory are of the denoising alone: text encoder and VAE are the same for both.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from linfusion import zoo
from linfusion.cli.console import emit_table, say
from linfusion.cli.info import machine
from linfusion.cli.measure import human_bytes, measure

PROMPTS = ("a red heart", "a pizza", "a cat face", "a yellow heart")
# Prompts and denoising steps at each size; one step of softmax at 1024 px costs 40 at 128 px.
PLAN = {128: (4, 20), 256: (4, 20), 512: (2, 20), 1024: (1, 10)}
SIDES = ("softmax", "linear")
SEED = 0
GUIDANCE = 4.0  # what the model's card recommends
THUMB, MARGIN, LABEL = 192, 8, 22


@dataclass
class Drawn:
    """One picture and what its denoising cost."""

    prompt: str
    size: int
    side: str
    image: Image.Image
    seconds: float
    peak: int | None


def draw(pipe: StableDiffusionPipeline, prompt: str, size: int, side: str, steps: int) -> Drawn:
    """Draw one picture; the same prompt and seed give both sides the same noise."""
    pipe.set_progress_bar_config(desc=f"{side} {size} px, {prompt}", leave=False)
    latents, seconds, peak = measure(
        lambda: (
            pipe(
                prompt,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(SEED),
                output_type="latent",
            ).images
        )
    )
    with torch.inference_mode():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return Drawn(prompt, size, side, pipe.image_processor.postprocess(pixels)[0], seconds, peak)


def contact_sheet(drawn: list[Drawn]) -> Image.Image:
    """Prompts downwards; sizes to the right, each with softmax beside linear. All at one scale."""
    font = ImageFont.load_default(14)
    cell = THUMB + MARGIN
    sheet = Image.new(
        "RGB",
        (
            2 * len(PLAN) * cell + MARGIN,
            LABEL + len(PROMPTS) * (cell + LABEL) + MARGIN,
        ),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for i, size in enumerate(PLAN):
        for j, side in enumerate(SIDES):
            pen.text((MARGIN + (2 * i + j) * cell, 3), f"{size} px, {side}", "black", font)
    for row, prompt in enumerate(PROMPTS):
        top = LABEL + row * (cell + LABEL)
        pen.text((MARGIN, top + 3), prompt, "black", font)
        for d in drawn:
            if d.prompt == prompt:
                column = 2 * list(PLAN).index(d.size) + SIDES.index(d.side)
                small = d.image.resize((THUMB, THUMB), Image.Resampling.LANCZOS)
                sheet.paste(small, (MARGIN + column * cell, top + LABEL))
    return sheet


def print_costs(drawn: list[Drawn]) -> None:
    """One row a size: median seconds and largest peak of memory."""
    rows = []
    for size, (count, steps) in PLAN.items():
        of = {side: [d for d in drawn if d.size == size and d.side == side] for side in SIDES}
        seconds = {side: statistics.median(d.seconds for d in of[side]) for side in SIDES}
        peaks = {side: max((d.peak for d in of[side] if d.peak is not None), default=None)
                 for side in SIDES}  # fmt: skip
        rows.append(
            [
                f"{size} px",
                f"{(size // 8) ** 2:,}",
                str(count),
                str(steps),
                *(f"{seconds[side]:.2f} s" for side in SIDES),
                f"{seconds['softmax'] / seconds['linear']:.2f}×",
                *(human_bytes(peaks[side]) for side in SIDES),
            ]
        )
    emit_table(
        ["size", "tokens", "prompts", "steps", *SIDES, "speed-up", "softmax peak", "linear peak"],
        rows,
        title=f"Denoising one picture, float32; peak above the loaded models. {machine()}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    pipes = {side: zoo.load("emoji", linear=side == "linear") for side in SIDES}
    for side, pipe in pipes.items():
        draw(pipe, PROMPTS[0], min(PLAN), side, steps=2)  # warms up; not counted
    drawn = []
    for size, (count, steps) in PLAN.items():
        for prompt in PROMPTS[:count]:
            for side, pipe in pipes.items():  # turn by turn: a busy machine slows both alike
                drawn.append(draw(pipe, prompt, size, side, steps))
                name = f"{prompt.replace(' ', '-')}-{size}-{side}.png"
                drawn[-1].image.save(options.output / name)
        say(f"{size} px: {count} of {len(PROMPTS)} prompts drawn, {steps} steps")
    contact_sheet(drawn).save(options.output / "contact-sheet.png")
    print_costs(drawn)
    print(f"{len(drawn)} pictures and contact-sheet.png are in {options.output}/")


if __name__ == "__main__":
    main()
