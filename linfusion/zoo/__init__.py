"""Small trained pipelines that ship with the package, so that everything runs offline.

Each is a folder as the `save_pretrained` of a stock diffusers pipeline writes it (the softmax
teacher), with the weights of each of its students in a subfolder of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PREFIX = "zoo:"
_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(index.parent.name for index in _ROOT.glob("*/model_index.json"))


def path(name: str) -> Path:
    """Folder of the pipeline `name`; those of its students are `students(path(name))`.

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    if name not in names():
        raise ValueError(f"name: no model {name!r} in the zoo, which has: {', '.join(names())}")
    return _ROOT / name


def resolve(model: str) -> str:
    """`"zoo:<name>"` as the folder it stands for; any other folder or hub name as it is."""
    return str(path(model.removeprefix(PREFIX))) if model.startswith(PREFIX) else model


def students(folder: str | Path) -> dict[str, Path]:
    """The students in the folder of a pipeline, by the name of their subfolder."""
    configs = sorted(Path(folder).glob("*/config.json"))
    return {
        config.parent.name: config.parent
        for config in configs
        if json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "LinFusion"
    }


def load(
    name: str = "emoji",
    *,
    linear: bool = True,
    student: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A pipeline of the zoo, ready to call.

    Args:
        name: one of `names()`.
        linear: True for a student, False for its softmax teacher.
        student: which, of `students(path(name))`; None is the first.
        dtype: of the weights; None is float32.

    Returns:
        A stock diffusers pipeline.

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    folder = path(name)
    found = students(folder)
    if student is not None and (not linear or student not in found):
        raise ValueError(
            f"student: got {student!r} with linear={linear}; {name} has {', '.join(found)}"
        )
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32)
    if linear:
        import linfusion

        linfusion.linearize(pipe, weights=found[student or next(iter(found))])
    return pipe
