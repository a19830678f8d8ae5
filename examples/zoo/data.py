"""The Fluent emoji with their names: 1,623 pictures, flags and skin-tone copies left out.

The pictures are the npm package `@lobehub/fluent-emoji-3d` (MIT), the captions come from the
PyPI package `emoji`.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
import torch
from PIL import Image

PACKAGE = "@lobehub/fluent-emoji-3d"
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)


@dataclass(frozen=True)
class Emoji:
    """One picture: its file and every English caption it goes by, the main one first."""

    file: Path
    captions: tuple[str, ...]


def pictures(folder: str | Path | None = None) -> list[Emoji]:
    """The captioned emoji of `folder`, or of the npm package, fetched once into ~/.cache."""
    folder = Path(folder) if folder else fetch()
    files = sorted(folder.rglob("*.webp"))
    if not files:
        raise ValueError(f"folder: expected the .webp files of {PACKAGE}, found none in {folder}")
    return [Emoji(file, names) for file in files if (names := captions(file.stem))]


def fetch(package: str = PACKAGE) -> Path:
    """Download and unpack an npm package with `npm pack`; returns its folder."""
    cache = Path.home() / ".cache" / "linfusion"
    target = cache / package.rpartition("/")[2]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            subprocess.run(["npm", "pack", "--silent", package], cwd=tmp, check=True)
            with tarfile.open(next(Path(tmp).glob("*.tgz"))) as tar:
                tar.extractall(tmp, filter="data")
            (Path(tmp) / "package" / "assets").rename(target)
    return target


def captions(stem: str) -> tuple[str, ...]:
    """English names of the emoji whose code points `stem` lists; none for flags and skin tones."""
    try:
        points = [int(part, 16) for part in stem.split("-")]
        text = "".join(map(chr, points))
    except (ValueError, OverflowError):
        return ()
    if any(p in SKIN_TONES or p in REGIONAL_INDICATORS or p >= 0xE0000 for p in points):
        return ()
    for form in (text, text + "\ufe0f", text.replace("\ufe0f", "")):
        if form in emoji.EMOJI_DATA:
            entry = emoji.EMOJI_DATA[form]
            names = [entry["en"], *entry.get("alias", [])]
            words = (re.sub(r"[_:\-\s]+", " ", name.strip(":")).strip().lower() for name in names)
            return tuple(dict.fromkeys(word for word in words if word))
    return ()


def load_pixels(items: list[Emoji], size: int) -> torch.Tensor:
    """Pictures over white as uint8 [n, 3, size, size]."""
    out = np.empty((len(items), size, size, 3), np.uint8)
    for i, item in enumerate(items):
        with Image.open(item.file) as im:
            out[i] = over_white(im, size)
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def over_white(image: Image.Image, size: int) -> Image.Image:
    """A picture, or the frame where an animation stands, over white and `size` pixels a side."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
