"""Writing videos frame by frame: fragmented MP4, animated WebP and GIF, a folder of PNG frames.

Memory does not grow with the number of frames for MP4 and PNG. WebP and GIF are held whole until
the end, 3 bytes a pixel and frame, because Pillow takes whole animations.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import warnings
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from linfusion.files import whole_files
from linfusion.files.picture_writer import writer

CODEC = "libx264"
CRF = 18  # of x264 and x265: hardly told from the original

# Most frames a second by suffix, with the reason.
_FASTEST = {
    ".mp4": (1000, "players do not go beyond"),
    ".webp": (1000, "WebP counts milliseconds"),
    ".gif": (50, "GIF counts hundredths of a second, and viewers slow down where one is short"),
    "": (math.inf, ""),
}


def open_video(
    path: str | os.PathLike[str],
    fps: float | Fraction,
    size: tuple[int, int],
    *,
    codec: str | None = None,
) -> VideoWriter:
    """Open a video to be written a few frames at a time; the suffix of `path` chooses the format.

    Use it as a context manager: leaving it finishes the video.

    - .mp4 (needs PyAV) is fragmented and grows in place under its own name, which is its point:
      whenever the process ends, be it killed, the file plays up to the last two seconds or so. The
      first frame replaces what stood there. An exception finishes the file, so that what was
      written can be seen. Colour is kept at half resolution (yuv420p, BT.709); of an odd width or
      height the last column or row is repeated to make it even, with a warning.
    - .webp and .gif loop for ever. They are written at the end under a temporary name and renamed:
      a file that is there is a whole one, and an exception leaves what stood there before.
    - no suffix: a folder, new or empty, of `000000.png` and so on. Every frame there is a whole
      one, and stays if an exception comes.

    Args:
        path: the file, or the folder.
        fps: frames a second, at most 50 for GIF; a folder of PNG frames does not record it.
        size: (width, height) in pixels.
        codec: of an MP4, as FFmpeg calls its encoder; None is libx264.

    Raises:
        ValueError: unknown suffix, fps or size out of range, a folder that is not there or not
            writable or not empty, a codec that this PyAV does not have or MP4 does not hold;
            before anything is written.
        ImportError: an MP4 without PyAV (extra `video`).
    """
    (path, rate), (width, height) = check_video(path, fps, codec), _size(size)
    suffix = path.suffix.lower()
    encoder: _Encoder
    match suffix:
        case ".mp4":
            encoder = _Mp4(path, rate, width, height, codec or CODEC)
        case "":
            encoder = _Frames(path, width, height)
        case _:
            encoder = _Animation(path, rate)
    return VideoWriter(path, width, height, encoder)


def check_video(
    path: str | os.PathLike[str], fps: float | Fraction, codec: str | None = None
) -> tuple[Path, Fraction]:
    """The path and the rate of a video that `open_video` would write; it refuses what that does."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _FASTEST:
        accepted = ", ".join(filter(None, _FASTEST))
        raise ValueError(
            f"path: suffix {suffix!r} of {path}; accepted: {accepted}, or none for a folder"
        )
    rate = _rate(fps, suffix)
    if codec is not None and suffix != ".mp4":
        raise ValueError(f"codec: {codec!r} for {path}; accepted: only an .mp4 has a choice")
    _check_place(path, folder=not suffix)
    if suffix == ".mp4":
        _check_codec(pyav(), codec or CODEC)
    return path, rate


class VideoWriter:
    """A video being written; `open_video` makes it and says what it does."""

    def __init__(self, path: Path, width: int, height: int, encoder: _Encoder) -> None:
        self.path, self.width, self.height = path, width, height
        self.frames = 0  # written so far
        self._encoder: _Encoder | None = encoder

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [f, H, W, 3].

        Raises:
            ValueError: another shape or dtype, or the video is closed; nothing is written then.
            OSError: the disk is full.
        """
        if self._encoder is None:
            raise ValueError(f"frames: {self.path} is closed and takes no more frames")
        shape, dtype = getattr(frames, "shape", None), getattr(frames, "dtype", None)
        expected = (self.height, self.width, 3)
        if shape is None or len(shape) != 4 or shape[1:] != expected or dtype != np.uint8:
            raise ValueError(
                f"frames: {dtype} {list(shape or [])}; "
                f"accepted: uint8 [f, {self.height}, {self.width}, 3]"
            )
        for frame in frames:
            self._encoder.write(frame)
            self.frames += 1

    def close(self) -> None:
        """Finish the video. Twice does nothing more.

        Raises:
            ValueError: not one frame was written; no file is left then.
            OSError: the disk is full.
        """
        encoder, self._encoder = self._encoder, None
        if encoder is None:
            return
        if not self.frames:
            encoder.abort(empty=True)
            raise ValueError(f"frames: {self.path} got none; accepted: 1 or more")
        encoder.finish()

    def abort(self) -> None:
        """Stop where an exception came; see `open_video` for what stays."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.abort(empty=not self.frames)

    def __enter__(self) -> VideoWriter:
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


def _rate(fps: float | Fraction, suffix: str) -> Fraction:
    fastest, reason = _FASTEST[suffix]
    number = isinstance(fps, int | float | Fraction) and not isinstance(fps, bool)
    if not number or not 0 < fps < math.inf:
        raise ValueError(f"fps: {fps!r}; accepted: a number of frames a second above 0")
    if fps > fastest:
        raise ValueError(f"fps: {fps}; a {suffix[1:]} takes at most {fastest}: {reason}")
    return Fraction(fps).limit_denominator(1001)  # 30000/1001 and its like are exact


