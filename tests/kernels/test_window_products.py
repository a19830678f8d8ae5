"""Window attention by batched products: what they compute, and when they are not taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linfusion.kernels import TileOrder, window_attention
from linfusion.kernels.window_attention import blocks, products
from tests.kernels.test_window_attention import SIZES, error, inputs, pair, use

GRID, RADIUS = (13, 21), 4.5
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def found(monkeypatch) -> list[bool]:
    """Whether products served, for each call of them."""
    served = []

    def watched(method):
        def call(*args):
            result = method(*args)
            served.append(result is not None)
            return result

        return call

    for name in ("of_tiles", "of_all"):
        method = watched(getattr(products.Products, name))
        monkeypatch.setattr(products.Products, name, method)
    monkeypatch.setattr(blocks, "SMALL", 0)
    use(monkeypatch, True)
    return served


def attend(x: list[Tensor], grid=GRID, radius=RADIUS, impl="blocked", **options):
    context = x[3:] or None
    return window_attention(
        *x[:3], grid=grid, radius=radius, context=context, return_lse=True, impl=impl, **options
    )


def check(x: list[Tensor], limit: float, **options) -> None:
    o, lse = attend(x, **options)
    truth, true_lse = attend([y.double() for y in x], impl="reference", **options)
    assert o.dtype == x[2].dtype
    assert error(o, truth) < limit
    # Weights are rounded twice, and what is left out of them is as small: 3/512 of the largest.
    assert (lse - true_lse).abs().max() < (limit if x[0].dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("scores", [1, products.SCORES], ids=["a tile at a time", "many"])
@pytest.mark.parametrize("grid, radius", SIZES)
def test_they_are_the_definition(grid, radius, dtype, scores, monkeypatch, found):
    monkeypatch.setattr(products, "SCORES", scores)
    check(inputs(grid, dtype, dim=32), LIMITS[dtype], grid=grid, radius=radius)
    assert all(found)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("order", [None, TileOrder(GRID)], ids=["raster", "tile order"])
@pytest.mark.parametrize("count", [1, 20, 33])
def test_every_query_sees_the_context(dtype, order, count, found):
    x = [*inputs(GRID, dtype, dim=32), *pair(count, seed=7, dtype=dtype, dim=32)]
    check(x, LIMITS[dtype], order=order)
    assert len(found) > 2 and all(found)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", [40.0, -40.0])
def test_scores_out_of_range_go_to_the_flash_kernel(dtype, size, found, monkeypatch):
    q, k, v = inputs(GRID, dtype, dim=32)
    q[..., 0], k[..., 0] = 32**0.5, size if dtype == torch.bfloat16 else 2 * size
    check([q, k, v], 20 * LIMITS[dtype])  # of a score of 80, float32 has lost as much
    assert found == [False]  # and no more are tried
    expected = attend([q, k, v])
    use(monkeypatch, False)
    assert error(expected[0], attend([q, k, v])[0]) < LIMITS[dtype]


def test_scores_that_bfloat16_rounds_count_with_all_their_bits(found):
    x = inputs(GRID, torch.bfloat16, dim=32)
    x[0] *= 4  # up to 16: rounded, they would be up to 1/32 off
    check(x, LIMITS[torch.bfloat16])
    assert all(found)


def test_what_is_not_a_number_is_not_hidden():
    q, k, v = inputs(GRID, torch.float32)
    q[0, 5, 1] = float("nan")
    o, lse = attend([q, k, v])
    assert o[0, 5, 1].isnan().all() and lse[0, 5, 1].isnan()
    assert o.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("bf16, amx", [(True, False), (True, True), (False, False)])
def test_where_they_are_taken(monkeypatch, bf16, amx):
    monkeypatch.setattr(products, "AVX512_BF16", bf16)
    monkeypatch.setattr(products, "AMX", amx)
    every = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    q = torch.empty(products.LEAST, dtype=torch.uint8)
    expected = [torch.bfloat16] if bf16 and not amx else []
    assert [dtype for dtype in every if products.applies(q, dtype)] == expected
    assert not any(products.applies(q[1:], dtype) for dtype in every)
    assert not any(products.applies(q.to("meta"), dtype) for dtype in every)
