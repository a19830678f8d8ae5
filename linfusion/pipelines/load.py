"""Pipelines from folders and the hub: diffusers' own and those of this package."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from linfusion.lit.pipeline import with_learned_variance

_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def load(model: str, **kwargs: Any) -> Any:
    """The pipeline in a folder or on the hub, of the class that it was saved from.

    diffusers looks a class up among its own alone; `LinGenPipeline` is found here.

    Args:
        model: a folder or hub name.
        **kwargs: as of `DiffusionPipeline.from_pretrained`.
    """
    hub = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
    config = DiffusionPipeline.load_config(model, **hub)
    kind: Any = DiffusionPipeline
    if config.get("_class_name") == "LinGenPipeline":
        from linfusion.pipelines.lingen.pipeline import LinGenPipeline

        kind = LinGenPipeline
    return with_learned_variance(kind.from_pretrained(model, **kwargs))