def _size(size: tuple[int, int]) -> tuple[int, int]:
    accepted = "accepted: (width, height), two ints from 1 on"
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size: {size!r}; {accepted}")
    for side in size:
        if not isinstance(side, int | np.integer) or isinstance(side, bool) or side < 1:
            raise ValueError(f"size: {size!r}; {accepted}")
    return int(size[0]), int(size[1])


def _check_place(path: Path, folder: bool) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"path: {path.parent} is not a folder; accepted: a name in one")
    if folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"path: {path} is there; accepted: a folder that is new or empty")
    if not folder and path.is_dir():
        raise ValueError(f"path: {path} is a folder; accepted: a file name")
    home = path if folder and path.is_dir() else path.parent
    try:
        whole_files.Part(home / path.name).discard()  # access() says yes to root everywhere
    except OSError as error:
        raise ValueError(
            f"path: cannot write in {home} ({error.strerror}); accepted: a writable folder"
        ) from error


class _Encoder(Protocol):
    def write(self, frame: np.ndarray) -> None: ...

    def finish(self) -> None: ...

    def abort(self, empty: bool) -> None: ...


class _Mp4:
    """A fragment a second, each written out as soon as it is encoded."""

    def __init__(self, path: Path, rate: Fraction, width: int, height: int, codec: str) -> None:
        self.av = pyav()
        self.odd = (height % 2, width % 2)
        if any(self.odd):
            warnings.warn(
                f"size: {width} × {height} is odd and an .mp4 keeps colour at half resolution: "
                f"the last column or row is repeated to {width + width % 2} × "
                f"{height + height % 2}",
                UserWarning,
                stacklevel=3,
            )
        self.path, self.index, self.rate = path, 0, rate
        self.lock = whole_files.Lock(path, "path")  # it grows in place
        second = max(1, round(rate))
        self.file = self.av.open(
            str(path),
            "w",
            options={"movflags": "frag_keyframe+empty_moov", "flush_packets": "1"},
        )
        # The encoder holds what it looks ahead: no more than the fragment it is to fill.
        self.stream = self.file.add_stream(
            codec, rate=rate, options={"crf": str(CRF), "rc-lookahead": str(min(second, 40))}
        )
        self.stream.width, self.stream.height = width + width % 2, height + height % 2
        self.stream.pix_fmt = "yuv420p"
        context = self.stream.codec_context
        context.gop_size = second
        context.max_b_frames = 0  # they would shift the start by two frames
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # 16 to 235

    def write(self, frame: np.ndarray) -> None:
        if any(self.odd):
            frame = np.pad(frame, ((0, self.odd[0]), (0, self.odd[1]), (0, 0)), mode="edge")
        picture = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
        picture.pts, picture.time_base = self.index, 1 / self.rate
        self.file.mux(self.stream.encode(picture))
        self.index += 1

    def finish(self) -> None:
        try:
            self.file.mux(self.stream.encode(None))
        finally:
            self.file.close()
            self.lock.release()

    def abort(self, empty: bool) -> None:
        if empty:
            self.file.close()  # FFmpeg makes the file with the first frame
            self.lock.release()
        else:
            self.finish()


class _Frames:
    def __init__(self, path: Path, width: int, height: int) -> None:
        self.path, self.width, self.height, self.index = path, width, height, 0
        path.mkdir(exist_ok=True)
        self.lock = whole_files.Lock(path, "path")

    def write(self, frame: np.ndarray) -> None:
        name = self.path / f"{self.index:06d}.png"
        with writer(name, self.width, self.height, parameters={}, preview=None) as out:
            out.write(frame)
        self.index += 1

    def finish(self) -> None:
        self.lock.release()

    def abort(self, empty: bool) -> None:
        self.lock.release()
        if empty:
            self.path.rmdir()


class _Animation:
    """WebP or GIF, whole in memory until the end, as Pillow wants it."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate = path, rate
        self.pictures: list[Image.Image] = []

    def write(self, frame: np.ndarray) -> None:
        self.pictures.append(Image.fromarray(frame.copy()))

    def finish(self) -> None:
        kind = self.path.suffix.lower()[1:]
        # Rounded where a frame ends, not how long it stays: the whole keeps its length.
        tick = 10 if kind == "gif" else 1
        ends = [round(i * 1000 / self.rate / tick) * tick for i in range(len(self.pictures) + 1)]
        durations = [b - a for a, b in itertools.pairwise(ends)]
        options: dict[str, Any] = {"quality": 90} if kind == "webp" else {"optimize": False}
        first, *others = self.pictures
        whole_files.remove_leftovers(self.path.parent, self.path.name)
        with whole_files.writing(self.path) as file:
            first.save(
                file,
                format=kind,
                save_all=True,
                append_images=others,
                duration=durations,
                loop=0,
                **options,
            )

    def abort(self, empty: bool) -> None:
        self.pictures.clear()


def pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'videos are read and written with PyAV: pip install "linfusion[video]"'
        ) from error
    return av


def _check_codec(av: ModuleType, name: str) -> None:
    try:
        codec = av.codec.Codec(name, "w")
        fits = "yuv420p" in [f.name for f in codec.video_formats or []]
        if fits:
            with av.open(io.BytesIO(), "w", format="mp4") as trial:
                trial.add_stream(name, rate=1)
    except (ValueError, av.FFmpegError) as error:
        raise ValueError(
            f"codec: {name!r} is not one that this PyAV has and an MP4 holds ({error}); "
            f"accepted: {CODEC}, mpeg4 and the like"
        ) from error
    if not fits:
        raise ValueError(f"codec: {name!r} does not take yuv420p; accepted: {CODEC}, mpeg4")
