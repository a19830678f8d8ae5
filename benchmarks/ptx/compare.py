"""How results are compared with the reference, and what they are calculated from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
# A wrong element or a missing product moves a result by 1e-1 and more, at these sizes.
TOLERANCE = {bf16: 2e-2, f16: 3e-3, f32: 3e-6}


class Comparison(NamedTuple):
    """A result's largest error over the largest value of the reference, and what it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> Comparison:
    """The error is infinite where a result is not finite."""
    got, want = got.double(), want.double()
    scale = want.abs().max().item() or 1.0
    error = (got - want).abs().max().item() / scale
    return Comparison(name, error if math.isfinite(error) else math.inf, tolerance)


class Draw:
    """Normal numbers of one dtype, the same ones every time."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Between 0 and 1, in float32."""
        return torch.rand(*shape, generator=self._generator)
