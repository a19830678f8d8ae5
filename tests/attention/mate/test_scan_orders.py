"""The orders of the scan: round trips, the first tokens, and the rotation over layers."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from linfusion.attention.mate.scan_orders import ORDERS, RotaryMajorScan, flatten, unflatten

EVERY = ["".join(p) for p in permutations("thw")]


def coordinates(grid):
    """[1, T, H, W, 3]: every token holds its own place."""
    return torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1)[None]


@pytest.mark.parametrize("order", EVERY)
@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 4, 3), (2, 1, 1)])
def test_unflatten_undoes_flatten(order, grid):
    x = torch.randn(2, *grid, 4)
    assert torch.equal(unflatten(flatten(x, order), grid, order), x)


@pytest.mark.parametrize("order", EVERY)
def test_an_order_is_the_gather_of_its_sorted_coordinates(order):
    x = coordinates((3, 5, 7))
    every = [tuple(c) for c in x.flatten(0, 3).tolist()]
    expected = sorted(every, key=lambda c: [c["thw".index(axis)] for axis in order])
    assert [tuple(c) for c in flatten(x, order)[0].tolist()] == expected


def test_the_published_orders_begin_along_their_axis():
    x = coordinates((3, 5, 7))
    second = [tuple(flatten(x, order)[0, 1].tolist()) for order in ORDERS]
    assert second == [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 0)]
    assert flatten(x, "hwt")[0, 3].tolist() == [0, 0, 1]
    assert flatten(x, "wht")[0, 3].tolist() == [0, 1, 0]


def test_a_picture_has_rows_and_columns_alone():
    x = coordinates((1, 4, 3))
    assert torch.equal(flatten(x, "hwt"), flatten(x, "thw"))
    assert torch.equal(flatten(x, "wht"), flatten(x, "twh"))


def test_frame_order_moves_nothing():
    x = torch.randn(1, 2, 3, 4, 5)
    assert flatten(x, "thw").data_ptr() == x.data_ptr()


def test_layers_take_turns():
    scan = RotaryMajorScan(("thw", "wth"))
    assert [scan.for_layer(layer) for layer in range(4)] == ["thw", "wth", "thw", "wth"]


@pytest.mark.parametrize("orders", [(), ("thw", "tth"), "thw"])
def test_what_is_no_order_is_refused(orders):
    with pytest.raises(ValueError, match="orders: got"):
        RotaryMajorScan(orders)


def test_a_grid_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"grid: got \(2, 3, 4\) for 20 tokens"):
        unflatten(torch.zeros(1, 20, 3), (2, 3, 4), "thw")
