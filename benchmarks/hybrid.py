"""Hybrid attention on the zoo's FLUX: how near to its teacher, untrained and after stage 1.

    python -m benchmarks.hybrid [--pictures 100] [--size 256] [--window 2] [--cell 2]

PSNR of pictures to those of the softmax teacher at equal prompt and noise, without guidance, and
the keys that a query of a pixel has besides the text.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch

import linfusion
from linfusion import zoo
from linfusion.training.layerwise import fit_layers

JUDGED = ("a red apple", "a dog face", "a slice of pizza", "a yellow heart")
LEARNED = (
    "cat face, tree, house, fish, bird, ball, cake, moon, star, shoe, hat, bread, horse, whale,"
    " book, lemon, flower, cloud, car, boat, cup, key, bell, clock, crown, frog, owl, rose, corn,"
    " egg, fox, bear, panda, sun, rocket, drum, guitar, robot, ghost, mushroom, banana, grapes"
)


def pictures(pipe: Any, size: int, steps: int) -> torch.Tensor:
    """[prompts, 3, size, size], the same noise for the same prompt."""
    found = [
        pipe(
            prompt,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(i),
            output_type="pt",
        ).images
        for i, prompt in enumerate(JUDGED)
    ]
    return torch.cat(found)


def psnr(ours: torch.Tensor, teacher: torch.Tensor) -> float:
    """Mean over pictures, in dB."""
    return float(-10 * (ours - teacher).square().mean((1, 2, 3)).log10().mean())


def keys(window: float, cell: int, size: int) -> int:
    """Of a pixel's query: those in its window and one for each cell."""
    side = size // 16  # pixels to a token
    last = math.ceil(window) - 1
    rows = (window**2 - y * y for y in range(-last, last + 1))
    disc = sum(2 * math.ceil(math.sqrt(left)) - 1 for left in rows)
    return disc + (math.ceil(side / cell) ** 2 if cell else 0)


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=__doc__)
    parser.add_argument("--pictures", type=int, default=100, help="that stage 1 learns from")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--window", type=float, default=2)
    parser.add_argument("--cell", type=int, default=2)
    args = parser.parse_args()
    pipe = zoo.load("emoji-flux", linear=False)
    pipe.set_progress_bar_config(disable=True)
    teacher = pictures(pipe, args.size, args.steps)
    window, cell = args.window, args.cell
    rows: list[tuple[str, str, dict[str, Any], int]] = [
        ("window", "clear", {"radius": window}, 0),
        ("window and pooled", "clear", {"radius": window, "down_factor": cell}, cell),
        ("hybrid, counted cells, untrained", "hybrid", {"window": window, "cell": cell}, cell),
    ]
    for name, method, options, cells in rows:
        linfusion.linearize(pipe, method, **options)
        _print(name, keys(window, cells, args.size), pictures(pipe, args.size, args.steps), teacher)
        linfusion.restore(pipe)
    linfusion.linearize(pipe, "hybrid", window=window, cell=cell, maps=True)
    call = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    prompts = [f"a {word}" for word in LEARNED.split(", ")]
    start = time.monotonic()
    fit_layers(pipe, prompts, pictures=args.pictures, seed=1000, **call)
    name = f"hybrid, stage 1 of {time.monotonic() - start:.0f} s"
    _print(name, keys(window, cell, args.size), pictures(pipe, args.size, args.steps), teacher)


def _print(name: str, count: int, ours: torch.Tensor, teacher: torch.Tensor) -> None:
    print(f"{name:<42} {count:>5} keys  {psnr(ours, teacher):>5.1f} dB", flush=True)


if __name__ == "__main__":
    main()
