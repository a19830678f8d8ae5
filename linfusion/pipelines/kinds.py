"""What a model draws, as its class says before its weights are loaded."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers


def refuse_other_kinds(model: str, where: str, **hub: str | None) -> None:
    """Refuse what draws no picture from a prompt or class alone.

    Args:
        model: as the user names it.
        where: the folder or hub name that this is.
        **hub: `revision` and `token`.

    Raises:
        ValueError: such a pipeline; the message says what it does, and where it runs.
    """
    kind, name = _class_of(where, hub)
    if name == "LinGenPipeline":
        raise ValueError(f"model: {model} draws videos; use linfusion video")
    if kind is None:
        return
    takes = inspect.signature(kind.__call__).parameters
    needed = [
        p.name
        for p in takes.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
    ]
    if "num_frames" in takes:
        what = "draws videos; `linfusion video` draws those of LinGenPipeline alone"
    elif "image" in takes and not {"controlnet_conditioning_scale"} & set(takes):
        what = "starts from a picture"
    elif "control_image" in takes or "controlnet_conditioning_scale" in takes:
        what = "draws after a control picture; see linfusion upscale --control-image"
    elif not {"prompt", "class_labels"} & set(takes):
        what = "draws from neither a prompt nor a class"
    elif extra := set(needed) - {"prompt", "class_labels"}:
        what = f"draws from {', '.join(sorted(extra))}"
    else:
        return
    raise ValueError(f"model: {model} is a {name}, which {what}; it runs in diffusers itself")


def refuse_all_but(name: str, model: str, where: str, **hub: str | None) -> None:
    """Refuse every pipeline that is not of the class of that name; else as above.

    Raises:
        ValueError: another class.
    """
    kind, found = _class_of(where, hub)
    if found == name:
        return
    videos = kind is not None and "num_frames" in inspect.signature(kind.__call__).parameters
    what = f"runs in diffusers itself; here are those of {name}" if videos else "draws no videos"
    raise ValueError(f"model: {model} is a {found}, which {what}")


def _class_of(where: str, hub: dict[str, str | None]) -> tuple[Any, str]:
    """The class in diffusers, if it is one of theirs, and its name."""
    given = {name: value for name, value in hub.items() if value is not None}
    name = str(diffusers.DiffusionPipeline.load_config(where, **given)["_class_name"])
    return getattr(diffusers, name, None), name
