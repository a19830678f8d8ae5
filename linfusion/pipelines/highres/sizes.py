"""Sizes of the stages of a high-resolution run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LONGEST = 32_768  # pixels: a gigapixel
MOST_STAGES = 32


def check_side(name: str, side: Any, unit: int) -> None:
    """Refuse a side that is no multiple of the latent grid, and offer those that are near."""
    if isinstance(side, int) and side > LONGEST:
        raise ValueError(f"{name}: got {side:,}; accepted are up to {LONGEST:,} pixels")
    if not isinstance(side, int) or isinstance(side, bool) or side < unit or side % unit:
        near = ""
        if isinstance(side, int) and side > 0:
            low = side // unit * unit
            near = (
                f"; the nearest are {low} and {low + unit}" if low else f"; the nearest is {unit}"
            )
        raise ValueError(f"{name}: got {side!r}; accepted are multiples of {unit} pixels{near}")


def split(
    base: tuple[int, int],
    target: tuple[int, int],
    factor: float,
    unit: int,
    *,
    from_picture: bool,
) -> list[tuple[int, int]]:
    """Sizes (height, width) from `base` on, each `factor` times the one before, to the target.

    A last jump of less than factor^0.2 is not worth a stage: the one before goes the whole way.

    Args:
        from_picture: `base` is there already; it is left out then, and the target always in.

    Raises:
        ValueError: more than `MOST_STAGES`.
    """
    ratio = max(target) / max(base)
    count = max(math.ceil(math.log(ratio) / math.log(factor) - 0.2), 0) if ratio > 1 else 0
    if count > MOST_STAGES:
        least = math.ceil(100 * ratio ** (1 / MOST_STAGES)) / 100
        raise ValueError(
            f"factor: got {factor}, which makes {count:,} stages of {max(base)} to {max(target)}"
            f" pixels; accepted is {least:.2f} or more, for at most {MOST_STAGES}"
        )
    count = max(count, int(from_picture or base != target))
    sizes = [] if from_picture else [base]
    for i in range(1, count):
        scale = max(base) * factor**i / max(target)
        sizes.append((_near(target[0] * scale, unit), _near(target[1] * scale, unit)))
    return [*sizes, target] if count else sizes


def _near(side: float, unit: int) -> int:
    return max(unit, round(side / unit) * unit)


def target_size(
    height: int | None, width: int | None, size: int | tuple[int, int] | None
) -> tuple[int, int]:
    if size is None and height is not None and width is not None:
        return height, width
    if size is None or height is not None or width is not None:
        raise ValueError(
            f"size: got size={size!r}, height={height!r}, width={width!r}; accepted is either size"
            " (one side, or height and width) or both of height and width"
        )
    return _pair("size", size)


def _pair(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return size[0], size[1]
    raise ValueError(f"{name}: got {size!r}; accepted is a side or (height, width) in pixels")


def first_size(
    base_size: int | tuple[int, int] | None, target: tuple[int, int], native: int, unit: int
) -> tuple[int, int]:
    """The area the model was made for, in the aspect of the target."""
    if base_size is None:
        if native > max(target):
            raise ValueError(
                f"size: got {target[1]}×{target[0]}, which is smaller than the {native} pixels this"
                " model starts from; name a smaller base_size, or a larger size"
            )
        scale = min(1.0, native / math.sqrt(target[0] * target[1]))
        return _near(target[0] * scale, unit), _near(target[1] * scale, unit)
    base = _pair("base_size", base_size)
    if isinstance(base_size, int):  # the longer side
        check_side("base_size", base_size, unit)
        base = (
            _near(target[0] * base_size / max(target), unit),
            _near(target[1] * base_size / max(target), unit),
        )
    for side in base:
        check_side("base_size", side, unit)
    if base[0] > target[0] or base[1] > target[1]:
        raise ValueError(
            f"base_size: got {base[1]}×{base[0]}; accepted is up to the size,"
            f" {target[1]}×{target[0]}"
        )
    return base


def picture_size(picture: np.ndarray, target: tuple[int, int], unit: int) -> tuple[int, int]:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"image: got {picture.dtype} {list(picture.shape)}; accepted are a file, a Pillow image"
            " or uint8 [H, W, 3]"
        )
    height, width = picture.shape[:2]
    if height > target[0] or width > target[1]:
        raise ValueError(
            f"size: got {target[1]}×{target[0]}, which is smaller than the image, {width}×{height}"
        )
    if abs(target[0] * width / (target[1] * height) - 1) > 0.02:
        scale = math.sqrt(target[0] * target[1] / (height * width))
        fits = _near(width * scale, unit), _near(height * scale, unit)
        raise ValueError(
            f"size: got {target[1]}×{target[0]}, which would stretch the image of {width}×{height};"
            f" of its shape is {fits[0]}×{fits[1]}"
        )
    return height, width
