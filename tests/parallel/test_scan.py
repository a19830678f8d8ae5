"""MATE over the rows of several ranks is MATE over all of them: scans, windows, review tokens."""

from __future__ import annotations

import pytest
import torch

from linfusion.attention.mate.layer import MATE
from linfusion.parallel.ranks import cut_rows
from linfusion.parallel.shard import Shard
from tests.parallel.pool import cases, run
from tests.parallel.test_ranks import compare, error, tokens

ORDERS = ("thw", "twh", "hwt", "wht")


def lively(layer):
    """Decays that differ, so that where a state came from matters."""
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return layer.double()


def whole(ranks, grid, options, dtype):
    torch.manual_seed(0)
    layer = lively(MATE(8, 2, 1, headdim=4, d_state=4, **options)).to(dtype)
    rows = layer.review_pool[1]
    shard = Shard(ranks, grid, cut_rows(grid[1], ranks.world, rows), rows)
    x = tokens(dtype, 2, grid[0] * grid[1] * grid[2], 8)

    def single(video, *parameters):
        functional = dict(zip(names, parameters, strict=True))
        out = torch.func.functional_call(layer, functional, (video.flatten(1, 3), grid))
        return out.unflatten(1, grid).transpose(1, 2)

    def sharded(video, *parameters):
        functional = dict(zip(names, parameters, strict=True))
        own = video.flatten(1, 3)
        out = torch.func.functional_call(layer, functional, (own, shard.local))
        return out.unflatten(1, tuple(shard.local)).transpose(1, 2)

    names = [n for n, _ in layer.named_parameters()]
    parameters = [p.detach() for p in layer.parameters()]

    def rows_first(call):
        return lambda video, *parameters: call(video.transpose(1, 2), *parameters)

    inputs = (x.unflatten(1, grid).transpose(1, 2).contiguous(), *parameters)
    dims = (1, *[None] * len(parameters))
    single, sharded = rows_first(single), rows_first(sharded)
    return compare(ranks, shard.cuts, (single, inputs), sharded, dims, dtype)


CASES = {
    # Every order, a window over each cut, both directions read the review tokens first.
    "orders": ((3, 8, 3), {"window": (2, 3, 2)}),
    # The backward direction reads the review tokens last; rows are pooled unevenly at the border.
    "front": ((2, 7, 3), {"review_placement": "front", "review_pool": (1, 2, 3)}),
    # One frame: rows are the slowest axis, tokens stay where they are; more taps than some pieces.
    "picture": ((1, 5, 2), {"review_placement": "none", "d_conv": 8, "review_pool": (1, 1, 1)}),
    # The wrapped windows of Swin, one window larger than the grid.
    "roll": ((2, 8, 3), {"shift_mode": "roll", "window": (8, 5, 2), "branch_mix": "gated"}),
    "no taps": ((2, 4, 2), {"d_conv": 1, "review_pool": (2, 1, 2)}),
}


@pytest.mark.parametrize("world", cases([3], [2, 4]))
@pytest.mark.parametrize("name", CASES)
def test_a_shared_video_is_mixed_as_one(name, world):
    grid, options = CASES[name]
    if -(-grid[1] // options.get("review_pool", (2, 2, 2))[1]) < world:
        world = 2
    for order in ORDERS if name in ("orders", "front") else ORDERS[:1]:
        case = {**options, "scan_orders": (order,)}
        assert max(run(world, whole, grid, case, torch.float64)) < 1e-10, order


def test_a_shared_video_is_mixed_as_one_in_float32():
    assert max(run(3, whole, *CASES["orders"], torch.float32)) < 2e-5


def blocks(ranks, order):
    """States and outputs of a video that comes in blocks, and how far they are from one rank's."""
    torch.manual_seed(0)
    layer = lively(MATE(8, 2, 1, headdim=4, d_state=4, window=(4, 3, 2), scan_orders=(order,)))
    past, own, errors = None, None, []
    for step, sizes in enumerate([(3,), (2, 1), (2,)]):
        grid = (sum(sizes), 8, 3)
        shard = Shard(ranks, grid, cut_rows(8, ranks.world, 2), 2)
        x = tokens(torch.float64, 1, grid[0] * 24, 8, seed=step)
        with torch.no_grad():
            out, past = layer(x, grid, blocks=sizes, past=past, return_state=True)
            here = None if own is None else shard.take_state(own)
            mine, after = layer(
                shard.take(x), shard.local, blocks=sizes, past=here, return_state=True
            )
        own = shard.join_state(after)
        errors.append(error(shard.join(mine), out))
        assert own.frames == past.frames
        for a, b in zip(own[1:], past[1:], strict=True):
            assert a.shape == b.shape
            errors.append(error(a, b) if a.numel() else 0.0)
    return max(errors)


@pytest.mark.parametrize("order", ["thw", "hwt"])
def test_the_state_of_a_shared_stream_is_that_of_one_process(order):
    assert max(run(3, blocks, order)) < 1e-10
