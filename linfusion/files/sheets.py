"""Sheets of pictures: teacher | student."""

from collections.abc import Sequence

from PIL import Image


def side_by_side(left: Sequence[Image.Image], right: Sequence[Image.Image]) -> Image.Image:
    """Two columns of pictures of one size, one pair a row."""
    w, h = left[0].size
    sheet = Image.new("RGB", (2 * w, h * len(left)))
    for row, (a, b) in enumerate(zip(left, right, strict=True)):
        sheet.paste(a, (0, row * h))
        sheet.paste(b, (w, row * h))
    return sheet
