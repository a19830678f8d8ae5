"""Functions on tensors: no diffusers, no modules, and triton only when a GPU asks for it."""

from linfusion.kernels.hybrid_attention import (
    ChunkState,
    chunked_attention,
    hybrid_attention,
    merge,
)
from linfusion.kernels.linear_attention import (
    LinearState,
    linear_attention,
    linear_read,
    linear_state,
)
from linfusion.kernels.ssd import ssd_scan, ssd_step
from linfusion.kernels.window_attention import TileOrder, window_attention

__all__ = [
    "ChunkState",
    "LinearState",
    "TileOrder",
    "chunked_attention",
    "hybrid_attention",
    "linear_attention",
    "linear_read",
    "linear_state",
    "merge",
    "ssd_scan",
    "ssd_step",
    "window_attention",
]
