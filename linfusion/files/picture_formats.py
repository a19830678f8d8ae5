"""PNG, JPEG and tiled BigTIFF, each encoded from bands of rows, and the preview beside them."""

from __future__ import annotations

import itertools
import struct
import zlib
from types import ModuleType
from typing import IO, Protocol

import numpy as np
from PIL import ExifTags, Image

TILE = 256  # rows and columns of a TIFF tile
SLICE = 2**20  # bytes filtered and compressed at a time


class Encoder(Protocol):
    """Takes bands of rows, uint8 [rows, width, 3], from top to bottom; `finish` ends the file."""

    def write(self, band: np.ndarray) -> None: ...

    def finish(self) -> None: ...


# pypng writes rows as well, but one Python list a row; libvips is a C library to install.
class Png:
    """PNG rows as they come: filter "average" on every row, deflate with run lengths only.

    Matching strings costs three times the time and makes the files of smooth pictures larger;
    "average" leaves 10 % less than "sub" or "up", and as little as "paeth" at a tenth of the time.
    """

    def __init__(self, file: IO[bytes], width: int, height: int, text: str) -> None:
        self.file = file
        self.above = np.zeros(3 * width, np.uint8)  # unfiltered row above the next one
        self.deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 8, zlib.Z_RLE)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))  # 8-bit RGB
        self._chunk(b"tEXt", b"parameters\0" + text.encode("ascii"))

    def write(self, band: np.ndarray) -> None:
        step = max(1, SLICE // self.above.size)
        for top in range(0, len(band), step):
            rows = band[top : top + step].reshape(-1, self.above.size)
            left = np.zeros_like(rows)
            left[:, 3:] = rows[:, :-3]
            above = np.concatenate([self.above[None], rows[:-1]])
            self.above = rows[-1].copy()  # a view would keep the whole band
            filtered = np.empty((len(rows), 1 + self.above.size), np.uint8)
            filtered[:, 0] = 3  # average
            # (left + above) // 2 without the ninth bit, and bytes subtract modulo 256 as they must
            np.subtract(rows, (left & above) + ((left ^ above) >> 1), out=filtered[:, 1:])
            if packed := self.deflate.compress(filtered.data):
                self._chunk(b"IDAT", packed)

    def finish(self) -> None:
        self._chunk(b"IDAT", self.deflate.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, name: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + name)
        self.file.write(data)
        self.file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))


class Jpeg:
    """The whole picture in memory until the end, as Pillow wants it."""

    def __init__(self, file: IO[bytes], width: int, height: int, text: str, quality: int) -> None:
        self.file, self.text, self.quality, self.row = file, text, quality, 0
        self.picture = Image.new("RGB", (width, height))

    def write(self, band: np.ndarray) -> None:
        step = max(1, SLICE // (3 * band.shape[1]))
        for top in range(0, len(band), step):
            self.picture.paste(Image.fromarray(band[top : top + step]), (0, self.row + top))
        self.row += len(band)

    def finish(self) -> None:
        self.picture.save(
            self.file, "JPEG", quality=self.quality, subsampling=0, exif=exif_of(self.text)
        )


class Tiff:
    """One page of uncompressed tiles.

    tifffile asks for tiles where a writer is handed them, so it lays out a file of zeros, which
    also claims the room on the disk before any picture is computed; the tiles then replace them.
    """

    def __init__(self, file: IO[bytes], width: int, height: int, text: str) -> None:
        self.file, self.left = file, height
        across, down = -(-width // TILE), -(-height // TILE)
        with tifffile_module().TiffWriter(file, bigtiff=True) as tiff:
            tiff.write(
                itertools.repeat(np.zeros((TILE, TILE, 3), np.uint8), across * down),
                shape=(height, width, 3),
                dtype=np.uint8,
                photometric="rgb",
                tile=(TILE, TILE),
                description=text,
                metadata=None,
                software="linfusion",
            )
        file.seek(0)
        with tifffile_module().TiffFile(file) as tiff:
            offset = tiff.pages[0].dataoffsets[0]  # the others follow without gaps
        file.seek(offset)
        self.tiles = np.zeros((TILE, across, TILE, 3), np.uint8)
        self.rows = self.tiles.reshape(TILE, across * TILE, 3)[:, :width]  # the same memory
        self.filled = 0

    def write(self, band: np.ndarray) -> None:
        while len(band):
            taken = min(len(band), TILE - self.filled)
            self.rows[self.filled : self.filled + taken] = band[:taken]
            self.filled, self.left, band = self.filled + taken, self.left - taken, band[taken:]
            if self.filled == TILE or self.left == 0:
                self.tiles[self.filled :] = 0  # rows below the picture
                for x in range(self.tiles.shape[1]):
                    self.file.write(self.tiles[:, x].tobytes())
                self.filled = 0

    def finish(self) -> None:
        self.file.flush()


# Pillow's `reduce` takes whole factors alone, so its previews would depend on how bands are cut.
class Preview:
    """Exact box averages of a picture that comes by in bands: each pixel the mean of its area.

    Row y covers [y·h, (y+1)·h) and row i of the preview [i·H, (i+1)·H) on a common scale, so every
    overlap is a whole number; sums are exact in int64 and do not depend on how bands are cut.
    """

    def __init__(self, width: int, height: int, side: int) -> None:
        scale = min(1.0, side / max(width, height))
        self.size = max(1, round(height * scale)), max(1, round(width * scale))
        self.width, self.height, self.y = width, height, 0
        self.sum = np.zeros((width, 3), np.int64)  # of the preview row under way
        self.picture = np.zeros((*self.size, 3), np.uint8)
        self.done = 0  # its rows that are finished

    def write(self, band: np.ndarray) -> None:
        """Take the next rows, uint8 [rows, width, 3]."""
        for row in band:
            start, stop = self.y * self.size[0], (self.y + 1) * self.size[0]
            edge = (self.done + 1) * self.height
            if stop < edge:
                self.sum += np.multiply(row, stop - start, dtype=np.int64)
            else:  # at most one edge falls in a row: a preview is never the larger
                self.sum += np.multiply(row, edge - start, dtype=np.int64)
                self.picture[self.done] = self._across()
                self.done += 1
                self.sum = np.multiply(row, stop - edge, dtype=np.int64)
            self.y += 1

    def _across(self) -> np.ndarray:
        """The row under way averaged from `width` columns to those of the preview."""
        until = np.zeros((self.width + 1, 3), np.int64)
        np.cumsum(self.sum, axis=0, out=until[1:])
        column, part = np.divmod(np.arange(self.size[1] + 1) * self.width, self.size[1])
        inside = self.sum[np.minimum(column, self.width - 1)] * part[:, None]
        total = np.diff(until[column] * self.size[1] + inside, axis=0)
        area = self.width * self.height
        return ((total + area // 2) // area).astype(np.uint8)


def tifffile_module() -> ModuleType:
    """tifffile.

    Raises:
        ImportError: it is missing; the message names the extra.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            'writing a TIFF needs tifffile: pip install "linfusion[highres]"'
        ) from error
    return tifffile


def exif_of(text: str) -> bytes:
    """EXIF data with a description."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    return exif.tobytes()
