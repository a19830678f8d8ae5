# mypy: ignore-errors
# Triton's language; Python's types do not describe it.
"""The smallest Triton kernel, to see whether one compiles and runs on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from linfusion.kernels.launch import Launch, run


@triton.jit
def probe(OUT, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(OUT + i, i + 1)


def probe_runs(device: torch.device) -> bool:
    """Whether it does, and gives what it should; a compiler that is missing raises."""
    out = torch.zeros(16, dtype=torch.int32, device=device)
    run(Launch(probe, 1, {"OUT": out, "BLOCK": 16}, {}))
    return out.tolist() == list(range(1, 17))
