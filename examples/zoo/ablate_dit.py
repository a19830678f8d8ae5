"""What each part of LiT is worth on the zoo's DiT: five models trained alike for equal steps.

    python examples/zoo/ablate_dit.py --teacher runs/dit/pipeline --output runs/ablation

Softmax, linear attention without and with the convolution, then with the teacher's weights, then
with its guidance as well (Wang et al. 2025, table 2 and section 4). Each is judged on the way by
its kernel distance to the real pictures. `results.json` of the output has the curves, and the
teacher's own distance; a run that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data
import loop
import torch
from classes import CLASSES, class_of
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from train_dit import (
    SIZE,
    ZOO_VAE,
    build_dit,
    build_scheduler,
    encode,
    objective,
    optimizers,
    tie_embedders,
)

import linfusion
from linfusion.evaluation.features import random_features
from linfusion.evaluation.metrics import kernel_distance
from linfusion.pipelines import DiTPipeline

BATCH = 32  # pictures drawn at a time


@dataclass(frozen=True)
class Arm:
    """One of the models; the convolution is only that of a linear one."""

    linear: bool = True
    conv: str | None = "value_shared"
    inherits: bool = False
    distils: bool = False


ARMS = {
    "distillation": Arm(inherits=True, distils=True),
    "convolution": Arm(),
    "inheritance": Arm(inherits=True),
    "linear": Arm(conv=None),
    "softmax": Arm(linear=False),
}


class Judge:
    """The kernel distance of what a pipeline draws to the real pictures.

    Args:
        pixels: the real ones, uint8 [n, 3, H, W].
        classes: of each, [n]; they are drawn as often as they occur.
        count: pictures drawn, each from noise of its own seed.
    """

    def __init__(self, pixels: Tensor, classes: Tensor, count: int) -> None:
        self._extract = random_features()
        self._real = torch.cat([self._extract(p / 255) for p in pixels.split(BATCH)])
        self._classes = [CLASSES[c] for c in classes[torch.arange(count) * len(classes) // count]]

    def __call__(self, pipe: DiTPipeline) -> float:
        pipe = DiTPipeline(
            pipe.transformer,
            pipe.vae,
            DPMSolverMultistepScheduler.from_config(pipe.scheduler.config),
            id2label=dict(enumerate(CLASSES)),
        )
        pipe.set_progress_bar_config(disable=True)
        features = []
        for first in range(0, len(self._classes), BATCH):
            names = self._classes[first : first + BATCH]
            seeds = [torch.Generator().manual_seed(first + i) for i in range(len(names))]
            with torch.autocast("cpu", torch.bfloat16):
                images = pipe(
                    names,
                    num_inference_steps=20,
                    guidance_scale=2.0,
                    generator=seeds,
                    output_type="pt",
                ).images
            features.append(self._extract(images.float()))
        return kernel_distance(torch.cat(features), self._real)


def record(judge: Judge, pipe: DiTPipeline, curve: Path, file: Path) -> None:
    """Add to a curve the distance at the step that `file`, preview-STEP.png, is of."""
    points = json.loads(curve.read_text()) if curve.exists() else {}
    points[file.stem.partition("-")[2]] = judge(pipe)
    write(curve, points)


def write(file: Path, content: object) -> None:
    """Whole, or as it was."""
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(tmp, file)


def train(
    arm: Arm,
    args: argparse.Namespace,
    teacher: DiTPipeline,
    latents: Tensor,
    classes: Tensor,
    judge: Judge,
) -> None:
    """One model, from its start to the last step, into the folder `args.output`."""
    torch.manual_seed(args.seed)
    dit = build_dit().eval()
    tie_embedders(dit)
    for block in dit.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    if arm.linear:
        linfusion.linearize(dit, "lit", heads=2, conv=arm.conv)
        if arm.inherits:
            print(linfusion.inherit(dit, teacher.transformer, "lit", seed=args.seed), flush=True)
    scheduler = build_scheduler()
    losses = objective(
        torch.compile(dit, dynamic=False),
        latents,
        classes,
        scheduler,
        torch.compile(teacher.transformer, dynamic=False) if arm.distils else None,
    )
    draw = partial(record, judge, DiTPipeline(dit, teacher.vae, scheduler), args.output / "curve")
    params = list(dit.parameters())
    both = optimizers(dit, args.learning_rate)
    loop.run(args, params, both, len(latents), losses, draw, warmup=min(300, args.steps // 5))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    loop.add_arguments(
        parser,
        output="runs/ablation",
        steps=1250,
        batch_size=32,
        learning_rate=2e-3,
        preview_every=250,
    )
    parser.add_argument("--teacher", type=Path, default=Path("runs/dit/pipeline"))
    parser.add_argument("--vae", type=Path, default=ZOO_VAE)
    parser.add_argument("--count", type=int, default=256, help="pictures that are judged")
    parser.add_argument("--arm", action="append", choices=ARMS, help="only these; repeat")
    args = parser.parse_args(argv)

    args.output.mkdir(parents=True, exist_ok=True)
    items = data.pictures(args.data)
    classes = torch.tensor([CLASSES.index(class_of(item)) for item in items])
    pixels = data.load_pixels(items, SIZE)
    teacher = DiTPipeline.from_pretrained(args.teacher, torch_dtype=torch.float32)
    for block in teacher.transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    latents = encode(AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32), pixels)
    judge = Judge(pixels, classes, args.count)

    results = args.output / "results.json"
    for name in args.arm or ARMS:
        folder = args.output / name
        folder.mkdir(exist_ok=True)
        own = argparse.Namespace(**{**vars(args), "output": folder})
        train(ARMS[name], own, teacher, latents, classes, judge)
        found = json.loads(results.read_text()) if results.exists() else {}
        found[name] = json.loads((folder / "curve").read_text())
        found.setdefault("teacher", judge(teacher))
        write(results, found)
        print(name, found[name], "teacher", found["teacher"], flush=True)


if __name__ == "__main__":
    main()
