"""Small trained pipelines that ship with the package, so that everything runs offline.

Each is a folder as the `save_pretrained` of a stock diffusers pipeline writes it (the softmax
teacher), with the weights of each of its students in a subfolder of its own. Where the student is a
whole model, it is the pipeline's own, and the teacher lies in the subfolder `teacher`.
"""

from __future__ import annotations

import json
import re
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
    """The students in the folder of a pipeline, by the name of their subfolder, 8 before 16."""
    configs = sorted(Path(folder).glob("*/config.json"), key=lambda c: _counted(c.parent.name))
    return {
        config.parent.name: config.parent
        for config in configs
        if json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "LinFusion"
    }


def _counted(name: str) -> list[tuple[int, str]]:
    """A name as a key that sorts the numbers in it as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


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
        A stock diffusers pipeline, or a `LinGenPipeline`, which is linear itself.

    Raises:
        ValueError: no such name; the message lists those there are. Or no such model of it.
    """
    folder = path(name)
    found, teacher = students(folder), folder / "teacher"
    if student is not None and (not linear or student not in found):
        raise ValueError(
            f"student: got {student!r} with linear={linear}; {name} has"
            f" {', '.join(found) or 'one that is the model itself'}"
        )
    import torch

    from linfusion.linearize import linearize
    from linfusion.pipelines import LinGenPipeline
    from linfusion.pipelines.load import load as load_pipeline

    dtype = dtype or torch.float32
    pipe = load_pipeline(str(folder), dtype=dtype)
    if isinstance(pipe, LinGenPipeline):
        if not linear:
            raise ValueError(f"linear: got False, but {name} is linear itself and has no teacher")
    elif linear:
        linearize(pipe, weights=found[student or next(iter(found))] if found else None)
    elif teacher.is_dir():
        softmax = type(pipe.transformer).from_pretrained(teacher, torch_dtype=dtype)
        pipe.register_modules(transformer=softmax)
    return pipe
