"""Softmax attention in a window of a grid, and what lets its parts be merged."""

from linfusion.kernels.window_attention.api import window_attention
from linfusion.kernels.window_attention.cells import pool
from linfusion.kernels.window_attention.order import TileOrder

__all__ = ["TileOrder", "pool", "window_attention"]
