"""Every Triton kernel compiled for nine GPUs, without a GPU: `python -m benchmarks.aot`."""
