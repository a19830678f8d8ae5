"""Pictures and videos of sizes that softmax attention and whole-picture memory do not reach."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfusion.pipelines.dit import DiTPipeline
    from linfusion.pipelines.highres import HighResPipeline
    from linfusion.pipelines.lingen import LinGenPipeline

_HOME = {
    "DiTPipeline": "linfusion.pipelines.dit",
    "HighResPipeline": "linfusion.pipelines.highres",
    "LinGenPipeline": "linfusion.pipelines.lingen",
}

__all__ = ["DiTPipeline", "HighResPipeline", "LinGenPipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOME[name]), name)
