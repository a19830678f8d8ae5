"""Small trained pipelines that ship with the package, so that everything runs offline.

Each is a folder as `StableDiffusionPipeline.save_pretrained` writes it (the softmax teacher), with
the weights of its linear student in the subfolder `linfusion`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

PREFIX = "zoo:"
_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(index.parent.name for index in _ROOT.glob("*/model_index.json"))


def path(name: str) -> Path:
    """Folder of the pipeline `name`; its student's weights are in `path(name) / "linfusion"`.

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    if name not in names():
        raise ValueError(f"name: no model {name!r} in the zoo, which has: {', '.join(names())}")
    return _ROOT / name


def resolve(model: str) -> str:
    """`"zoo:<name>"` as the folder it stands for; any other folder or hub name as it is."""
    return str(path(model.removeprefix(PREFIX))) if model.startswith(PREFIX) else model


def load(
    name: str = "emoji", *, linear: bool = True, dtype: torch.dtype | None = None
) -> StableDiffusionPipeline:
    """A pipeline of the zoo, ready to call.

    Args:
        name: one of `names()`.
        linear: True for the LinFusion student, False for its softmax teacher.
        dtype: of the weights; None is float32.

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    folder = path(name)
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32)
    if linear:
        import linfusion

        linfusion.linearize(pipe, weights=folder / "linfusion")
    return pipe
