"""What is computed once and kept on disk, by all processes that want it together.

Its files are sealed (`linfusion.files.whole_files`). Rows are memory-mapped.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from linfusion.files import whole_files

ROWS = 512  # of a file
PATIENCE = 0.5  # seconds between looks at what other processes compute


class Rows:
    """Rows of equal tensors by name, spread over files of `ROWS` rows."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [load_file(file) for file in files]

    def __len__(self) -> int:
        return sum(len(next(iter(file.values()))) for file in self._files)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{name: [len(indices), ...]}"""
        return {
            name: torch.stack([self._files[i // ROWS][name][i % ROWS] for i in indices])
            for name in self._files[0]
        }


def cached_rows(
    folder: Path,
    total: int,
    compute: Callable[[range], dict[str, Tensor]],
    *,
    batch_size: int,
    description: str,
) -> Rows:
    """The rows 0..total of a cache folder; those not yet on disk, or damaged there, are computed.

    Args:
        folder: named by the content's hash.
        total: number of rows.
        compute: rows -> {name: [len(rows), ...]}; called for at most `batch_size` rows.
        batch_size: rows computed at a time.
        description: of the progress bar.
    """
    files = [folder / f"{start:09d}.safetensors" for start in range(0, total, ROWS)]

    def rows(file: int) -> dict[str, Tensor]:
        start, end = file * ROWS, min((file + 1) * ROWS, total)
        parts = [compute(range(i, min(i + batch_size, end))) for i in range(start, end, batch_size)]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    filled(files, rows, description=description)
    return Rows(files)


def filled(
    files: Sequence[Path], compute: Callable[[int], dict[str, Tensor]], *, description: str
) -> None:
    """Compute the files of one folder that are not there, or damaged.

    Processes that want the same files, such as the ranks of a run, share the work: each takes one
    that no other is at, and waits for the rest by looking, not in a collective, which would time
    out.

    Args:
        files: what is wanted.
        compute: number of a file -> its tensors.
        description: of the progress bar.
    """
    if files:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        whole_files.remove_leftovers(files[0].parent)
    missing = [i for i, file in enumerate(files) if not _is_whole(file)]
    with tqdm(
        total=len(files), initial=len(files) - len(missing), desc=description, disable=not missing
    ) as bar:
        while missing:
            left = [i for i in missing if not _made(files[i], partial(compute, i), bar)]
            if len(left) == len(missing):
                time.sleep(PATIENCE)
            missing = left


def _made(file: Path, compute: Callable[[], dict[str, Tensor]], bar: Any) -> bool:
    """Whether the file is there now; it is not while another process is at it."""
    try:
        lock = whole_files.Lock(file, "cache_dir")
    except ValueError:
        return False
    with lock:
        if not _is_whole(file):
            whole_files.save_tensors(file, compute())
    bar.update()
    return True


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        whole_files.check(file)
    except ValueError as error:
        warnings.warn(f"cache_dir: {error}; it is computed anew", stacklevel=2)
        return False
    return True
