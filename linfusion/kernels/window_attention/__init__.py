"""Softmax attention in a window of a grid, and what lets its parts be merged."""

from linfusion.kernels.window_attention.api import window_attention

__all__ = ["window_attention"]
