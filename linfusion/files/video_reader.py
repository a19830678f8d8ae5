"""Reading videos: frame by frame, or whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from linfusion.files.picture_reader import frame_pixels, open_picture
from linfusion.files.video_writer import pyav

# What Pillow reads; every other file is one of FFmpeg's.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".apng")


def read_video(path: str | os.PathLike[str], last: int | None = None) -> np.ndarray:
    """Frames of a video, uint8 [F, H, W, 3].

    Args:
        path: what `open_video` writes, or any other file that FFmpeg reads; of a folder, the .png
            frames in the order of their names.
        last: only so many at the end; the others are read one by one and dropped.

    Raises:
        ValueError: there is none, or it holds no frames, or cannot be read.
        ImportError: a file of FFmpeg's without PyAV (extra `video`).
    """
    kept: list[np.ndarray] = []
    for frame in frames(path):
        kept.append(frame)
        if last is not None and len(kept) > last:
            del kept[0]
    if not kept:
        raise ValueError(f"video: {os.fspath(path)!r} holds no frames")
    return np.stack(kept)


def frames(path: str | os.PathLike[str], argument: str = "video") -> Iterator[np.ndarray]:
    """Frames of a video or picture one by one, uint8 [H, W, 3]; what is transparent is on white.

    Args:
        path: as of `read_video`, or a picture.
        argument: what errors call it.

    Raises:
        ValueError, ImportError: as `read_video`.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{argument}: there is no file {str(path)!r}")
    if path.is_dir():
        for file in sorted(path.glob("*.png")):
            yield open_picture(file)
        return
    if path.suffix.lower() not in PICTURES:
        av = pyav()
        try:
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, IndexError) as error:
            raise _unreadable(argument, path, error) from error
        return
    if count_frames(path, argument) == 1:
        yield open_picture(path)
        return
    try:
        with Image.open(path) as image:
            for picture in ImageSequence.Iterator(image):
                yield frame_pixels(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(argument, path, error) from error


def count_frames(path: str | os.PathLike[str], argument: str = "video") -> int:
    """How many there are, from the head of the file where it says so.

    Raises:
        ValueError, ImportError: as `read_video`.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURES:
        try:
            with Image.open(path) as image:
                return int(getattr(image, "n_frames", 1))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise _unreadable(argument, path, error) from error
    av = pyav()
    try:
        with av.open(str(path)) as container:
            known = container.streams.video[0].frames
    except (av.FFmpegError, IndexError) as error:
        raise _unreadable(argument, path, error) from error
    return known or sum(1 for _ in frames(path, argument))


def _unreadable(argument: str, path: Path, error: Exception) -> ValueError:
    return ValueError(f"{argument}: cannot read {str(path)!r} ({error})")
