"""The animated Fluent emoji with their names, as clips of a few frames.

The animations are the npm packages `@lobehub/fluent-emoji-anim-1` to `-4` (MIT, 170 MB each), most
of them loops of 72 frames; the captions come from the PyPI package `emoji`, as in `data`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import data
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

PACKAGES = tuple(f"@lobehub/fluent-emoji-anim-{i}" for i in range(1, 5))


def animations(
    folder: str | Path | None = None, packages: Sequence[str] = PACKAGES
) -> list[data.Emoji]:
    """The captioned emoji that move, of `folder` or of the npm packages, fetched into ~/.cache.

    Emoji that stand still are in the packages too, and are left out.
    """
    folders = [Path(folder)] if folder else [data.fetch(package) for package in packages]
    files = sorted(file for f in folders for file in f.rglob("*.webp"))
    items = [data.Emoji(file, names) for file in files if (names := data.captions(file.stem))]
    items = [item for item in items if _length(item.file) > 1]
    if not items:
        raise ValueError(
            f"folder: expected animated .webp files of {packages[0]}, found none in "
            f"{', '.join(map(str, folders))}"
        )
    return items


def load_clips(items: list[data.Emoji], size: int, frames: int) -> np.ndarray:
    """Evenly spaced frames of each loop over white, uint8 [n, frames, size, size, 3].

    Decoded once: the array is a read-only map of a file in ~/.cache/linfusion, which is made anew
    for other items, another size or another number of frames. Of a loop of n frames they are
    number 0, n / frames, 2 n / frames ..., rounded down, so that the clip is a loop as well; of a
    loop shorter than `frames` some come twice.
    """
    parts = [(item.file.name, item.file.stat().st_size) for item in items]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    cache = Path.home() / ".cache" / "linfusion"
    path = cache / f"clips-{size}px-{frames}-{digest}.npy"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        shape = (len(items), frames, size, size, 3)
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        for clip, item in zip(out, tqdm(items, "decoding"), strict=True):
            clip[:] = _decode(item.file, size, frames)
        out.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def _length(file: Path) -> int:
    with Image.open(file) as image:
        return getattr(image, "n_frames", 1)


def _decode(file: Path, size: int, frames: int) -> np.ndarray:
    clip = np.empty((frames, size, size, 3), np.uint8)
    with Image.open(file) as image:
        for i in range(frames):
            image.seek(i * image.n_frames // frames)
            clip[i] = data.over_white(image, size)
    return clip
