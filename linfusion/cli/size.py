"""Picture sizes on the command line."""

from __future__ import annotations

import re

LONGEST = 2**18  # pixels of a side: eight times what anybody has drawn here


def parse_size(size: str) -> tuple[int, int]:
    """(height, width) in pixels from "512x768" (width x height) or "512".

    Raises:
        ValueError: not a size, or not a multiple of 8 pixels.
    """
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", size.lower())
    if not match:
        raise ValueError(f"size: {size!r} is not a size; accepted are 512x768 and 512")
    return check_pixels("height", int(match[2] or match[1])), check_pixels("width", int(match[1]))


def check_pixels(name: str, pixels: int) -> int:
    """Refuse a side that is no multiple of the 8 pixels of a latent, and offer the nearest; and one
    that no format of a picture here holds."""
    if pixels > LONGEST:
        raise ValueError(f"{name}: {pixels} px; accepted are multiples of 8 up to {LONGEST}")
    if pixels < 8 or pixels % 8:
        low = pixels // 8 * 8
        near = f"{low} and {low + 8}" if low else "8"
        raise ValueError(
            f"{name}: {pixels} px; accepted are multiples of 8, from 8 up; nearest: {near}"
        )
    return pixels


def choose_size(
    size: str | None, height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """(height, width) from --size or from --height and --width; None leaves it to the model."""
    if size is None:
        return (
            None if height is None else check_pixels("height", height),
            None if width is None else check_pixels("width", width),
        )
    if height is not None or width is not None:
        raise ValueError("size: give either --size or --height and --width")
    return parse_size(size)
