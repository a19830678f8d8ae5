"""Whole networks of our own."""

from linfusion.models.lingen import LinGenTransformer3DModel
from linfusion.models.stream import StreamState, split_blocks

__all__ = ["LinGenTransformer3DModel", "StreamState", "split_blocks"]
