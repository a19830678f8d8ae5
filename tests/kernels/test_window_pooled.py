"""Pooled tokens that enter the softmax of a window with the number of tokens they stand for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from linfusion.kernels import TileOrder, window_attention
from linfusion.kernels.window_attention import blocks, pool
from linfusion.kernels.window_attention.cells import cell_grid
from tests.kernels.test_window_attention import dense, error, inputs, pair, seen, tokens

# grid, radius, cells, shape: cut short, cells larger than the window, 3-D, a window that sees all
SIZES = [
    ((7, 9), 2.5, (2, 2), "disc"),
    ((9, 10), 4, (4, 3), "square"),
    ((3, 5, 4), 2, (2, 2, 3), "disc"),
    ((6, 5), 9, (2, 2), "disc"),
]
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.fixture(params=["reference", "dense", "tiles"])
def impl(request, monkeypatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(blocks, "SMALL", 0)
    return "reference" if request.param == "reference" else "blocked"


def averages(x: Tensor, grid: tuple[int, ...], cells: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cells one at a time: their averages [B, P, H, D], and which tokens each has [P, N]."""
    places = [
        tuple(at // side for at, side in zip(place, cells, strict=True))
        for place in itertools.product(*map(range, grid))
    ]
    members = torch.tensor([[place == cell for place in places] for cell in sorted(set(places))])
    return torch.stack([x[:, own].mean(1) for own in members], 1), members


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    radius: float,
    cells,
    shape: str,
    context,
) -> Tensor:
    """Each token outside a window replaced by the average of its cell, and one softmax."""
    mask = seen(grid, radius, shape)
    (k_mean, members), (v_mean, _) = (averages(x, grid, cells) for x in (k, v))
    cell = members.int().argmax(0)  # of each token
    k_out, v_out = k_mean[:, cell], v_mean[:, cell]
    rows = []
    for i, own in enumerate(mask):
        keys = torch.where(own[:, None, None], k, k_out)
        values = torch.where(own[:, None, None], v, v_out)
        whole = torch.ones(1, len(own), dtype=torch.bool)
        rows.append(dense(q[:, i : i + 1], keys, values, whole, *([context] if context else [])))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("grid, radius, cells, shape", SIZES)
def test_every_token_counts_once(impl, grid, radius, cells, shape, with_text):
    q, k, v = inputs(grid)
    context = pair(3, seed=7) if with_text else None
    pooled = pool(k, grid, cells), pool(v, grid, cells)
    o = window_attention(
        q, k, v, grid=grid, radius=radius, shape=shape, context=context, pooled=pooled,
        cells=cells, impl=impl,
    )  # fmt: skip
    assert error(o, truth(q, k, v, grid, radius, cells, shape, context)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("grid, radius, cells, shape", SIZES[:3])
def test_tiles_have_the_gradients_of_the_definition(
    grid, radius, cells, shape, tiled, dtype, monkeypatch
):
    monkeypatch.setattr(blocks, "SMALL", 0)
    x = [y.requires_grad_() for y in inputs(grid, dtype)]
    count = math.prod(cell_grid(grid, cells))
    pooled = [y.requires_grad_() for y in pair(count, 5, dtype)]
    order = TileOrder(grid) if tiled else None

    def grads(impl: str, *x: Tensor) -> tuple[Tensor, ...]:
        o, lse = window_attention(
            *x[:3], grid=grid, radius=radius, shape=shape, pooled=(x[3], x[4]), cells=cells,
            return_lse=True, order=order, impl=impl,
        )  # fmt: skip
        return torch.autograd.grad(o.sin().sum() + lse.cos().sum(), x)

    wide = [y.detach().double().requires_grad_() for y in (*x, *pooled)]
    for ours, exact in zip(grads("blocked", *x, *pooled), grads("reference", *wide), strict=True):
        assert error(ours, exact) < LIMITS[dtype]


def test_a_window_that_sees_everything_leaves_all_cells_out(impl):
    q, k, v = inputs((6, 5))
    huge = 1e3 * torch.ones(2, 9, 2, 8, dtype=torch.float64)  # would take all the weight
    o, lse = window_attention(
        q, k, v, grid=(6, 5), radius=9, pooled=(huge, huge), cells=(2, 2), return_lse=True,
        impl=impl,
    )  # fmt: skip
    alone = window_attention(q, k, v, grid=(6, 5), radius=9, return_lse=True, impl=impl)
    assert torch.equal(o, alone[0]) or error(o, alone[0]) < 1e-14
    assert (lse - alone[1]).abs().max() < 1e-14


def test_equal_tokens_make_a_window_that_sees_everything(impl):
    """Where cells are of equal tokens, summing them up loses nothing."""
    grid, cells = (8, 12), (2, 4)
    k, v = (tokens(2, 4, 3, 2, 8, seed=i) for i in (1, 2))  # one of each for a cell
    k, v = (x.repeat_interleave(2, 1).repeat_interleave(4, 2).flatten(1, 2) for x in (k, v))
    q = inputs(grid)[0]
    pooled = pool(k, grid, cells), pool(v, grid, cells)
    o = window_attention(q, k, v, grid=grid, radius=3, pooled=pooled, cells=cells, impl=impl)
    assert error(o, dense(q, k, v, torch.ones(96, 96, dtype=torch.bool))) < 1e-13


def test_averages_are_over_the_tokens_that_a_cell_has():
    for grid, _, cells, _ in SIZES:
        x = inputs(grid)[0]
        assert error(pool(x, grid, cells), averages(x, grid, cells)[0]) < 1e-14
        assert pool(x.bfloat16(), grid, cells).dtype == torch.bfloat16


def test_without_cells_a_pooled_token_is_a_token():
    q, k, v = inputs((7, 9), torch.float32)
    pooled = pair(20, 5, torch.float32)
    choices = {"grid": (7, 9), "radius": 2.5, "impl": "blocked"}
    as_context = window_attention(q, k, v, context=pooled, **choices)
    assert torch.equal(window_attention(q, k, v, pooled=pooled, **choices), as_context)
