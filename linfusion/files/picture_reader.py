"""Reading pictures of any size, and what they were made with; writing is in `picture_writer`.

Pillow refuses pictures of more than 179 million pixels as a possible attack; the files that this
library writes are larger, and whoever names one here means it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from linfusion.files.picture_writer import PictureWriter, bytes_needed, writer

__all__ = ["PictureWriter", "bytes_needed", "open_picture", "read", "read_parameters", "writer"]

BAND = 2**22  # pixels converted at a time

_LOCK = threading.Lock()


def open_picture(picture: str | os.PathLike[str] | Image.Image) -> np.ndarray:
    """A picture as uint8 [H, W, 3], from a file of any size or from Pillow.

    EXIF orientation is applied. What cannot be kept is said in one warning: transparency is
    composited over white, CMYK converted, 16 bits scaled to 8, other frames left out. Grey and
    palette pictures become RGB.

    Raises:
        ValueError: not a picture, a truncated one, or one of 32-bit or Lab pixels; or neither a
            path nor a Pillow image.
        OSError: the file is not there or may not be read.
    """
    if not isinstance(picture, Image.Image):
        return _read("picture", picture, None)
    pixels, notes = open_noted(picture)
    _say("picture", notes, stacklevel=3)
    return pixels


def open_noted(picture: str | os.PathLike[str] | Image.Image) -> tuple[np.ndarray, list[str]]:
    """What `open_picture` gives, and what it would warn of; for those who open many."""
    if isinstance(picture, Image.Image):
        with _any_size():
            return _pixels("picture", "the Pillow image", picture, None)
    with _opened("picture", picture) as opened:
        return _pixels("picture", picture, opened, None)


def size_of(picture: str | os.PathLike[str] | Image.Image) -> tuple[int, int]:
    """(width, height) of the upright picture, without decoding its pixels.

    Raises:
        ValueError, OSError: as `open_picture`, but for what is in the pixels.
    """
    if not isinstance(picture, Image.Image):
        with _opened("picture", picture) as opened:
            return size_of(opened)
    width, height = picture.size
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
    return (height, width) if turned else (width, height)


def frame_pixels(frame: Image.Image) -> np.ndarray:
    """The frame that an animation is at, as `open_picture` converts pictures, uint8 [H, W, 3]."""
    return _from_bands(frame, (0, 0, *frame.size))[0]


def read(
    path: str | os.PathLike[str], *, region: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """A picture file, or a part of it, as uint8 [height, width, 3].

    Of an uncompressed tiled TIFF, which is what this library writes, only the tiles of the region
    are read. Every other file is decoded whole by Pillow, 4 bytes a pixel, before the region is
    taken. For that time Pillow's limit on sizes is lifted for the whole process; reads in several
    threads wait for each other.

    Args:
        path: the file. See `open_picture` for what is converted, and said.
        region: (left, top, width, height) in pixels of the upright picture; None takes all.

    Raises:
        ValueError: as `open_picture`, or a region that is not inside the picture.
        OSError: the file is not there or may not be read.
    """
    return _read("path", path, region)


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters `writer` embedded in a PNG, JPEG or TIFF, without decoding its pixels.

    Raises:
        ValueError: not a picture, or one without such parameters.
        OSError: the file is not there or may not be read.
    """
    with _opened("path", path) as picture, _readable("path", path):
        text = picture.info.get("parameters")
        if text is None:
            text = picture.getexif().get(ExifTags.Base.ImageDescription)
    try:
        parameters = json.loads(text or "")
    except json.JSONDecodeError:
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(
            f"path: {path} holds no parameters; accepted: a picture written by linfusion"
        )
    return parameters


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Pillow without its limit on sizes, and strict about truncated files, for a while.

    Both are globals of Pillow. The lock keeps our own threads from restoring each other's value;
    another thread that opens a picture meanwhile finds no limit.
    """
    with _LOCK:
        limit, lenient = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, lenient


@contextlib.contextmanager
def _readable(argument: str, source: object) -> Iterator[None]:
    """Turns what Pillow's parsers throw at a broken file, nearly anything, into a ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{argument}: {source} is not a picture; accepted: what Pillow reads"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{argument}: {source} cannot be read ({error}); accepted: a whole picture"
        ) from error


