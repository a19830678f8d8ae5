"""MATE: its branches, its review tokens, and blocks that carry a state."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linfusion.attention.mate.layer import MATE, pool
from linfusion.attention.mate.scan_orders import flatten, unflatten


def layer(layer_idx=1, **options):
    torch.manual_seed(0)
    options = {"window": (4, 3, 2), "d_state": 6, "chunk_size": 8} | options
    made = MATE(16, 2, layer_idx, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(grid, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, grid[0] * grid[1] * grid[2], 16, generator=g).to(dtype)


@pytest.mark.parametrize("size", [(2, 2, 2), (1, 3, 3), (8, 8, 8)])
@pytest.mark.parametrize("grid", [(5, 3, 7), (1, 4, 4)])
def test_review_tokens_are_the_means_of_what_is_there(grid, size):
    x = tokens(grid).view(2, *grid, 16)
    pooled = pool(x, size)
    assert pooled.shape[1:4] == tuple(-(-n // k) for n, k in zip(grid, size, strict=True))
    last = [slice((n - 1) // k * k, None) for n, k in zip(grid, size, strict=True)]
    expected = x[:, last[0], last[1], last[2]].mean((1, 2, 3))
    torch.testing.assert_close(pooled[:, -1, -1, -1], expected)
    torch.testing.assert_close(pool(torch.full_like(x, 3), size), torch.full_like(pooled, 3))


@pytest.mark.parametrize("layer_idx", range(4))
def test_without_review_it_is_mamba_in_its_order_plus_windows(layer_idx):
    mate, grid = layer(layer_idx, review_placement="none"), (5, 3, 4)
    x = tokens(grid)
    video = x.view(2, *grid, 16)
    order = ("thw", "twh", "hwt", "wht")[layer_idx]
    expected = unflatten(mate.ma(flatten(video, order)), grid, order) + mate.te(video)
    torch.testing.assert_close(mate(x, grid), expected.flatten(1, 3), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("placement, first", [("front", False), ("both", True)])
def test_review_tokens_come_first_in_the_order_of_the_layer(placement, first):
    mate, grid = layer(2, review_placement=placement, use_te=False), (5, 3, 4)
    x = tokens(grid)
    video = x.view(2, *grid, 16)
    front = flatten(pool(video, (2, 2, 2)), "hwt")
    sequence = torch.cat([front, flatten(video, "hwt")], 1)
    y = mate.ma(sequence, lead=front.shape[1], lead_first=first)
    expected = unflatten(y, grid, "hwt").flatten(1, 3)
    torch.testing.assert_close(mate(x, grid), expected, atol=1e-12, rtol=1e-10)
    other = layer(2, review_placement="none", use_te=False)
    assert (other(x, grid) - expected).abs().max() > 1e-3


def test_a_fresh_gate_is_the_sum():
    torch.manual_seed(0)
    gated = MATE(16, 2, branch_mix="gated", d_state=6)
    plain = MATE(16, 2, d_state=6)
    plain.load_state_dict(gated.state_dict(), strict=False)
    x = tokens((3, 4, 4), dtype=torch.float32)
    torch.testing.assert_close(gated(x, (3, 4, 4)), plain(x, (3, 4, 4)))


@pytest.mark.parametrize("branch", ["ma", "te"])
def test_a_gate_weighs_its_own_branch(branch):
    mate, grid, x = layer(branch_mix="gated"), (3, 4, 4), tokens((3, 4, 4))
    alone = layer(use_ma=branch == "ma", use_te=branch == "te")
    alone.load_state_dict(mate.state_dict(), strict=False)
    with torch.no_grad():
        mate.mix.weight.zero_()
        mate.mix.bias.copy_(torch.tensor([50.0, -50.0] if branch == "ma" else [-50.0, 50.0]))
    torch.testing.assert_close(mate(x, grid), 2 * alone(x, grid), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("layer_idx", range(4))
@pytest.mark.parametrize("placement", ["front", "both", "none"])
def test_blocks_one_by_one_are_all_blocks_at_once(layer_idx, placement):
    mate, blocks = layer(layer_idx, review_placement=placement), (1, 3, 3, 3)
    grid = (10, 3, 5)
    x = tokens(grid)
    whole, last = mate(x, grid, blocks=blocks, return_state=True)
    parts, state = [], None
    for run in x.split([frames * 15 for frames in blocks], 1):
        frames = run.shape[1] // 15
        y, state = mate(run, (frames, 3, 5), blocks=[frames], past=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    assert state.frames == last.frames == 10


@pytest.mark.parametrize("layer_idx", range(4))
def test_a_block_sees_its_past_and_nothing_later(layer_idx):
    mate, blocks, grid = layer(layer_idx), (2, 3, 3), (8, 3, 5)
    x = tokens(grid)
    changed = x.clone()
    changed[:, 2 * 15 : 5 * 15] += 1  # the middle block
    moved = (mate(changed, grid, blocks=blocks) - mate(x, grid, blocks=blocks)).abs()
    moved = moved.amax((0, 2)).view(8, 15).amax(1)
    assert not moved[:2].any() and (moved[2:] > 1e-9).all()


def silenced(mate, suffix):
    """Without the direction whose parameters end so."""
    conv = getattr(mate.ma, f"conv1d{suffix}")
    with torch.no_grad():
        for t in (conv.weight, conv.bias, getattr(mate.ma, f"D{suffix}")):
            t.zero_()
    return mate


@pytest.mark.parametrize("layer_idx", range(4))
@pytest.mark.parametrize("placement", ["front", "both"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_blocks_are_one_scan_forward_and_one_a_block_backward(layer_idx, placement, direction):
    mate = silenced(
        layer(layer_idx, review_placement=placement, use_te=False),
        "_b" if direction == "forward" else "",
    )
    blocks, grid = (2, 3, 3), (8, 3, 5)
    video = tokens(grid).view(2, *grid, 16)
    runs, leads, pooled = [], [], []
    for block in video.split(blocks, 1):
        own = pool(block, (2, 2, 2))
        # Its own review tokens, after the last two pooled frames of what came before.
        seen = torch.cat([*[f for p in pooled for f in p.split(1, 1)][-2:], own], 1)
        pooled.append(own)
        front = flatten(seen, mate.order)
        runs.append(torch.cat([front, flatten(block, mate.order)], 1))
        leads.append(front.shape[1])
    first = placement == "both"
    if direction == "forward":
        whole = mate.ma(torch.cat(runs, 1)).split([run.shape[1] for run in runs], 1)
        outs = [y[:, lead:] for y, lead in zip(whole, leads, strict=True)]
    else:
        outs = [
            mate.ma(run, lead=lead, lead_first=first) for run, lead in zip(runs, leads, strict=True)
        ]
    expected = [
        unflatten(y, (frames, 3, 5), mate.order).flatten(1, 3)
        for y, frames in zip(outs, blocks, strict=True)
    ]
    torch.testing.assert_close(
        mate(video.flatten(1, 3), grid, blocks=blocks), torch.cat(expected, 1), atol=1e-10, rtol=0
    )


def test_the_forward_scan_of_frame_order_does_not_notice_blocks():
    mate = silenced(layer(0, review_placement="none", use_te=False), "_b")
    grid, x = (7, 3, 4), tokens((7, 3, 4))
    torch.testing.assert_close(
        mate(x, grid, blocks=(1, 2, 2, 2)), mate(x, grid), atol=1e-10, rtol=1e-8
    )


def test_it_costs_twice_as_much_for_twice_the_frames():
    mate = layer(chunk_size=64).float()

    def flops(frames):
        with FlopCounterMode(display=False) as counter:
            mate(torch.zeros(1, frames * 24, 16), (frames, 6, 4))
        return counter.get_total_flops()

    assert 1.9 < flops(64) / flops(32) < 2.1


@pytest.mark.parametrize("placement", ["front", "both"])
def test_gradients_reach_every_parameter_and_every_token(placement):
    mate = layer(branch_mix="gated", review_placement=placement)
    x = tokens((4, 3, 4)).requires_grad_()
    mate(x, (4, 3, 4), blocks=(2, 2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mate.parameters())
    assert x.grad.any(-1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"review_pool": (2, 2)}, r"review_pool: got \(2, 2\), expected three"),
        ({"review_placement": "back"}, "review_placement: got 'back', expected one of"),
        ({"review_memory": -1}, "review_memory: got -1, expected 0 or more"),
        ({"branch_mix": "mean"}, "branch_mix: got 'mean', expected one of"),
        ({"use_ma": False, "use_te": False}, "use_ma: got False with use_te False"),
        ({"scan_orders": ("abc",)}, "orders: got"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MATE(16, 2, **options)


def test_a_bad_input_is_named():
    mate, x = layer(), tokens((2, 3, 4))
    with pytest.raises(ValueError, match=r"grid: got \(2, 3, 5\) for 24 tokens"):
        mate(x, (2, 3, 5))
    with pytest.raises(ValueError, match=r"blocks: got \(1, 2\), expected 2 frames in all"):
        mate(x, (2, 3, 4), blocks=(1, 2))
    with pytest.raises(ValueError, match="blocks: got None with a state"):
        mate(x, (2, 3, 4), return_state=True)
    with pytest.raises(ValueError, match="blocks: 'hydra' sees what is to come"):
        layer(bidirectional="hydra", d_conv=7)(x, (2, 3, 4), blocks=(1, 1))
