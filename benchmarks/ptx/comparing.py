"""What a case draws, and how far a result may be from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.launch import Target


class Comparison(NamedTuple):
    """A result's largest error over the largest value of the reference, and what it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


Case = Callable[[Target], list[Comparison]]

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
# A wrong element or a missing product moves a result by 1e-1 and more, at these sizes.
TOLERANCE = {bf16: 2e-2, f16: 3e-3, f32: 3e-6}


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> Comparison:
    """The error is infinite where a result is not finite."""
    got, want = got.double(), want.double()
    scale = want.abs().max().item() or 1.0
    error = (got - want).abs().max().item() / scale
    return Comparison(name, error if math.isfinite(error) else math.inf, tolerance)


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` gives NaN: what a kernel reads and nobody wrote shows up in its result."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Draw:
    """Normal numbers of one dtype, the same ones every time."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Between 0 and 1, in float32."""
        return torch.rand(*shape, generator=self._generator)
