"""Pictures of any size side by side: whole, an eighth of their width, and 256 pixels as they are.

    python examples/crops.py heart-1024.png heart-16384.png --output crops.jpg

A column a picture; the crops are around `--centre`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from linfusion.files.picture_reader import read

CELL, GAP, LABEL = 256, 6, 22
PARTS = (1.0, 1 / 8, None)  # of the width; None is as many pixels as a cell has


def column(path: Path, centre: tuple[float, float]) -> tuple[str, list[Image.Image]]:
    """The longer side of a picture as text, and its parts around `centre`, all of one size."""
    picture = read(path)
    height, width = picture.shape[:2]
    cells = []
    for part in PARTS:
        shorter = min(width, height)
        side = min(CELL, shorter) if part is None else round(part * shorter)
        left = round(min(max(centre[0] * width - side / 2, 0), width - side))
        top = round(min(max(centre[1] * height - side / 2, 0), height - side))
        crop = Image.fromarray(picture[top : top + side, left : left + side])
        reduced = crop.reduce(max(1, side // (4 * CELL)))
        cells.append(reduced.resize((CELL, CELL), Image.Resampling.LANCZOS))
    return f"{max(width, height):,} px", cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("crops.jpg"))
    parser.add_argument(
        "--centre", type=float, nargs=2, default=(0.5, 0.5), help="of the crops, as shares"
    )
    options = parser.parse_args()
    columns = [column(path, options.centre) for path in options.pictures]
    size = GAP + len(columns) * (CELL + GAP), LABEL + len(PARTS) * (CELL + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (title, cells) in enumerate(columns):
        left = GAP + i * (CELL + GAP)
        pen.text((left, 3), title, "black", font)
        for j, cell in enumerate(cells):
            sheet.paste(cell, (left, LABEL + j * (CELL + GAP)))
    sheet.save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
