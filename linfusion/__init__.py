"""Attention that is linear in the number of pixels or frames, for the diffusion models people have.

Importing this package takes torch and nothing else heavy: every public name below is loaded the
first time it is used (PEP 562).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from linfusion._version import __version__

if TYPE_CHECKING:
    from linfusion.attention.clear.processor import CLEARProcessor
    from linfusion.attention.hosts import describe_host
    from linfusion.attention.linfusion.processor import LinFusionProcessor
    from linfusion.attention.lit import LiTProcessor
    from linfusion.attention.mamba2.bidirectional import BiMamba2
    from linfusion.attention.mamba2.causal import Mamba2
    from linfusion.attention.mate.layer import MATE
    from linfusion.attention.mate.processor import MATEProcessor
    from linfusion.attention.mate.tesa import TESA
    from linfusion.authors_api import LinFusion
    from linfusion.fuse import fuse, unfuse
    from linfusion.kernels import linear_attention, window_attention
    from linfusion.linearize import linearize, restore
    from linfusion.lit.inherit import inherit
    from linfusion.models import LinGenTransformer3DModel, StreamState
    from linfusion.parallel.parallelize import parallelize, unparallelize
    from linfusion.pipelines.highres.pipeline import HighResPipeline
    from linfusion.pipelines.lingen.pipeline import LinGenPipeline
    from linfusion.summary import summary

_HOME = {
    "BiMamba2": "linfusion.attention.mamba2.bidirectional",
    "CLEARProcessor": "linfusion.attention.clear.processor",
    "HighResPipeline": "linfusion.pipelines.highres.pipeline",
    "LinFusion": "linfusion.authors_api",
    "LinFusionProcessor": "linfusion.attention.linfusion.processor",
    "LinGenPipeline": "linfusion.pipelines.lingen.pipeline",
    "LinGenTransformer3DModel": "linfusion.models",
    "LiTProcessor": "linfusion.attention.lit",
    "MATE": "linfusion.attention.mate.layer",
    "MATEProcessor": "linfusion.attention.mate.processor",
    "Mamba2": "linfusion.attention.mamba2.causal",
    "StreamState": "linfusion.models",
    "TESA": "linfusion.attention.mate.tesa",
    "describe_host": "linfusion.attention.hosts",
    "fuse": "linfusion.fuse",
    "inherit": "linfusion.lit.inherit",
    "linear_attention": "linfusion.kernels",
    "linearize": "linfusion.linearize",
    "parallelize": "linfusion.parallel.parallelize",
    "restore": "linfusion.linearize",
    "summary": "linfusion.summary",
    "unfuse": "linfusion.fuse",
    "unparallelize": "linfusion.parallel.parallelize",
    "window_attention": "linfusion.kernels",
}

__all__ = [
    "MATE",
    "TESA",
    "BiMamba2",
    "CLEARProcessor",
    "HighResPipeline",
    "LiTProcessor",
    "LinFusion",
    "LinFusionProcessor",
    "LinGenPipeline",
    "LinGenTransformer3DModel",
    "MATEProcessor",
    "Mamba2",
    "StreamState",
    "__version__",
    "describe_host",
    "fuse",
    "inherit",
    "linear_attention",
    "linearize",
    "parallelize",
    "restore",
    "summary",
    "unfuse",
    "unparallelize",
    "window_attention",
]


# Packages that are reached by their name: linfusion.zoo.load(...).
_PACKAGES = ("attention", "evaluation", "kernels", "pipelines", "students", "training", "zoo")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"linfusion.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'linfusion' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES})


class _Package(ModuleType):
    """Keeps `linfusion.linearize` the function: importing the submodule of that name binds it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
