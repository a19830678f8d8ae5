"""Reading videos whole: what a clip goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from linfusion.files.video_writer import pyav

_PILLOW = (".gif", ".webp", ".png", ".apng")


def read_video(path: str | os.PathLike[str], last: int | None = None) -> np.ndarray:
    """Frames of a video, uint8 [F, H, W, 3].

    Args:
        path: what `open_video` writes, or any other file that FFmpeg reads; of a folder, the .png
            frames in the order of their names.
        last: only so many at the end; the others are read one by one and dropped.

    Raises:
        ValueError: there is none, or it holds no frames.
        ImportError: a file of FFmpeg's without PyAV (extra `video`).
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"video: there is no file {str(path)!r}")
    kept: list[np.ndarray] = []
    for frame in _frames(path):
        kept.append(frame)
        if last is not None and len(kept) > last:
            del kept[0]
    if not kept:
        raise ValueError(f"video: {str(path)!r} holds no frames")
    return np.stack(kept)


def _frames(path: Path) -> Iterator[np.ndarray]:
    if path.is_dir():
        for file in sorted(path.glob("*.png")):
            with Image.open(file) as image:
                yield np.asarray(image.convert("RGB"))
    elif path.suffix.lower() in _PILLOW:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield np.asarray(frame.convert("RGB"))
    else:
        av = pyav()
        try:
            with av.open(str(path)) as file:
                for frame in file.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"video: cannot read {str(path)!r} ({error})") from error
