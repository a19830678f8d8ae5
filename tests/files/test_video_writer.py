"""Videos written frame by frame and read back: whole where they can be, playable where killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from linfusion.files.picture_reader import read
from linfusion.files.video_writer import open_video

NAMES = ["a.mp4", "a.webp", "a.gif", "a"]


def patches(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """Flat patches of 16² of other colours in every frame: what lossy video keeps."""
    g = np.random.default_rng(seed)
    grid = g.integers(30, 226, (frames, -(-height // 16), -(-width // 16), 3), np.uint8)
    return grid.repeat(16, 1).repeat(16, 2)[:, :height, :width]


def save(path: Path, frames: np.ndarray, cuts: tuple[int, ...] = (), fps=10, **options) -> Path:
    with open_video(path, fps, (frames.shape[2], frames.shape[1]), **options) as video:
        for part in np.split(frames, cuts):
            video.write(part)
    return path


def load(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([read(file) for file in sorted(path.iterdir())])
    if path.suffix == ".mp4":
        with av.open(str(path)) as file:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    with Image.open(path) as image:
        found = []
        for i in range(image.n_frames):
            image.seek(i)
            found.append(np.asarray(image.convert("RGB")))
    return np.stack(found)


def durations(path: Path) -> list[int]:
    with Image.open(path) as image:
        found = []
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            found.append(image.info["duration"])
    return found


# Round trips


def test_png_frames_are_read_bit_for_bit(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 7, 5, 3), np.uint8)
    assert np.array_equal(load(save(tmp_path / "a", frames)), frames)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
    ]


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif"])
def test_every_frame_comes_back_in_its_place_and_colour(tmp_path, name):
    frames = patches(25)
    found = load(save(tmp_path / name, frames, cuts=(1, 9)))
    assert found.shape == frames.shape
    # another frame of these: about 60
    assert np.abs(found.astype(int) - frames).mean() < 4


@pytest.mark.parametrize("name", NAMES)
def test_how_frames_are_cut_changes_nothing(tmp_path, name):
    frames = patches(12)
    whole = load(save(tmp_path / f"whole{name}", frames))
    cut = load(save(tmp_path / f"cut{name}", frames, cuts=(1, 1, 5, 11)))
    assert np.array_equal(whole, cut)


def test_frames_that_are_views_are_written_as_they_look(tmp_path):
    frames = patches(4, 64, 96)[::-1, ::-2, ::-2]
    assert np.array_equal(load(save(tmp_path / "a", frames)), frames)
    found = load(save(tmp_path / "a.mp4", frames))
    assert np.abs(found.astype(int) - frames).mean() < 8  # upside down: about 60


def test_a_buffer_that_is_used_again_does_not_change_what_was_written(tmp_path):
    frames = patches(3)
    with open_video(tmp_path / "a.webp", 10, (48, 32)) as video:
        for frame in frames:
            buffer = frame[None].copy()
            video.write(buffer)
            buffer[:] = 0
    assert np.abs(load(tmp_path / "a.webp").astype(int) - frames).mean() < 4


# Time


@pytest.mark.parametrize("fps", [10, 16, 23.976, Fraction(30000, 1001)])
def test_an_mp4_starts_at_zero_and_keeps_its_rate(tmp_path, fps):
    path = save(tmp_path / "a.mp4", patches(20), fps=fps)
    with av.open(str(path)) as file:
        times = [frame.time for frame in file.decode(video=0)]
    assert times == pytest.approx([i / float(fps) for i in range(20)], abs=1e-4)


@pytest.mark.parametrize("name, tick", [("a.webp", 1), ("a.gif", 10)])
def test_rounded_durations_add_up(tmp_path, name, tick):
    found = durations(save(tmp_path / name, patches(24), fps=16))
    assert len(found) == 24 and max(found) - min(found) == tick
    assert sum(found) == pytest.approx(1500, abs=tick / 2)


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_animations_loop_for_ever(tmp_path, name):
    with Image.open(save(tmp_path / name, patches(2))) as image:
        assert image.info["loop"] == 0


# Odd sizes


@pytest.mark.parametrize("height, width", [(31, 48), (32, 47), (31, 47)])
def test_an_odd_mp4_repeats_its_edge_and_says_so(tmp_path, height, width):
    frames = patches(3, height, width)
    with pytest.warns(UserWarning, match=rf"size: {width} × {height} is odd.*48 × 32") as caught:
        save(tmp_path / "a.mp4", frames)
    assert caught[0].filename == __file__
    found = load(tmp_path / "a.mp4").astype(int)
    assert found.shape == (3, 32, 48, 3)
    padded = np.pad(frames, [(0, 0), (0, 32 - height), (0, 48 - width), (0, 0)], "edge")
    assert np.abs(found - padded).mean() < 4


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a"])
def test_other_formats_take_odd_sizes(tmp_path, name):
    assert load(save(tmp_path / name, patches(2, 31, 47))).shape == (2, 31, 47, 3)


# Ended early


def test_a_killed_run_leaves_an_mp4_that_plays(tmp_path):
    code = (
        "import os, signal, sys, numpy as np\n"
        "from linfusion.files.video_writer import open_video\n"
        "video = open_video(sys.argv[1], 10, (64, 64))\n"
        "for i in range(100):\n"
        "    video.write(np.full((1, 64, 64, 3), 2 * i, np.uint8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "a.mp4"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    found = load(path)[:, 32, 32, 0].astype(int)
    assert 70 <= len(found) <= 100  # two seconds of 10, and one fragment that is being filled
    assert np.abs(found - 2 * np.arange(len(found))).max() <= 3


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_an_exception_keeps_every_frame_that_was_written(tmp_path, name):
    frames = patches(7)
    with (
        pytest.raises(KeyboardInterrupt),
        open_video(tmp_path / name, 10, (48, 32)) as video,
    ):
        video.write(frames)
        raise KeyboardInterrupt
    assert np.abs(load(tmp_path / name).astype(int) - frames).mean() < 4


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_an_exception_leaves_the_animation_that_stood_there(tmp_path, name):
    before = save(tmp_path / name, patches(2)).read_bytes()
    with (
        pytest.raises(KeyboardInterrupt),
        open_video(tmp_path / name, 10, (48, 32)) as video,
    ):
        video.write(patches(3, seed=1))
        raise KeyboardInterrupt
    assert (tmp_path / name).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_an_animation_that_fails_to_be_written_leaves_nothing(tmp_path, name, monkeypatch):
    video = open_video(tmp_path / name, 10, (48, 32))
    video.write(patches(2))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        video.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_video_without_frames_leaves_nothing(tmp_path, name, end):
    video = open_video(tmp_path / name, 10, (48, 32))
    if end == "abort":
        video.abort()
    else:
        with pytest.raises(ValueError, match=r"^frames: .* got none; accepted: 1 or more"):
            video.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_video_takes_no_more_frames(tmp_path, name):
    video = open_video(tmp_path / name, 10, (48, 32))
    video.write(patches(2))
    video.close()
    video.close()
    with pytest.raises(ValueError, match=r"^frames: .*closed"):
        video.write(patches(1))
    assert len(load(tmp_path / name)) == 2


# Memory


def test_png_frames_are_not_kept(tmp_path):
    frame = patches(1, 512, 512)
    with open_video(tmp_path / "a", 10, (512, 512)) as video:
        video.write(frame)
        tracemalloc.start(20)
        for _ in range(30):
            video.write(frame)
        every = tracemalloc.take_snapshot()  # of every thread, whatever runs in it
        tracemalloc.stop()
    ours = every.filter_traces([tracemalloc.Filter(True, "*/video_writers.py", all_frames=True)])
    held = sum(trace.size for trace in ours.traces)
    assert held < frame.nbytes  # kept, it would be 30


def test_mp4_frames_are_not_kept(tmp_path):
    frame = patches(1, 256, 256)
    process = psutil.Process()
    with open_video(tmp_path / "a.mp4", 10, (256, 256)) as video:
        for _ in range(100):
            video.write(frame)
        before = process.memory_info().rss
        for _ in range(400):
            video.write(frame)
        grown = process.memory_info().rss - before
    assert grown < 100 * frame.nbytes  # kept, it would be 400


# Refused before any work


@pytest.mark.parametrize("name", ["a.avi", "a.mp4.gz", "a.mkv"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^path: suffix .*accepted: \.mp4, \.webp, \.gif"):
        open_video(tmp_path / name, 10, (48, 32))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^path: .*none is not a folder"):
        open_video(tmp_path / "none" / name, 10, (48, 32))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_takes_no_files_is_refused(tmp_path, name):
    if Path("/proc").is_dir():  # even root cannot write there
        folder = Path("/proc")
    else:
        folder = tmp_path
        folder.chmod(0o500)
    with pytest.raises(ValueError, match=r"^path: cannot write in "):
        open_video(folder / name, 10, (48, 32))


def test_a_folder_in_the_way_is_refused(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ValueError, match=r"^path: .*a\.mp4 is a folder"):
        open_video(tmp_path / "a.mp4", 10, (48, 32))


def test_a_folder_with_other_frames_is_refused(tmp_path):
    save(tmp_path / "a", patches(2))
    with pytest.raises(ValueError, match=r"^path: .*a is there; accepted: .*new or empty"):
        open_video(tmp_path / "a", 10, (48, 32))
    assert len(load(tmp_path / "a")) == 2


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "10", True, None])
def test_a_rate_that_is_none_is_refused(tmp_path, fps):
    with pytest.raises(ValueError, match=r"^fps: "):
        open_video(tmp_path / "a.mp4", fps, (48, 32))


def test_a_rate_that_the_format_does_not_hold_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"^fps: 60; a gif takes at most 50: GIF counts"):
        open_video(tmp_path / "a.gif", 60, (48, 32))


@pytest.mark.parametrize("size", [(0, 32), (48,), 48, (48.0, 32), (True, 32), None])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=r"^size: .*accepted: \(width, height\)"):
        open_video(tmp_path / "a.webp", 10, size)


@pytest.mark.parametrize("codec", ["nonsense", "aac", "gif"])
def test_a_codec_that_does_not_serve_is_refused(tmp_path, codec):
    with pytest.raises(ValueError, match=rf"^codec: '{codec}' .*accepted: libx264"):
        open_video(tmp_path / "a.mp4", 10, (48, 32), codec=codec)
    assert list(tmp_path.iterdir()) == []


def test_a_codec_where_there_is_no_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^codec: 'libx264' for .*only an \.mp4"):
        open_video(tmp_path / "a.gif", 10, (48, 32), codec="libx264")


def test_another_codec_is_taken(tmp_path):
    with av.open(str(save(tmp_path / "a.mp4", patches(4), codec="mpeg4"))) as file:
        assert file.streams.video[0].codec_context.name == "mpeg4"


def test_an_mp4_without_pyav_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"linfusion\[video\]"):
        open_video(tmp_path / "a.mp4", 10, (48, 32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 48, 32, 3), np.uint8),
        np.zeros((2, 32, 48, 3)),
        np.zeros((32, 48, 3), np.uint8),
        [[1]],
    ],
)
def test_frames_of_another_kind_are_refused_and_change_nothing(tmp_path, name, frames):
    with open_video(tmp_path / name, 10, (48, 32)) as video:
        with pytest.raises(ValueError, match=r"^frames: .*accepted: uint8 \[f, 32, 48, 3\]"):
            video.write(frames)
        video.write(patches(2))
    assert len(load(tmp_path / name)) == 2
