"""Softmax attention near, linear attention far, in one normalisation."""

from linfusion.kernels.hybrid_attention.api import hybrid_attention
from linfusion.kernels.hybrid_attention.chunks import ChunkState, chunked_attention
from linfusion.kernels.hybrid_attention.merge import merge

__all__ = ["ChunkState", "chunked_attention", "hybrid_attention", "merge"]
