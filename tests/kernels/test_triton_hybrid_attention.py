"""The Triton kernels of hybrid attention and counted cells, interpreted, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linfusion.kernels import TileOrder, chunked_attention, hybrid_attention, window_attention
from linfusion.kernels.window_attention.cells import cell_grid
from tests.kernels.test_window_attention import error

LIMIT = 5e-6  # wrong signs, masks or scales are errors of order one

# grid, radius, columns, features: two pieces of columns, two passes of features, 3-D
SIZES = [
    ((9, 13), 4.5, 16, 8, False),
    ((5, 9), 3, 72, 80, True),
    ((5, 6, 4), 3, 8, 136, True),
]


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shapes[0]))
    return [torch.randn(shape, generator=g) for shape in shapes]


def agree(function, tensors: list[Tensor], **choices) -> None:
    """Outputs and gradients of the kernels and of the definition in float64."""

    def run(impl: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = [t.to(dtype).requires_grad_() for t in tensors]
        o, lse = function(*x, impl=impl, **choices)
        loss = o.sin().sum() + (lse.cos().sum() if isinstance(lse, Tensor) else 0)
        return o, lse, *torch.autograd.grad(loss, x)

    for ours, exact in zip(
        run("triton", torch.float32), run("reference", torch.float64), strict=True
    ):
        if isinstance(ours, Tensor):
            assert error(ours, exact) < LIMIT


@pytest.mark.parametrize("grid, radius, d, f, tiled", SIZES)
def test_near_and_far_agree_with_the_definition(grid, radius, d, f, tiled):
    n, heads = math.prod(grid), 2
    tensors = draw(*[(1, n, heads, d)] * 3, *[(1, n, heads, f)] * 2, (heads,))
    tensors[3:5] = [x.abs() / f for x in tensors[3:5]]

    def function(q, k, v, phi_q, phi_k, g, **choices):
        return hybrid_attention(q, k, v, phi_q, phi_k, log_weight=g, **choices)

    order = TileOrder(grid) if tiled else None
    agree(function, tensors, grid=grid, radius=radius, return_lse=True, order=order)


def test_features_of_the_numerator_and_doubled_sums_agree():
    tensors = draw(*[(2, 45, 2, 8)] * 3, *[(2, 45, 2, 8)] * 4, (2,))
    tensors[3:5] = [x.abs() for x in tensors[3:5]]

    def function(q, k, v, phi_q, phi_k, a, b, g, **choices):
        return hybrid_attention(q, k, v, phi_q, phi_k, rotated=(a, b), log_weight=g, **choices)

    for exclude in (True, False):
        agree(function, tensors, grid=(5, 9), radius=2.5, return_lse=True, exclude=exclude)


def test_chunks_agree_with_the_definition():
    tensors = draw(*[(1, 30, 2, 8)] * 5, (2,))
    tensors[3:5] = [x.abs() for x in tensors[3:5]]

    def function(*x, **choices):
        return chunked_attention(*x[:5], log_weight=x[5], **choices)

    agree(function, tensors, grid=(5, 2, 3), frames=2, overlap=1)


CELLS = [
    ((9, 13), 4.5, (4, 2), False),
    ((5, 9), 2.5, (2, 4), True),
    ((5, 6, 4), 3, (2, 2, 3), True),
]


@pytest.mark.parametrize("grid, radius, cells, tiled", CELLS)
def test_counted_cells_agree_with_the_definition(grid, radius, cells, tiled):
    n, p = math.prod(grid), math.prod(cell_grid(grid, cells))
    tensors = draw(*[(1, n, 2, 8)] * 3, *[(1, p, 2, 8)] * 2, *[(1, 3, 2, 8)] * 2)

    def function(q, k, v, pk, pv, ck, cv, **choices):
        return window_attention(q, k, v, pooled=(pk, pv), context=(ck, cv), **choices)

    order = TileOrder(grid) if tiled else None
    agree(function, tensors, grid=grid, radius=radius, cells=cells, return_lse=True, order=order)
