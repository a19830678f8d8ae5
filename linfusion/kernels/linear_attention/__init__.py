"""Normalised non-causal linear attention, its mergeable state, and three implementations."""

from linfusion.kernels.linear_attention.api import linear_attention, linear_read, linear_state
from linfusion.kernels.linear_attention.common import LinearState

__all__ = ["LinearState", "linear_attention", "linear_read", "linear_state"]
