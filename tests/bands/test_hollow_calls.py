"""Shapes that are remembered are those that would be found again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

from linfusion.bands import hollow
from linfusion.bands.hollow import like_of


def found(func, *args, **kwargs):
    flat, tree = tree_flatten((args, kwargs))
    return like_of(func, flat, tree, lambda t: torch.empty_like(t, device="meta"))


def test_numbers_dtypes_and_what_a_function_closes_over_tell_calls_apart():
    x, whole = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    for _ in range(2):  # found, then remembered
        assert found(torch.add, whole, 1).dtype == torch.int64
        assert found(torch.add, whole, 1.0).dtype == torch.float32
        assert found(torch.add, x, True).dtype == torch.float32
        assert found(F.silu, x) == ((2, 3), torch.float32)
        assert found(F.silu, x.double()) == ((2, 3), torch.float64)
        for order in ([0, 1], [1, 0]):
            assert found(lambda t, order=order: t.permute(order), x).shape == x.permute(order).shape
            assert found(_permuted(order), x).shape == x.permute(order).shape
        assert found(torch.cat, [x, x], dim=1).shape == (2, 6)
        assert found(torch.cat, [x, x, x], 1).shape == (2, 9)


def _permuted(order):
    return lambda t: t.permute(order)


def test_nothing_that_is_large_is_remembered():
    held = torch.zeros(4, 3)
    before = len(hollow._KNOWN)

    class Layer:
        def __call__(self, t):
            return t @ held.T.to(t.device)

    assert found(Layer(), torch.zeros(5, 3)).shape == (5, 4)
    assert len(hollow._KNOWN) == before
    assert found(lambda t: t @ held.T.to(t.device), torch.zeros(5, 3)).shape == (5, 4)
    assert all(not isinstance(part, torch.Tensor) for key in hollow._KNOWN for part in key)
