"""Writing pictures of any size band by band: PNG, JPEG and tiled BigTIFF, each with a preview.

A writer takes bands of rows from top to bottom and holds a few megabytes, whatever the size of the
picture (JPEG excepted, see `writer`). Everything is written under a temporary name in the same
folder and renamed at the end, so a picture that is there is a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from linfusion.files import whole_files
from linfusion.files.picture_formats import (
    TILE,
    Encoder,
    Jpeg,
    Png,
    Preview,
    Tiff,
    exif_of,
    tifffile_module,
)

# Longest side by suffix, with the reason it is the longest.
_LIMITS = {
    ".png": (2**31 - 1, "PNG counts pixels with 31 bits"),
    ".jpg": (65_500, "JPEG counts pixels with 16 bits (65,535) and libjpeg stops at 65,500"),
    ".tif": (2**31 - 1, "sizes are kept to 31 bits"),
}
_LIMITS |= {".jpeg": _LIMITS[".jpg"], ".tiff": _LIMITS[".tif"]}
_EXIF_BYTES = 65_533  # what one JPEG marker holds


def writer(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    *,
    parameters: dict[str, Any],
    preview: int | None = 1024,
    quality: int = 95,
) -> PictureWriter:
    """Open a picture to be written from top to bottom, band by band.

    Use it as a context manager: leaving it finishes the file, an exception removes it. What stood
    at `path` before is replaced only at the end. Memory is 8 MB for PNG and a row of tiles
    (256 rows) for TIFF, whatever the height, and 3 MB for the preview. A JPEG is held whole,
    4 bytes a pixel (1.07 GB at 16,384²), because libjpeg through Pillow takes whole pictures.

    Args:
        path: the file; the suffix chooses the format: .png, .jpg or .jpeg, .tif or .tiff (BigTIFF,
            uncompressed tiles of 256²; needs `tifffile`).
        width, height: size in pixels.
        parameters: what the picture was made with, embedded as JSON (`read_parameters` gives it
            back): PNG text "parameters", JPEG and TIFF ImageDescription.
        preview: longest side of the area-averaged `<stem>.preview.png` beside the picture, which
            is never larger than the picture itself; None writes none.
        quality: of a JPEG, 1 to 100; colour is kept at full resolution.

    Raises:
        ValueError: unknown suffix, a size the format does not hold, a folder that is not there or
            not writable, parameters that are not JSON; before anything is written.
        ImportError: a TIFF without `tifffile`.
        OSError: the disk is full.
    """
    path = _target(path, width, height)
    if preview is not None and (not isinstance(preview, int) or preview < 1):
        raise ValueError(f"preview: {preview!r}; accepted: a side in pixels from 1 on, or None")
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"quality: {quality!r}; accepted: an int from 1 to 100")
    text = _as_json(parameters)
    if path.suffix.lower() in (".jpg", ".jpeg") and len(exif_of(text)) > _EXIF_BYTES:
        raise ValueError(
            f"parameters: {len(text):,} bytes of JSON; a JPEG holds about {_EXIF_BYTES:,}, "
            "PNG and TIFF hold any length"
        )
    return PictureWriter(path, width, height, text, preview, quality)


def bytes_needed(path: str | os.PathLike[str], width: int, height: int) -> int:
    """Most bytes that `writer(path, width, height)` can come to take on the disk, preview included.

    Exact for TIFF; for PNG and JPEG that of noise, several times what pictures take. A file that is
    replaced stays until the end, so this is needed beside it. Refuses what `writer` refuses.
    """
    return _most_bytes(_target(path, width, height), width, height)


class PictureWriter:
    """A picture being written; `writer` makes it and says what it does."""

    def __init__(
        self, path: Path, width: int, height: int, text: str, preview: int | None, quality: int
    ) -> None:
        self.path, self.width, self.height = path, width, height
        self.rows = 0  # written so far
        self._text = text
        self._preview = Preview(width, height, preview) if preview else None
        self._parts: list[whole_files.Part] = []
        whole_files.remove_leftovers(path.parent, path.name)
        with self._guard():
            file = self._open(path)
            self._encoder: Encoder
            match path.suffix.lower():
                case ".png":
                    self._encoder = Png(file, width, height, text)
                case ".tif" | ".tiff":
                    self._encoder = Tiff(file, width, height, text)
                case _:
                    self._encoder = Jpeg(file, width, height, text, quality)

    def write(self, band: np.ndarray) -> None:
        """Append a band of rows, uint8 [rows, width, 3].

        Raises:
            ValueError: another shape or dtype, or more rows than the picture has; nothing is
                written then.
            OSError: the disk is full; the unfinished picture is removed.
        """
        if not self._parts:
            raise ValueError(f"band: {self.path} is closed and takes no more rows")
        shape, dtype = getattr(band, "shape", None), getattr(band, "dtype", None)
        if shape is None or len(shape) != 3 or shape[1:] != (self.width, 3) or dtype != np.uint8:
            raise ValueError(
                f"band: {dtype} {list(shape or [])}; accepted: uint8 [rows, {self.width}, 3]"
            )
        if self.rows + len(band) > self.height:
            raise ValueError(
                f"band: {len(band)} rows after {self.rows}; the picture has {self.height}"
            )
        with self._guard():
            self._encoder.write(band)
            if self._preview:
                self._preview.write(band)
        self.rows += len(band)

    def close(self) -> None:
        """Finish the picture and its preview and give them their names. Twice does nothing more.

        Raises:
            ValueError: rows are missing; the unfinished picture is removed.
            OSError: the disk is full; likewise.
        """
        if not self._parts:
            return
        if self.rows < self.height:
            self.abort()
            raise ValueError(f"band: {self.path} got {self.rows} rows; it has {self.height}")
        with self._guard():
            self._encoder.finish()
            if self._preview:
                small = self._preview.picture
                file = self._open(self.path.with_name(f"{self.path.stem}.preview.png"))
                encoder = Png(file, small.shape[1], small.shape[0], self._text)
                encoder.write(small)
                encoder.finish()
            for part in self._parts:
                part.flush()
            # The preview comes first: when the picture is there, everything is.
            for part in reversed(self._parts):
                part.publish()
        self._parts.clear()

    def abort(self) -> None:
        """Remove what was written; whatever stood at `path` before stays as it was."""
        for part in self._parts:
            part.discard()
        self._parts.clear()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _open(self, final: Path) -> IO[bytes]:
        try:
            part = whole_files.Part(final)
        except OSError as error:
            if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # not on Windows
                raise
            raise ValueError(
                f"path: cannot write in {final.parent} ({error.strerror}); "
                "accepted: a file in a writable folder"
            ) from error
        self._parts.append(part)
        return part.file

    @contextlib.contextmanager
    def _guard(self) -> Any:
        """Whatever goes wrong while writing removes the temporary files; a full disk says so."""
        try:
            yield
        except OSError as error:
            self.abort()  # first: what it frees counts as free
            folder = self.path.parent
            message = (
                f"{self.path}: {error.strerror or error} after {self.rows:,} of {self.height:,} "
                f"rows; up to {_most_bytes(self.path, self.width, self.height):,} bytes are "
                f"needed, {shutil.disk_usage(folder).free:,} are free in {folder}"
            )
            raise OSError(error.errno or errno.EIO, message) from error
        except BaseException:
            self.abort()
            raise


def _target(path: str | os.PathLike[str], width: int, height: int) -> Path:
    """`path` as a Path, after every check that can be made before there is a picture."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _LIMITS:
        raise ValueError(f"path: suffix {suffix!r} of {path}; accepted: {', '.join(_LIMITS)}")
    longest, reason = _LIMITS[suffix]
    for name, side in (("width", width), ("height", height)):
        if not isinstance(side, int | np.integer) or isinstance(side, bool):
            raise ValueError(f"{name}: {side!r}; accepted: an int from 1 on")
        if not 1 <= side <= longest:
            raise ValueError(
                f"{name}: {side:,} pixels; a {suffix[1:]} file takes 1 to {longest:,} a side: "
                f"{reason}" + ("; .png and .tif hold more" if longest < 2**31 - 1 else "")
            )
    if not path.parent.is_dir():
        raise ValueError(f"path: {path.parent} is not a folder; accepted: a file in one")
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; accepted: a file name")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"path: cannot write in {path.parent}; accepted: a writable folder")
    if suffix in (".tif", ".tiff"):
        tifffile_module()
    return path


def _as_json(parameters: dict[str, Any]) -> str:
    """JSON in ASCII: EXIF and PNG text then hold every language, and lone surrogates too."""
    accepted = "accepted: a dict of strings, finite numbers, booleans, None, lists and dicts"
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters: {type(parameters).__name__}; {accepted}")
    try:
        return json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"parameters: {error}; {accepted}") from error


def _most_bytes(path: Path, width: int, height: int) -> int:
    match path.suffix.lower():
        case ".png":
            picture = _png_bytes(width, height)
        case ".tif" | ".tiff":
            picture = -(-width // TILE) * -(-height // TILE) * (TILE * TILE * 3 + 16)
        case _:
            # The worst noise found, black and white at quality 100, takes 4.8 bytes a pixel;
            # blocks of 8² are written whole.
            picture = 6 * (-(-width // 8) * 8) * (-(-height // 8) * 8)
    return picture + _png_bytes(1024, 1024) + 2**17  # the preview, headers, parameters


def _png_bytes(width: int, height: int) -> int:
    """Size of a PNG of noise: blocks that deflate cannot shrink are stored, 5 bytes in 16 KiB."""
    raw = (3 * width + 1) * height
    return raw + raw // 1000 + 1024
