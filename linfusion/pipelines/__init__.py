"""Pictures and videos of sizes that softmax attention and whole-picture memory do not reach."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfusion.lit.pipeline import DiTPipeline
    from linfusion.pipelines.highres.pipeline import HighResPipeline
    from linfusion.pipelines.lingen.pipeline import LinGenPipeline

_HOME = {
    "DiTPipeline": "linfusion.lit.pipeline",
    "HighResPipeline": "linfusion.pipelines.highres.pipeline",
    "LinGenPipeline": "linfusion.pipelines.lingen.pipeline",
}

__all__ = ["DiTPipeline", "HighResPipeline", "LinGenPipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOME[name]), name)
