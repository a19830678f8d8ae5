"""A token that is not finite reaches those whose window it lies in, and no others."""

from __future__ import annotations

import pytest
import torch

from linfusion.kernels import TileOrder, window_attention
from linfusion.kernels.window_attention import blocks, pool
from tests.kernels.test_window_attention import inputs, pair, seen, use

GRID, RADIUS, AT = (20, 18), 2, 7 * 18 + 9  # a disc of 9 tokens


@pytest.fixture(params=["reference", "dense", "tiles", "products"])
def impl(request, monkeypatch) -> str:
    if request.param in ("tiles", "products"):
        monkeypatch.setattr(blocks, "SMALL", 0)
        use(monkeypatch, request.param == "products")
    return "reference" if request.param == "reference" else "blocked"


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("tiled", [False, True])
def test_it_reaches_the_tokens_that_see_it(impl, name, lost, tiled):
    x = dict(zip("qkv", inputs(GRID, torch.float32), strict=True))
    order = TileOrder(GRID) if tiled else None
    choices = {"grid": GRID, "radius": RADIUS, "context": pair(3, 5, torch.float32)}

    def attend() -> torch.Tensor:
        tensors = {n: order.permute(t) for n, t in x.items()} if order else x
        o = window_attention(**tensors, **choices, order=order, impl=impl)
        return order.undo(o) if order else o

    whole = attend()
    x[name][1, AT, 0, 3] = lost
    o = attend()
    reached = torch.zeros(2, 360, 2, dtype=torch.bool)
    reached[1, :, 0] = seen(GRID, RADIUS, "disc")[:, AT]
    assert reached.sum() == 9
    assert torch.allclose(o[~reached], whole[~reached], rtol=1e-5, atol=1e-6)
    if name == "v":  # of a key the infinities may cancel
        assert not o[reached].isfinite().all(-1).any()


def test_a_query_is_lost_alone(impl):
    q, k, v = inputs(GRID, torch.float32)
    whole = window_attention(q, k, v, grid=GRID, radius=RADIUS, impl=impl)
    q[1, AT, 0, 3] = float("nan")
    o = window_attention(q, k, v, grid=GRID, radius=RADIUS, impl=impl)
    lost = torch.zeros(2, 360, 2, dtype=torch.bool)
    lost[1, AT, 0] = True
    assert torch.equal(o.isnan().any(-1), lost)
    assert torch.allclose(o[~lost], whole[~lost], rtol=1e-5, atol=1e-6)


def test_a_cell_that_is_covered_may_hold_anything(impl):
    q, k, v = inputs(GRID, torch.float32)
    pooled = [pool(x, GRID, (2, 2)) for x in (k, v)]
    choices = {"grid": GRID, "radius": 4, "cells": (2, 2), "impl": impl}
    whole = window_attention(q, k, v, pooled=tuple(pooled), **choices)
    cell = 5 * 9 + 4
    pooled[1][:, cell] = float("nan")
    o = window_attention(q, k, v, pooled=tuple(pooled), **choices)
    members = [(10 + i) * 18 + 8 + j for i in range(2) for j in range(2)]
    covering = seen(GRID, 4, "disc")[:, members].all(-1)
    assert 0 < covering.sum() < 360
    assert torch.allclose(o[:, covering], whole[:, covering], rtol=1e-5, atol=1e-6)
    assert o[:, ~covering].isnan().all()
