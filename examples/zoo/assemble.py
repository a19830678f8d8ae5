"""Put a trained teacher and its student into the package, in half precision.

python examples/zoo/assemble.py --pipeline runs/unet/pipeline --student runs/student
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from linfusion.weights import LinFusion

ZOO = Path(__file__).parents[2] / "linfusion" / "zoo"
LIMIT = 24_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=Path("runs/unet/pipeline"))
    parser.add_argument("--student", type=Path, default=Path("runs/student"))
    parser.add_argument("--name", default="emoji")
    args = parser.parse_args()

    tmp = ZOO / f"{args.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.float16)
    pipe.save_pretrained(tmp)
    student = LinFusion.from_pretrained(args.student, dtype=torch.float16)
    student.save_pretrained(tmp / "linfusion")
    for file in tmp.rglob("*.json"):  # where it was trained is nobody's concern
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(file.stat().st_size for file in tmp.rglob("*") if file.is_file())
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes; the package has room for {LIMIT:,}")
    target = ZOO / args.name
    card = target / "README.md"
    if card.exists():
        shutil.copy2(card, tmp / card.name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(tmp, target)
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
