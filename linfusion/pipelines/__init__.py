"""Pictures and videos of sizes that softmax attention and whole-picture memory do not reach."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfusion.pipelines.highres import HighResPipeline

__all__ = ["HighResPipeline"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    from linfusion.pipelines.highres import HighResPipeline

    return HighResPipeline
