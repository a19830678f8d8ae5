"""The roofline: its arithmetic, and that the docs show what it says now."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from linfusion.attention import cost
from linfusion.attention.cost import CARDS, H100, RTX_4090, Card, Pass

# A card of which everything can be done in the head.
ROUND = Card("", 1e9, 1e12, dict.fromkeys((*H100.reached,), 0.5))


def test_a_pass_takes_the_longer_of_its_bytes_and_its_products():
    assert Pass("gemm", bytes=1e9, flops=1e9).seconds(ROUND) == 2
    assert Pass("gemm", bytes=1e6, flops=2e12).seconds(ROUND) == 4
    assert cost.seconds([Pass("stream", 1e9), Pass("stream", 2e9)], ROUND) == 6


def test_a_layer_moves_and_multiplies_what_can_be_counted_by_hand():
    # 2 pictures of 100 tokens, 3 heads of 40: 24,000 numbers, 120 channels.
    core, maps, elementwise = cost.linfusion(2, 100, 3, 40)
    assert (core.bytes, core.flops) == (4 * 2 * 24_000, 2 * 2 * 24_000 * 40)
    assert maps.flops == 4 * 2 * 200 * 120 * 120
    assert maps.bytes == 2 * 200 * 4 * (120 + 120)
    assert elementwise.bytes == 28 * 24_000
    assert cost.linfusion(2, 100, 3, 40, mid=60)[1].flops == maps.flops / 2
    assert [one.kind for one in cost.linfusion(2, 100, 3, 40, mid=-1)] == ["stream", "elementwise"]
    (full,) = cost.softmax(2, 100, 3, 40)
    assert full == Pass("softmax 64", 4 * 2 * 24_000, 2 * 2 * 2 * 3 * 100 * 100 * 64)
    assert cost.softmax(1, 8, 1, 72)[0].kind == "softmax 128"


def test_a_scan_moves_states_by_the_chunk():
    (short,), (long,) = (cost.scan(1, 65_536, 32, 64, 64, chunk) for chunk in (64, 256))
    state = 32 * 64 * 64 * 4
    assert short.bytes - long.bytes == 4 * (1024 - 256) * state
    assert short.bytes == pytest.approx(3.0e9, rel=0.02)
    assert long.bytes == pytest.approx(1.4e9, rel=0.02)
    ragged = cost.scan(1, 65, 1, 8, 8, 64)[0].bytes - cost.scan(1, 64, 1, 8, 8, 64)[0].bytes
    assert ragged > 4 * 8 * 8 * 4  # the 65th token has a chunk, and a state, of its own


@pytest.mark.parametrize(
    "grid, radius", [((64, 64), 8), ((32, 64), 16), ((16, 16), 100), ((8, 8), 1)]
)
def test_keys_visited_are_those_of_the_kernel_s_lists(grid, radius):
    from linfusion.kernels.window_attention.common import bounded
    from linfusion.kernels.window_attention.triton.lists import lists

    tables = lists(grid, bounded(radius, grid), "disc", torch.device("cpu"))
    visited = 64 * (tables.whole + tables.part) / tables.tiles
    assert cost.keys_visited(grid, radius) == pytest.approx(visited)


def test_a_window_that_sees_everything_is_the_whole_picture():
    pixels, text = cost.window(1, (16, 16), 100, 2, 64, text=10)
    (whole,) = cost.softmax(1, 266, 2, 64)
    assert pixels.flops + text.flops == whole.flops


def test_sdxl_at_1024_px_gains_practically_nothing_on_either_card():
    for card in CARDS:
        linear = cost.seconds(cost.linfusion(2, 4096, 10, 64), card)
        full = cost.seconds(cost.softmax(2, 4096, 10, 64), card)
        assert 1.1 < full / linear < 1.3, card.name
    assert cost.seconds(cost.linfusion(2, 4096, 10, 64), H100) == pytest.approx(119e-6, rel=0.02)
    assert cost.seconds(cost.softmax(2, 4096, 10, 64), H100) == pytest.approx(145e-6, rel=0.02)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("heads, columns, mid", [(8, 40, None), (10, 64, None), (8, 160, 640)])
def test_at_the_break_even_both_take_as_long(card, heads, columns, mid):
    n = cost.break_even_tokens(card, heads, columns, mid)
    parts = -(-columns // 128)

    def ratio(tokens: int) -> float:
        full = cost.softmax(1, tokens, heads * parts, -(-columns // parts))
        return cost.seconds(full, card) / cost.seconds(
            cost.linfusion(1, tokens, heads, columns, mid), card
        )

    assert ratio(n - 2) < 1 <= ratio(n + 1)


def test_it_begins_later_than_the_products_alone_say():
    assert 2 < cost.break_even_tokens(H100, 10, 64) / (2 * 640 + 64) < 3
    assert cost.break_even_tokens(RTX_4090, 10, 64, elementwise=8) < 3000


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="head_dim: got 160; expected 1 to 128"):
        cost.softmax(1, 8, 1, 160)
    with pytest.raises(
        ValueError, match=r"grid: got \(60, 64\); expected multiples of the tile, 8"
    ):
        cost.keys_visited((60, 64), 8)


def test_the_docs_show_the_tables_of_today():
    text = roofline.PAGE.read_text()
    assert roofline.page_with(text) == text, "run python -m benchmarks.roofline --write"
