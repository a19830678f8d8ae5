"""The animated emoji as clips, on animations made here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "examples" / "zoo"


@pytest.fixture
def clips(monkeypatch, tmp_path):
    """The script, with a cache of its own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield importlib.import_module("clips")
    for name in ("clips", "data"):
        sys.modules.pop(name, None)


def grey(value: int, alpha: int = 255) -> Image.Image:
    return Image.new("RGBA", (8, 8), (value, value, value, alpha))


def animate(path: Path, frames: list[Image.Image]) -> Path:
    path.parent.mkdir(exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=42, lossless=True)
    return path


@pytest.fixture
def folder(tmp_path):
    """A heart and a rat that move, a tiger that stands still, a flag that moves."""
    folder = tmp_path / "emoji"
    animate(folder / "2764-fe0f.webp", [grey(10 * i) for i in range(12)])
    animate(folder / "1f400.webp", [grey(200 - 10 * i) for i in range(7)])
    animate(folder / "1f405.webp", [grey(0)])
    animate(folder / "1f1e6-1f1e8.webp", [grey(0), grey(9)])
    return folder


def test_what_moves_and_has_a_name_is_taken(clips, folder):
    items = clips.animations(folder)
    assert [(item.file.name, item.captions[0]) for item in items] == [
        ("1f400.webp", "rat"),
        ("2764-fe0f.webp", "red heart"),
    ]


@pytest.mark.parametrize(
    "frames, rat",
    [(7, range(7)), (3, [0, 2, 4]), (10, [0, 0, 1, 2, 2, 3, 4, 4, 5, 6]), (1, [0])],
)
def test_frames_are_evenly_spaced_over_the_loop(clips, folder, frames, rat):
    found = clips.load_clips(clips.animations(folder), 4, frames)
    assert found.shape == (2, frames, 4, 4, 3) and found.dtype == np.uint8
    expected = np.array([200 - 10 * i for i in rat])[:, None, None, None]
    assert (found[0] == expected).all()


def test_frames_lie_over_white(clips, tmp_path):
    path = animate(tmp_path / "emoji" / "1f400.webp", [grey(0, 255), grey(0, 0)])
    found = clips.load_clips(clips.animations(path.parent), 8, 2)
    assert (found[0, 0] == 0).all() and (found[0, 1] == 255).all()


def test_clips_are_decoded_once(clips, folder, monkeypatch):
    items = clips.animations(folder)
    first = np.array(clips.load_clips(items, 4, 3))
    with monkeypatch.context() as patch:
        patch.setattr(clips, "_decode", None)
        assert np.array_equal(clips.load_clips(items, 4, 3), first)
    # other sizes, frames and items are other files
    assert clips.load_clips(items, 5, 3).shape == (2, 3, 5, 5, 3)
    assert clips.load_clips(items, 4, 2).shape == (2, 2, 4, 4, 3)
    assert np.array_equal(clips.load_clips(items[1:], 4, 3), first[1:])


def test_a_decoding_that_broke_off_is_made_again(clips, folder, monkeypatch):
    items = clips.animations(folder)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(clips, "_decode", None)
        clips.load_clips(items, 4, 2)
    assert (clips.load_clips(items, 4, 2)[1, 1] == 60).all()


def test_a_folder_without_animations_is_refused(clips, tmp_path):
    animate(tmp_path / "emoji" / "1f405.webp", [grey(0)])
    with pytest.raises(ValueError, match=r"^folder: expected animated \.webp files"):
        clips.animations(tmp_path / "emoji")
