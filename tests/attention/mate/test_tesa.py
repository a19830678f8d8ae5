"""Attention in windows of a video: against its mask written out, whole and in blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from linfusion.attention.mate.tesa import TESA


def layer(window=(4, 3, 2), **options):
    torch.manual_seed(0)
    made = TESA(16, 2, window, **options)
    for norm in (made.norm_q, made.norm_k):
        if norm is not None:
            torch.nn.init.normal_(norm.weight, 1, 0.3)
    return made.double()


def video(*grid, batch=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, *grid, 16, generator=g, dtype=torch.float64)


def masked(attn, x, mask):
    """Attention over all tokens with a mask [N, N]."""
    tokens = x.flatten(1, 3)
    q, k, v = (p(tokens).unflatten(-1, (2, 8)) for p in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    return attn.to_out[0](out).view_as(x)


def along(size, window, first):
    """Which window of one axis each token is in, when the first has `first` tokens."""
    return (torch.arange(size) + window - first) // window


def same_window(grid, window, firsts):
    """[N, N]: whether two tokens share a window; an axis that one window covers has one."""
    same = torch.ones(1, 1, dtype=torch.bool)
    for size, w, first in zip(grid, window, firsts, strict=True):
        of = along(size, w, first) if size > w else torch.zeros(size)
        one = of[:, None] == of
        same = (same[:, None, :, None] & one[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return same


@pytest.mark.parametrize("grid", [(9, 7, 5), (4, 3, 2), (5, 2, 3), (1, 7, 4), (11, 4, 1)])
@pytest.mark.parametrize(
    "shift, mode, firsts",
    [
        (False, "pad", (4, 3, 2)),
        (True, "pad", (2, 2, 1)),  # window - window // 2
        (True, "roll", (2, 1, 1)),  # window // 2
    ],
)
def test_it_is_attention_with_the_mask_of_its_windows(grid, shift, mode, firsts):
    attn, x = layer(shift=shift, shift_mode=mode), video(*grid)
    expected = masked(attn, x, same_window(grid, (4, 3, 2), firsts))
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=1e-10)


def test_roll_is_swin_s_cyclic_shift_with_its_mask():
    attn, x = layer((4, 3, 2), shift=True, shift_mode="roll"), video(8, 6, 4)
    rolled = x.roll((-2, -1, -1), (1, 2, 3))
    regions = torch.zeros(8, 6, 4)
    for n, (size, w, s) in enumerate([(8, 4, 2), (6, 3, 1), (4, 2, 1)]):
        of = torch.zeros(size)
        of[-w:-s], of[-s:] = 1, 2
        regions += 3**n * of.view([-1 if axis == n else 1 for axis in range(3)])
    flat = regions.flatten()
    mask = same_window((8, 6, 4), (4, 3, 2), (4, 3, 2)) & (flat[:, None] == flat)
    expected = masked(attn, rolled, mask).roll((2, 1, 1), (1, 2, 3))
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_a_window_over_the_whole_grid_is_full_attention_of_diffusers(shift):
    attn, x = layer((8, 8, 8), shift=shift, qk_norm=False), video(5, 3, 7)
    full = Attention(16, heads=2, dim_head=8).double()
    full.load_state_dict(attn.state_dict())  # the same keys
    expected = full(x.flatten(1, 3)).view_as(x)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1, 1, 1, 1, 1, 1), (3, 2, 2, 2), (1, 4, 4), (9,)])
@pytest.mark.parametrize("shift, firsts", [(False, (4, 3, 2)), (True, (2, 2, 1))])
def test_blocks_are_the_mask_of_windows_and_of_what_has_come(blocks, shift, firsts):
    attn, x = layer(shift=shift), video(9, 5, 3)
    parts, start = [], 0
    for frames in blocks:
        seen = attn.reach(start)
        assert seen < 4
        past = x[:, start - seen : start] if seen else None
        parts.append(attn(x[:, start : start + frames], past, start))
        start += frames
    of = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
    of = of.repeat_interleave(15)
    mask = same_window((9, 5, 3), (4, 3, 2), firsts) & (of[:, None] >= of)
    expected = masked(attn, x, mask)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-12, rtol=1e-10)
    together = attn(x, None, 0, blocks)
    torch.testing.assert_close(together, expected, atol=1e-12, rtol=1e-10)
    first = blocks[0]  # and the others after it
    if first < 9:
        others = attn(x[:, first:], x[:, :first], first, blocks[1:])
        torch.testing.assert_close(others, expected[:, first:], atol=1e-12, rtol=1e-10)


def test_it_costs_twice_as_much_for_twice_the_frames():
    attn = layer().float()

    def flops(frames):
        with FlopCounterMode(display=False) as counter:
            attn(torch.zeros(1, frames, 6, 4, 16))
        return counter.get_total_flops()

    assert flops(32) == 2 * flops(16) > 0


def test_every_parameter_gets_a_gradient():
    attn = layer(shift=True, bias=True)
    attn(video(5, 4, 3)).square().sum().backward()
    # A bias of the keys moves all scores of a query alike, but the norm sees it.
    assert all(p.grad is not None and p.grad.any() for p in attn.parameters())


def test_a_backend_of_diffusers_serves_it():
    from diffusers.models.attention_dispatch import attention_backend

    attn, x = layer(shift=True), video(5, 4, 3)
    with attention_backend("_native_math"):
        out = attn(x)
    torch.testing.assert_close(out, attn(x), atol=1e-12, rtol=1e-10)
    assert F.mse_loss(out, x) > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "num_heads: got 3, expected a divisor of 16"),
        ({"window": (4, 0, 2)}, r"window: got \(4, 0, 2\), expected three positive"),
        ({"shift_mode": "wrap"}, "shift_mode: got 'wrap', expected one of"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        TESA(16, **({"num_heads": 2} | options))


def test_a_bad_input_is_named():
    attn = layer()
    with pytest.raises(ValueError, match=r"x: expected \[B, T, H, W, 16\], got \(2, 3, 16\)"):
        attn(torch.zeros(2, 3, 16).double())
    with pytest.raises(ValueError, match="past: got none frames, expected at least 3"):
        attn(video(2, 3, 2), None, 7)
    with pytest.raises(ValueError, match="past: got"):
        attn(video(2, 3, 2), video(3, 3, 2))
    for start, blocks in ((None, (2,)), (0, (1, 2)), (0, (2, 0)), (0, ())):
        with pytest.raises(ValueError, match=r"blocks: got .*, expected 2 frames in all, and"):
            attn(video(2, 3, 2), None, start, blocks)
