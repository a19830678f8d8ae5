"""Write the emoji as an image folder with captions and classes, for `linfusion train` and `eval`.

python examples/zoo/export.py --output runs/emoji --size 256
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import data
from classes import class_of
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the pictures; fetched when not given")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output: {args.output} is there already")

    items = data.pictures(args.data)
    tmp = args.output.with_name(args.output.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    with (tmp / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for item, pixels in zip(items, data.load_pixels(items, args.size), strict=True):
            name = f"{item.file.stem}.png"
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp / name)
            row = {"file_name": name, "text": item.captions[0], "class": class_of(item)}
            lines.write(json.dumps(row) + "\n")
    os.replace(tmp, args.output)
    print(f"{len(items)} pictures in {args.output}")


if __name__ == "__main__":
    main()
