"""Pipelines from folders and the hub: diffusers' own and those of this package."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from linfusion.lit.pipeline import with_learned_variance

_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def load(model: str, **kwargs: Any) -> Any:
    """The pipeline in a folder or on the hub, of the class that it was saved from.

    diffusers looks a class up among its own alone; `LinGenPipeline` is found here. All parts have
    one dtype, float32 unless another is given: diffusers leaves it to each part's library, of which
    transformers takes that of the file.

    Args:
        model: a folder or hub name.
        **kwargs: as of `DiffusionPipeline.from_pretrained`.
    """
    if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
        kwargs["dtype"] = torch.float32
    hub = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
    config = DiffusionPipeline.load_config(model, **hub)
    kind: Any = DiffusionPipeline
    if config.get("_class_name") == "LinGenPipeline":
        from linfusion.pipelines.lingen.pipeline import LinGenPipeline

        kind = LinGenPipeline
    return with_learned_variance(kind.from_pretrained(model, **kwargs))


def default_device() -> str:
    """The fastest device of this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def in_one_dtype(pipe: DiffusionPipeline) -> contextlib.AbstractContextManager[Any]:
    """Inside, a pipeline whose parts differ in dtype draws: autocast, in that of 16 bits.

    A pipeline of one dtype draws as it is.
    """
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    found = {getattr(part, "dtype", None) for part in parts}
    half = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found]
    if len(found - {None}) < 2 or not half:
        return contextlib.nullcontext()
    given: Any = pipe
    return torch.autocast(given._execution_device.type, dtype=half[0])
