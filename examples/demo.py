"""Softmax teacher and linear student side by side: the size they were trained at, 2×, 4× and 8×.

    make demo

Writes every picture and a contact sheet of each model into demo/, and prints what each size cost.
Seconds and memory are of the denoising alone: text encoders and VAE are the same for all. Clips of
the video model, which is linear itself, are drawn at two lengths; theirs are of the whole stream.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont

from linfusion import zoo
from linfusion.cli.console import emit_table, say
from linfusion.cli.info import machine
from linfusion.cli.measure import human_bytes, measure
from linfusion.files.video_writer import open_video
from linfusion.pipelines.arguments import draw_arguments

PROMPTS = ("a red heart", "a pizza", "a cat face", "a yellow heart")
SEED = 0
THUMB, MARGIN, LABEL = 192, 8, 22
FPS, STEPS = 12, 12  # of clips
STRIP = 8  # frames of a clip that are shown abreast


@dataclass(frozen=True)
class Shown:
    """A model of the zoo: its teacher and students, what is drawn, and how.

    Attributes:
        name: in the zoo.
        sides: arguments of `zoo.load`, by what the column is called; softmax is the first.
        plan: prompts and denoising steps at each size in pixels.
        guidance: what the model's card recommends.
        token: pixels of a side that the widest layer has a token for.
        prompts: texts, or classes by name.
    """

    name: str
    sides: dict[str, dict[str, Any]]
    plan: dict[int, tuple[int, int]]
    guidance: float
    token: int
    prompts: tuple[str, ...] = PROMPTS


# One step of softmax at 1024 px costs 40 at 128 px.
MODELS = (
    Shown(
        "emoji",
        {"softmax": {"linear": False}, "linear": {}},
        {128: (4, 20), 256: (4, 20), 512: (2, 20), 1024: (1, 10)},
        4.0,
        8,
    ),
    Shown(
        "emoji-flux",
        {
            "softmax": {"linear": False},
            "clear-8": {"student": "clear-8"},
            "clear-16": {"student": "clear-16"},
        },
        {128: (4, 16), 256: (2, 16), 512: (1, 16)},
        3.0,
        16,
    ),
    Shown(
        "emoji-lit",
        {"softmax": {"linear": False}, "linear": {}},
        {128: (4, 50)},
        3.0,
        16,
        ("face", "heart", "person", "sign"),
    ),
)


@dataclass(frozen=True)
class Video:
    """A video model of the zoo, and the prompts of clips, by their number of frames."""

    name: str
    plan: dict[int, tuple[str, ...]]


VIDEOS = (
    Video(
        "emoji-video",
        {24: ("a red heart", "cat face", "grinning face with big eyes"), 96: ("a red heart",)},
    ),
)


@dataclass
class Drawn:
    """One picture and what its denoising cost."""

    prompt: str
    size: int
    side: str
    image: Image.Image
    seconds: float
    peak: int | None


def draw(pipe: Any, shown: Shown, prompt: str, size: int, side: str, steps: int) -> Drawn:
    """Draw one picture; the same prompt and seed give all sides the same noise."""
    pipe.set_progress_bar_config(desc=f"{side} {size} px, {prompt}", leave=False)
    latents, seconds, peak = measure(
        lambda: (
            pipe(
                prompt,
                **draw_arguments(pipe, guidance_scale=shown.guidance),
                height=size,
                width=size,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(SEED),
                output_type="latent",
            ).images
        )
    )
    if hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0)
    with torch.inference_mode():
        pixels = pipe.vae.decode(latents).sample
    return Drawn(prompt, size, side, VaeImageProcessor().postprocess(pixels)[0], seconds, peak)


def contact_sheet(shown: Shown, drawn: list[Drawn]) -> Image.Image:
    """Prompts downwards; sizes to the right, each with its sides abreast. All at one scale."""
    font = ImageFont.load_default(14)
    cell = THUMB + MARGIN
    across = len(shown.sides)
    sheet = Image.new(
        "RGB",
        (
            across * len(shown.plan) * cell + MARGIN,
            LABEL + len(shown.prompts) * (cell + LABEL) + MARGIN,
        ),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for i, size in enumerate(shown.plan):
        for j, side in enumerate(shown.sides):
            pen.text((MARGIN + (across * i + j) * cell, 3), f"{size} px, {side}", "black", font)
    for row, prompt in enumerate(shown.prompts):
        top = LABEL + row * (cell + LABEL)
        pen.text((MARGIN, top + 3), prompt, "black", font)
        for d in drawn:
            if d.prompt == prompt:
                column = across * list(shown.plan).index(d.size) + list(shown.sides).index(d.side)
                small = d.image.resize((THUMB, THUMB), Image.Resampling.LANCZOS)
                sheet.paste(small, (MARGIN + column * cell, top + LABEL))
    return sheet


def print_costs(shown: Shown, drawn: list[Drawn]) -> None:
    """One row a size: median seconds and largest peak of memory."""
    rows = []
    softmax, *students = shown.sides
    for size, (count, steps) in shown.plan.items():
        of = {s: [d for d in drawn if d.size == size and d.side == s] for s in shown.sides}
        seconds = {s: statistics.median(d.seconds for d in of[s]) for s in of}
        peaks = {s: max((d.peak for d in of[s] if d.peak is not None), default=None) for s in of}
        rows.append(
            [
                f"{size} px",
                f"{(size // shown.token) ** 2:,}",
                str(count),
                str(steps),
                *(f"{seconds[s]:.2f} s" for s in of),
                *(f"{seconds[softmax] / seconds[s]:.2f}×" for s in students),
                *(human_bytes(peaks[s]) for s in of),
            ]
        )
    gains = ["speed-up"] if len(students) == 1 else [f"{s} speed-up" for s in students]
    emit_table(
        ["size", "tokens", "prompts", "steps", *shown.sides, *gains]
        + [f"{side} peak" for side in shown.sides],
        rows,
        title=f"zoo:{shown.name}: denoising one picture, float32; peak above the loaded models."
        f" {machine()}",
    )


def show(shown: Shown, folder: Path) -> int:
    """Draw everything of one model; how many pictures."""
    pipes = {side: zoo.load(shown.name, **given) for side, given in shown.sides.items()}
    for side, pipe in pipes.items():
        draw(pipe, shown, shown.prompts[0], min(shown.plan), side, steps=2)  # warms up; not counted
    folder = folder / shown.name
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for size, (count, steps) in shown.plan.items():
        for prompt in shown.prompts[:count]:
            for side, pipe in pipes.items():  # turn by turn: a busy machine slows all alike
                drawn.append(draw(pipe, shown, prompt, size, side, steps))
                name = f"{prompt.replace(' ', '-')}-{size}-{side}.png"
                drawn[-1].image.save(folder / name)
        say(
            f"{shown.name}, {size} px: {count} of {len(shown.prompts)} prompts drawn, {steps} steps"
        )
    contact_sheet(shown, drawn).save(folder / "contact-sheet.png")
    print_costs(shown, drawn)
    return len(drawn)


def show_video(video: Video, folder: Path) -> int:
    """Draw the clips of the video model; how many."""
    pipe = zoo.load(video.name)
    pipe.set_progress_bar_config(disable=True)
    folder = folder / video.name
    folder.mkdir(parents=True, exist_ok=True)
    rows, strips = [], []
    for frames, prompts in video.plan.items():
        for prompt in prompts:
            clip, seconds, peak = measure(
                lambda prompt=prompt, frames=frames: write_clip(
                    pipe, prompt, frames, folder / f"{prompt.replace(' ', '-')}-{frames}.webp"
                )
            )
            strips.append(clip)
            rows.append(
                [
                    prompt,
                    str(frames),
                    f"{seconds:.1f} s",
                    f"{1000 * seconds / frames:.0f} ms",
                    human_bytes(peak),
                ]
            )
        say(f"{video.name}, {frames} frames: {len(prompts)} prompts drawn, {STEPS} steps")
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, i * strip.height))
    sheet.save(folder / "contact-sheet.png")
    emit_table(
        ["prompt", "frames", "seconds", "a frame", "peak"],
        rows,
        title=f"zoo:{video.name}: streamed, float32; peak above the loaded model. {machine()}",
    )
    return len(rows)


def write_clip(pipe: Any, prompt: str, frames: int, file: Path) -> Image.Image:
    """Stream a clip into a file; a few of its frames, abreast."""
    height, width = pipe.default_size
    strip = Image.new("RGB", (STRIP * width, height))
    done = 0
    with open_video(file, FPS, (width, height)) as out:
        for part in pipe.stream(
            prompt,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(SEED),
        ):
            out.write(part)
            for i, frame in enumerate(part, done):
                column, rest = divmod(i * STRIP, frames)
                if rest < STRIP:  # the first frame of this part of the clip
                    strip.paste(Image.fromarray(frame), (column * width, 0))
            done += len(part)
    return strip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for pictures")
    options = parser.parse_args()
    count = sum(show(shown, options.output) for shown in MODELS)
    clips = sum(show_video(video, options.output) for video in VIDEOS)
    print(
        f"{count} pictures and {clips} clips are in {options.output}/, with a contact sheet of each"
        " model"
    )


if __name__ == "__main__":
    main()
