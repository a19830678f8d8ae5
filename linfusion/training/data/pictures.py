"""Where pictures and captions come from: image folders, `datasets` sets, WebDataset shards.

Each source is a list of `Example` in a fixed order, so that a position in the data is a number.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Example:
    """A picture that is opened when asked for, its caption, and a hash of its content."""

    open: Callable[[], Image.Image]
    caption: str
    digest: str


def image_folder(
    folder: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    captions: bool = True,
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
        argument: what errors call the folder.

    Raises:
        ValueError: no such folder, no pictures, or a picture without a caption or file.
    """
    pairs = captioned_files(
        folder,
        IMAGE_SUFFIXES,
        image_column=image_column,
        caption_column=caption_column,
        captions=captions,
        argument=argument,
    )
    return [
        Example(partial(Image.open, path), caption, digest(path.read_bytes()))
        for path, caption in pairs
    ]


def captioned_files(
    folder: str | Path,
    suffixes: tuple[str, ...],
    *,
    image_column: str = "image",
    caption_column: str = "text",
    captions: bool = True,
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
            for pair in _metadata_pairs(m, image_column, caption_column, argument)
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
        # The set's own fingerprint names its content without decoding every picture.
        Example(partial(_cell, rows, i, image_column), caption, digest(f"{rows._fingerprint}/{i}"))
        for i, caption in enumerate(captions)
    ]


def webdataset_shards(pattern: str, *, caption_column: str = "text") -> list[Example]:
    """Samples of WebDataset .tar shards on this machine, in the order of the shards.

    A sample is the run of members that share a name up to the first dot: a picture, and a .txt
    caption or a .json with `caption_column`. Members are indexed once and read in place.

    Args:
        pattern: path with glob characters and {000..009} ranges.
        caption_column: key of the caption in .json members.

    Raises:
        ValueError: a URL, a pattern that matches nothing, or a sample without picture or caption.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"train_shards_path_or_url: got {pattern}, accepted are paths on this machine"
        )
    shards = [
        Path(p)
        for expanded in _expand_braces(pattern)
        for p in (sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded])
    ]
    if not shards or not all(shard.is_file() for shard in shards):
        missing = next((s for s in shards if not s.is_file()), pattern)
        raise ValueError(f"train_shards_path_or_url: there is no file {missing}")
    return [example for shard in shards for example in _shard_examples(shard, caption_column)]


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: no such file, or no prompt in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"train_prompts: there is no file {path}")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"train_prompts: no prompt in {path}")
    return prompts


def digest(content: bytes | str) -> str:
    """Short hash of some content."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=16).hexdigest()


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
    metadata: Path, image_column: str, caption_column: str, argument: str
) -> Iterator[tuple[Path, str]]:
    with metadata.open(newline="", encoding="utf-8") as file:
        rows = list(
            csv.DictReader(file)
            if metadata.suffix == ".csv"
            else (json.loads(line) for line in file if line.strip())
        )
    for number, row in enumerate(rows, 1):
        name = row.get("file_name", row.get(image_column))
        caption = row.get(caption_column)
        if name is None or caption is None:
            raise ValueError(
                f"caption_column: row {number} of {metadata} has {', '.join(row)}; needed are "
                f"file_name and {caption_column!r}"
            )
        if not (path := metadata.parent / name).is_file():
            raise ValueError(f"{argument}: {metadata} names {name}, which is not there")
        yield path, caption if isinstance(caption, str) else caption[0]


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
    return beside.read_text().strip()


def _cell(rows: object, i: int, column: str) -> Image.Image:
    return rows[i][column]  # type: ignore[index]


def _expand_braces(pattern: str) -> Iterator[str]:
    """`a-{00..02}.tar` and `{x,y}.tar`, as a shell expands them."""
    if not (found := re.search(r"\{([^{}]*)\}", pattern)):
        yield pattern
        return
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = span.groups()
        parts = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        parts = found[1].split(",")
    for part in parts:
        yield from _expand_braces(pattern[: found.start()] + part + pattern[found.end() :])


def _shard_examples(shard: Path, caption_column: str) -> Iterator[Example]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [m for m in tar if m.isfile()]
    except tarfile.ReadError as error:
        raise ValueError(f"train_shards_path_or_url: {shard} is no plain .tar file") from error
    for key, sample in itertools.groupby(members, lambda m: _split_name(m.name)[0]):
        parts = {_split_name(m.name)[1]: m for m in sample}
        image = next((m for s, m in parts.items() if s in IMAGE_SUFFIXES), None)
        if image is None or not ({".txt", ".json"} & parts.keys()):
            raise ValueError(
                f"train_shards_path_or_url: sample {key} of {shard} has {', '.join(parts)}; "
                "needed are a picture and .txt or .json"
            )
        if ".txt" in parts:
            caption = _read(shard, parts[".txt"]).decode().strip()
        else:
            fields = json.loads(_read(shard, parts[".json"]))
            if caption_column not in fields:
                raise ValueError(
                    f"caption_column: {caption_column!r} is not in sample {key} of {shard}"
                )
            caption = fields[caption_column]
        yield Example(partial(_open, shard, image), caption, digest(_read(shard, image)))


def _split_name(name: str) -> tuple[str, str]:
    """`dir/0001.seg.png` -> (`dir/0001`, `.seg.png`), as WebDataset splits."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), (dot + suffix).lower()


def _read(shard: Path, member: tarfile.TarInfo) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _open(shard: Path, member: tarfile.TarInfo) -> Image.Image:
    return Image.open(io.BytesIO(_read(shard, member)))
