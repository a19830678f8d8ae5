"""WebDataset shards on this machine, indexed once and read in place.

`webdataset` streams: it knows no positions, by which a run resumes to the same bits, and names no
broken sample.
"""

import glob
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from linfusion.files.picture_reader import size_of
from linfusion.training.data.pictures import (
    IMAGE_SUFFIXES,
    Example,
    decoded,
    file_digest,
    opened,
)


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
    except tarfile.TarError as error:
        raise ValueError(
            f"train_shards_path_or_url: {shard} is no plain .tar file, or truncated ({error})"
        ) from error
    length = shard.stat().st_size
    for key, sample in itertools.groupby(members, lambda m: _split_name(m.name)[0]):
        parts = {_split_name(m.name)[1]: m for m in sample}
        where = f"sample {key} of {shard}"
        if any(m.offset_data + m.size > length for m in parts.values()):
            raise ValueError(f"train_shards_path_or_url: {where} is truncated")
        image = next((m for s, m in parts.items() if s in IMAGE_SUFFIXES), None)
        if image is None or not ({".txt", ".json"} & parts.keys()):
            raise ValueError(
                f"train_shards_path_or_url: {where} has {', '.join(parts)}; "
                "needed are a picture and .txt or .json"
            )
        if ".txt" in parts:
            caption = _text(shard, parts[".txt"], where).strip()
        else:
            try:
                fields = json.loads(_text(shard, parts[".json"], where))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"train_shards_path_or_url: the .json of {where} is no JSON ({error})"
                ) from error
            found = fields.get(caption_column) if isinstance(fields, dict) else None
            if not isinstance(found, str):
                raise ValueError(f"caption_column: {caption_column!r} is no text in {where}")
            caption = found
        yield Example(
            partial(_open, shard, image, where),
            caption,
            file_digest(shard, image.offset_data),
            partial(_size, shard, image),
        )


def _split_name(name: str) -> tuple[str, str]:
    """`dir/0001.seg.png` -> (`dir/0001`, `.seg.png`), as WebDataset splits."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), (dot + suffix).lower()


def _read(shard: Path, member: tarfile.TarInfo) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _text(shard: Path, member: tarfile.TarInfo, where: str) -> str:
    return decoded(_read(shard, member), f"the caption of {where}", "train_shards_path_or_url")


def _open(shard: Path, member: tarfile.TarInfo, where: str) -> Image.Image:
    return opened(_image(shard, member), "train_shards_path_or_url", where)


def _size(shard: Path, member: tarfile.TarInfo) -> tuple[int, int]:
    return size_of(_image(shard, member))


def _image(shard: Path, member: tarfile.TarInfo) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_read(shard, member)))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"train_shards_path_or_url: {member.name} in {shard} cannot be read ({error})"
        ) from error
