"""Picture sizes on the command line."""

from __future__ import annotations

import re


def parse_size(size: str) -> tuple[int, int]:
    """(height, width) in pixels from "512x768" (width x height) or "512".

    Raises:
        ValueError: not a size, or not a multiple of 8 pixels.
    """
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", size.lower())
    if not match:
        raise ValueError(f"size: {size!r} is not a size; accepted are 512x768 and 512")
    return check_pixels("height", int(match[2] or match[1])), check_pixels("width", int(match[1]))


def check_pixels(name: str, pixels: int, unit: int = 8) -> int:
    """Refuse a side that is no multiple of a latent's or token's `unit`, and offer the nearest."""
    if pixels < unit or pixels % unit:
        low = pixels // unit * unit
        near = f"{low} and {low + unit}" if low else f"{unit}"
        raise ValueError(
            f"{name}: {pixels} px; accepted are multiples of {unit}, from {unit} up; nearest:"
            f" {near}"
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
