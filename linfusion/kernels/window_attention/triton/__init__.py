"""Window attention in Triton: compiled for GPUs, interpreted on a CPU, never run on a GPU."""

from linfusion.kernels.launch import Launch, Target
from linfusion.kernels.window_attention.triton.launch import attention, attention_backward

__all__ = ["Launch", "Target", "attention", "attention_backward"]
