"""Where pictures and captions come from: image folders and `datasets` sets.

Each source is a list of `Example` in a fixed order, so that a position in the data is a number.
Folders are read here and not by `datasets`, which copies every picture into a cache of its own
before the first is seen, and names no broken line of metadata.
"""

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from linfusion.files.picture_reader import open_noted, size_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Example:
    """A picture that is opened when asked for, and its caption.

    Attributes:
        open: gives the picture upright, in RGB, what is transparent on white.
        caption: of it.
        digest: changes with the picture: a hash of where its file is, how long and how old.
        size: gives (width, height) of the upright picture, decoding nothing where it can.
    """

    open: Callable[[], Image.Image]
    caption: str
    digest: str
    size: Callable[[], tuple[int, int]]


def image_folder(
    folder: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    captions: bool = True,
    anywhere: bool = False,
    argument: str = "train_data_dir",
) -> list[Example]:
    """Pictures of a folder, at any depth, in the order of their paths.

    Captions are looked for, as Hugging Face's imagefolder does, in metadata.jsonl or metadata.csv
    (columns `file_name`, or `image_column`, and `caption_column`; paths relative to the metadata),
    and where there is no metadata in a .txt file of the picture's name.

    Args:
        folder: where to look.
        image_column, caption_column: columns of the metadata.
        captions: False takes every picture, with an empty caption.
        anywhere: whether metadata may name files outside of its folder.
        argument: what errors call the folder.

    Raises:
        ValueError: no such folder, no pictures, a picture without a caption or file, or metadata
            that cannot be read; the message names the file and the line.
    """
    pairs = captioned_files(
        folder,
        IMAGE_SUFFIXES,
        image_column=image_column,
        caption_column=caption_column,
        captions=captions,
        anywhere=anywhere,
        argument=argument,
    )
    return [
        Example(
            partial(opened, path, argument, path),
            caption,
            file_digest(path),
            partial(size_of, path),
        )
        for path, caption in pairs
    ]


def captioned_files(
    folder: str | Path,
    suffixes: tuple[str, ...],
    *,
    image_column: str = "image",
    caption_column: str = "text",
    captions: bool = True,
    anywhere: bool = False,
    argument: str = "train_data_dir",
) -> list[tuple[Path, str]]:
    """Files of some kinds and their captions, found as `image_folder` finds them.

    Raises:
        ValueError: as `image_folder`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{argument}: there is no folder {folder}")
    metadata = sorted(p for p in folder.rglob("metadata.*") if p.suffix in (".jsonl", ".csv"))
    if captions and metadata:
        pairs = [
            pair
            for m in metadata
            for pair in _metadata_pairs(m, image_column, caption_column, anywhere, argument)
        ]
    else:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
        pairs = [(p, caption_beside(p, argument) if captions else "") for p in paths]
    if not pairs:
        raise ValueError(f"{argument}: no pictures ({', '.join(suffixes)}) in {folder}")
    return pairs


def datasets_set(
    name: str,
    config_name: str | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "text",
) -> list[Example]:
    """The train split of a Hugging Face `datasets` set, by hub name or folder.

    Raises:
        ImportError: `datasets` is missing (extra `train`).
        ValueError: a column that is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('dataset_name needs datasets: pip install "linfusion[train]"') from error
    rows = datasets.load_dataset(name, config_name, split="train")
    for argument, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in rows.column_names:
            raise ValueError(
                f"{argument}: {column!r} is no column of {name}, which has "
                f"{', '.join(rows.column_names)}"
            )
    captions = [c if isinstance(c, str) else c[0] for c in rows[caption_column]]
    return [
        Example(
            partial(_cell, rows, i, image_column),
            caption,
            # The set's own fingerprint names its content without decoding every picture.
            digest(f"{rows._fingerprint}/{i}"),
            lambda i=i: _cell(rows, i, image_column).size,  # type: ignore[misc]
        )
        for i, caption in enumerate(captions)
    ]


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: no such file, or no prompt in it.
    """
    return read_lines(path, "train_prompts")


def read_lines(path: str | Path, argument: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: no such file, no text in it, or none in UTF-8; `argument` is to blame.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{argument}: there is no file {path}")
    lines = decoded(path.read_bytes(), path, argument).splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{argument}: no prompt in {path}")
    return found


def digest(content: bytes | str) -> str:
    """Short hash of some content."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_digest(path: Path, part: int = 0) -> str:
    """Short hash of where a file is, how long and how old; its bytes are not read.

    Args:
        path: the file.
        part: tells what lies in one file apart.
    """
    found = path.stat()
    return digest(f"{path.absolute()}|{found.st_size}|{found.st_mtime_ns}|{part}")


def decoded(content: bytes, source: object, argument: str) -> str:
    """Text in UTF-8.

    Raises:
        ValueError: it is not; the message names the source and the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{argument}: {source} is not in UTF-8: byte {content[error.start]:#04x} in line {line}"
        ) from error


def rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, what is transparent laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int, interpolation: str) -> Image.Image:
    """Scale the picture until it covers height × width, then crop its centre."""
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = rgb(image).resize(size, Image.Resampling[interpolation.upper()])
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _metadata_pairs(
    metadata: Path, image_column: str, caption_column: str, anywhere: bool, argument: str
) -> Iterator[tuple[Path, str]]:
    for line, row in _metadata_rows(metadata, argument):
        where = f"{metadata}, line {line}"
        name = row.get("file_name", row.get(image_column))
        caption = row.get(caption_column)
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        if not (isinstance(name, str) and name and isinstance(caption, str)):
            raise ValueError(
                f"caption_column: {where} has {', '.join(map(str, row))}; needed are file_name and"
                f" {caption_column!r}, with text in both"
            )
        path = metadata.parent / name
        inside = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(metadata.parent))
        if not (inside or anywhere):
            raise ValueError(
                f"{argument}: {where} names {name}, which is outside of its folder;"
                " metadata_anywhere=True takes such files"
            )
        if "\0" in name or not path.is_file():
            raise ValueError(f"{argument}: {where} names {name}, which is not there")
        yield path, caption


def _metadata_rows(metadata: Path, argument: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a metadata file and the numbers of their lines."""
    text = decoded(metadata.read_bytes(), metadata, argument)
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(
                f"{argument}: {metadata}, line {reader.line_num}, is no CSV ({error})"
            ) from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{argument}: {metadata}, line {number}, is no JSON ({error})"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{argument}: {metadata}, line {number}, is no JSON object")
        yield number, row


def caption_beside(path: Path, argument: str) -> str:
    """What is in the .txt file of a file's name.

    Raises:
        ValueError: there is none.
    """
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        raise ValueError(
            f"{argument}: {path} has no caption: no metadata.jsonl, metadata.csv or {beside}"
        )
    return decoded(beside.read_bytes(), beside, argument).strip()


def opened(picture: Any, argument: str, source: object) -> Image.Image:
    """A picture as `Example.open` gives it; what is changed for that is said once, not for each.

    Raises:
        ValueError: it cannot be read; the message names `argument` and `source`.
    """
    try:
        pixels, notes = open_noted(picture)
    except ValueError as error:
        raise ValueError(f"{argument}: {source}: {error}") from error
    for note in notes:
        warnings.warn(f"{argument}: of some pictures, {note}", stacklevel=2)
    return Image.fromarray(pixels)


def _cell(rows: Any, i: int, column: str) -> Image.Image:
    return opened(rows[i][column], "dataset_name", f"row {i}")