@contextlib.contextmanager
def _opened(argument: str, path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A picture file, not yet loaded, whatever its size."""
    if not isinstance(
        path, str | os.PathLike
    ):  # a number is a descriptor to `open`, which closes it
        raise ValueError(
            f"{argument}: got {path!r} of type {type(path).__name__}; accepted: the path of a"
            " picture file, or a Pillow image"
        )
    with open(path, "rb") as file, _any_size():
        with _readable(argument, path):
            picture = Image.open(file)
        with picture:
            yield picture


def _read(
    argument: str, path: str | os.PathLike[str], region: tuple[int, int, int, int] | None
) -> np.ndarray:
    with _opened(argument, path) as picture:
        pixels, notes = _pixels(argument, path, picture, region)
    _say(os.fspath(path), notes, stacklevel=4)
    return pixels


def _say(source: str, notes: list[str], stacklevel: int) -> None:
    if notes:
        warnings.warn(f"{source}: {'; '.join(notes)}", stacklevel=stacklevel)


def _pixels(
    argument: str,
    source: object,
    picture: Image.Image,
    region: tuple[int, int, int, int] | None,
) -> tuple[np.ndarray, list[str]]:
    """uint8 [height, width, 3] of a region, and what had to be changed for it."""
    notes = []
    with _readable(argument, source):
        if getattr(picture, "is_animated", False):
            notes.append(f"it has several frames, number {picture.tell() + 1} is taken")
        tiles = _plain_tiles(picture)
        if tiles is None:
            # Before loading: afterwards the depth in the file cannot be told.
            layouts = [str(tile[3]) for tile in getattr(picture, "tile", [])]
            if any(";16" in layout for layout in [picture.mode, *layouts]):
                notes.append("16 bits a channel are scaled to 8")
            if picture.mode == "CMYK":
                notes.append("CMYK is converted to RGB without a colour profile")
            if picture.mode in ("I", "F"):
                raise ValueError(f"32 bits a channel, mode {picture.mode}; 8 and 16 are read")
            picture.load()
            if picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
                picture = ImageOps.exif_transpose(picture)
    box = _box(region, picture.size)
    with _readable(argument, source):
        if tiles is not None:
            return _from_tiles(tiles, box), notes
        pixels, see_through = _from_bands(picture, box)
    if see_through:
        notes.append("transparency is composited over white")
    return pixels, notes


def _box(
    region: tuple[int, int, int, int] | None, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    if region is None:
        return 0, 0, *size
    whole = len(region) == 4 and all(isinstance(n, int | np.integer) for n in region)
    left, top, width, height = region if whole else (0, 0, 0, 0)
    inside = left + width <= size[0] and top + height <= size[1]
    if min(left, top) < 0 or min(width, height) < 1 or not inside:
        raise ValueError(
            f"region: {region!r}; accepted: (left, top, width, height) in whole pixels inside "
            f"{size[0]:,} × {size[1]:,}"
        )
    return left, top, width, height


def _from_bands(picture: Image.Image, box: tuple[int, int, int, int]) -> tuple[np.ndarray, bool]:
    """uint8 [height, width, 3] of a loaded picture, and whether some of it was see-through."""
    left, top, width, height = box
    pixels = np.empty((height, width, 3), np.uint8)
    step = max(1, BAND // width)
    see_through = False
    for y in range(0, height, step):
        rows = pixels[y : y + step]
        band = picture.crop((left, top + y, left + width, top + y + len(rows)))
        if band.mode.startswith("I;16"):
            rows[:] = (np.asarray(band) >> 8)[..., None]  # as Pillow does with 16-bit RGB
        elif band.has_transparency_data:
            rgba = np.asarray(band.convert("RGBA")).astype(np.uint16)
            alpha = rgba[..., 3:]
            rows[:] = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
            see_through |= bool((alpha < 255).any())
        else:
            rows[:] = np.asarray(band.convert("RGB"))
    return pixels, see_through


class _Tiles(NamedTuple):
    file: IO[bytes]
    offsets: tuple[int, ...]
    across: int  # tiles in a row of tiles
    width: int
    height: int


def _plain_tiles(picture: Image.Image) -> _Tiles | None:
    """The tiles of an upright TIFF not yet loaded that hold 8-bit RGB as it is, else None."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or not (picture.tile and picture.fp):
        return None
    tag, base = picture.tag_v2, ExifTags.Base
    width, height = tag.get(base.TileWidth, 0), tag.get(base.TileLength, 0)
    plain = (
        tag.get(base.BitsPerSample) == (8, 8, 8)
        and tag.get(base.Compression) == 1
        and tag.get(base.PhotometricInterpretation) == 2  # RGB
        and tag.get(base.PlanarConfiguration, 1) == 1  # R, G, B of a pixel together
        and tag.get(base.FillOrder, 1) == 1
        and tag.get(base.Orientation, 1) == 1
        and set(tag.get(base.TileByteCounts, ())) == {3 * width * height}
    )
    if not plain:
        return None
    across = -(-picture.width // width)
    return _Tiles(picture.fp, tag[base.TileOffsets], across, width, height)


def _from_tiles(tiles: _Tiles, box: tuple[int, int, int, int]) -> np.ndarray:
    """uint8 [height, width, 3] of a region, from the tiles it touches alone."""
    left, top, width, height = box
    pixels = np.empty((height, width, 3), np.uint8)
    for y in range(top // tiles.height * tiles.height, top + height, tiles.height):
        for x in range(left // tiles.width * tiles.width, left + width, tiles.width):
            tiles.file.seek(tiles.offsets[y // tiles.height * tiles.across + x // tiles.width])
            data = tiles.file.read(3 * tiles.width * tiles.height)
            tile = np.frombuffer(data, np.uint8).reshape(tiles.height, tiles.width, 3)
            y0, x0 = max(y, top), max(x, left)
            part = tile[y0 - y : top + height - y, x0 - x : left + width - x]
            pixels[y0 - top :, x0 - left :][: len(part), : part.shape[1]] = part
    return pixels
