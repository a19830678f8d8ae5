"""Picture sizes on the command line."""

from __future__ import annotations

import re


def parse_size(
    size: str | None, height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """(height, width) in pixels from "WxH" or from numbers; None leaves it to the model.

    Raises:
        ValueError: both forms given, not a size, or not a multiple of 8 pixels.
    """
    if size is not None:
        if height is not None or width is not None:
            raise ValueError("size: give either --size or --height and --width")
        match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", size.lower())
        if not match:
            raise ValueError(f"size: {size!r} is not a size; accepted are 512x768 and 512")
        width = int(match[1])
        height = int(match[2] or match[1])
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 8 or pixels % 8):
            raise ValueError(f"{name}: {pixels} px; accepted are multiples of 8, from 8 up")
    return height, width
