"""Judge the zoo's video model beside its softmax twin: distances to real clips, motion, flicker.

    python examples/zoo/judge_video.py --model zoo:emoji-video --twin runs/video-softmax/pipeline

Both draw clips of the same captions from the same noise. Each is compared with the real clip of
its caption, over the package's own random features of what frames show and of how they change:
distances that compare only with each other. `judgement.json` of the output has the numbers,
`clips.png` a few of the clips: real, model, twin.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import clips
import loop
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from train_video import LOOP

from linfusion import zoo
from linfusion.evaluation.features import random_features
from linfusion.evaluation.metrics import kernel_distance_ratio
from linfusion.evaluation.video_metrics import (
    ClipFeatures,
    clip_distances,
    clip_features,
    flicker,
    motion,
)
from linfusion.pipelines import LinGenPipeline

BATCH = 8  # clips drawn at a time
SHOWN = 8  # clips of the sheet, and frames of each


def draw(pipe: LinGenPipeline, captions: list[str], args: argparse.Namespace) -> np.ndarray:
    """A clip of each caption, uint8 [n, f, H, W, 3], from noise of its own seed."""
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for first in tqdm(range(0, len(captions), BATCH), "drawing"):
        part = captions[first : first + BATCH]
        found = pipe(
            part,
            num_frames=args.frames,
            num_inference_steps=args.inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
            output_type="np",
        ).frames
        drawn.append((found * 255).round().astype(np.uint8))
    return np.concatenate(drawn)


def figures(drawn: np.ndarray) -> dict[str, float]:
    """Means over clips, of values 0 to 1."""
    return {"motion": motion(drawn).mean().item(), "flicker": flicker(drawn).mean().item()}


def compare(model: ClipFeatures, twin: ClipFeatures, real: ClipFeatures, pairs: Tensor) -> dict:
    """Distances of both to the real clips, and the model's over the twin's."""
    ours, theirs = (clip_distances(x, real, pairs=pairs)._asdict() for x in (model, twin))
    intervals = {}
    for kind in ("frames", "differences"):
        found = kernel_distance_ratio(
            getattr(model, kind), getattr(twin, kind), getattr(real, kind), pairs=pairs
        )
        finite = all(map(math.isfinite, found.interval))
        intervals[f"{kind}_kernel"] = list(found.interval) if finite else None
    ratios = {name: ours[name] / theirs[name] for name in ours}
    return {"model": ours, "twin": theirs, "ratio": ratios, "ratio_interval": intervals}


def sheet(*sets: np.ndarray) -> Image.Image:
    """The first clips, a row of frames each; the sets follow one another within a clip."""
    count, frames, size = min(SHOWN, len(sets[0])), sets[0].shape[1], sets[0].shape[2]
    columns = min(SHOWN, frames)
    picked = [i * frames // columns for i in range(columns)]
    rows = [clip for n in range(count) for clip in (s[n * len(s) // count] for s in sets)]
    images = [Image.fromarray(row[i]) for row in rows for i in picked]
    return loop.sheet(images, columns, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:emoji-video", help="folder, or zoo:name")
    parser.add_argument("--twin", type=Path, default=Path("runs/video-softmax/pipeline"))
    parser.add_argument("--clips", type=Path, help="folder of the clips; fetched when not given")
    parser.add_argument("--output", type=Path, default=Path("runs/judge"))
    parser.add_argument("--count", type=int, default=96, help="clips drawn by each")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--inference-steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    films = clips.animations(args.clips)
    chosen = torch.arange(args.count) * len(films) // args.count
    captions = [films[i].captions[0] for i in chosen]
    pipes = [
        LinGenPipeline.from_pretrained(zoo.resolve(str(folder)), torch_dtype=torch.float32)
        for folder in (args.model, args.twin)
    ]
    drawn = [draw(pipe, captions, args) for pipe in pipes]
    real = clips.load_clips(films, drawn[0].shape[2], LOOP)[:, : args.frames]
    extract = random_features()
    features = [clip_features(x, extract) for x in (*drawn, real)]
    shown = np.stack([real[i] for i in chosen])
    found = {
        "count": args.count,
        "frames": args.frames,
        "num_inference_steps": args.inference_steps,
        "guidance_scale": args.guidance_scale,
        **compare(*features, pairs=chosen),
        "figures": {
            name: figures(x)
            for name, x in zip(("model", "twin", "real"), (*drawn, shown), strict=True)
        },
    }
    sheet(shown, *drawn).save(args.output / "clips.png")
    tmp = args.output / "judgement.tmp"
    tmp.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(tmp, args.output / "judgement.json")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
