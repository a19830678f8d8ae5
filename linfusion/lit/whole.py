"""Students that are whole models, as those of LiT: saved linear, and loaded in place of another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linfusion.layers.find import model_of
from linfusion.layers.record import MARKER
from linfusion.linearize import linearize, restore


def is_whole(pipe: Any, weights: Any) -> bool:
    """Whether a folder holds a whole model of the class of the pipeline's own."""
    config = Path(str(weights)) / "config.json"
    if not config.is_file():
        return False
    found = json.loads(config.read_text(encoding="utf-8"))
    return found.get("_class_name") == type(model_of(pipe)).__name__


def load_whole(pipe: Any, folder: str | Path) -> Any:
    """Give a pipeline the whole student in a folder, linear.

    Args:
        pipe: a pipeline with a `transformer`.
        folder: what `linfusion train --method lit` wrote.

    Returns:
        The transformer that the pipeline had.

    Raises:
        ValueError: the model in the folder is not linear. The pipeline is as it was.
    """
    own = pipe.transformer
    student = type(own).from_pretrained(folder, torch_dtype=own.dtype).to(own.device)
    if MARKER not in student.config:
        raise ValueError(f"weights: the {type(own).__name__} in {folder} was not saved linear")
    linearize(student.eval())
    pipe.register_modules(transformer=student)
    return own


@contextmanager
def as_student(pipe: Any, weights: Any) -> Iterator[Any]:
    """Within, the pipeline is its student; afterwards what it was.

    Args:
        pipe: a softmax pipeline.
        weights: as `linfusion.linearize` takes them, or the folder of a whole student.
    """
    if is_whole(pipe, weights):
        own = load_whole(pipe, weights)
        try:
            yield pipe
        finally:
            pipe.register_modules(transformer=own)
        return
    linearize(pipe, weights=weights)
    try:
        yield pipe
    finally:
        restore(pipe)
