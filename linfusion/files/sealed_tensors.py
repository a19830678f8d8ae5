"""Checksums in safetensors files that other libraries write, as `whole_files` puts into its own."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from linfusion.files import whole_files

_BLOCK = 2**20


def seal(path: Path) -> None:
    """Put a checksum into the metadata of a file that was just written; its tensors stay."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        about = {"checksum": whole_files.BLANK, **header.pop("__metadata__", {})}
        text = json.dumps({"__metadata__": about} | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        digest = hashlib.sha256(head)
        while block := file.read(_BLOCK):
            digest.update(block)
        file.seek(start)
        with whole_files.writing(path) as sealed:
            sealed.write(head.replace(b"0" * 64, digest.hexdigest().encode(), 1))
            shutil.copyfileobj(file, sealed, _BLOCK)


def check_folder(folder: Path) -> None:
    """Refuse files that hold a checksum and are not as they were written; others are not judged.

    Raises:
        ValueError: one of them is damaged; the message names it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))
        if b'"checksum":"sha256:' in header:
            whole_files.check(path)
