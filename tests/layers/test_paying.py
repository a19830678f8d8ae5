"""From when on a layer pays: by computed time on a GPU, by multiplications elsewhere."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from diffusers import UNet2DConditionModel

import linfusion
from linfusion.attention import cost, get_method
from linfusion.attention.cost import H100, RTX_4090
from linfusion.layers import paying
from tests.tiny import tiny_unet


def xl() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion XL with fewer layers a level, without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=64,
            layers_per_block=1,
            use_linear_projection=True,
        )


@pytest.fixture(params=[H100, RTX_4090], ids=lambda card: card.name)
def card(request, monkeypatch):
    module = import_module("linfusion.summary")  # as an attribute it is the function
    monkeypatch.setattr(module, "card_of", lambda model: request.param)
    monkeypatch.setattr("linfusion.students.wanted.card_of", lambda model: request.param)
    return request.param


def test_a_summary_on_a_gpu_is_of_time(card):
    found = linfusion.summary(xl(), "linfusion")
    assert found.card == card.name
    for layer in found.layers:
        linear, softmax = (
            cost.seconds(passes, card)
            for passes in (
                cost.linfusion(1, layer.break_even_tokens, layer.heads, 64, None, 20.0),
                cost.softmax(1, layer.break_even_tokens, layer.heads, 64),
            )
        )
        assert linear < softmax == pytest.approx(linear, rel=0.001)
    text = str(found)
    assert "less time from" in text and f"for an {card.name}" in text and "FLOPs" not in text


def test_sdxl_at_its_own_size_gains_little_and_only_at_its_first_level(card):
    found = linfusion.summary(xl(), "linfusion")
    assert found.milliseconds is not None
    softmax, linear = found.milliseconds
    assert 0.65 < linear / softmax < 1
    assert {x.break_even_tokens < 4096 for x in found.layers if x.channels == 640} == {True}
    assert {x.break_even_tokens > 3 * 1024 for x in found.layers if x.channels == 1280} == {True}
    assert f"take {softmax:.1f} ms a picture as softmax, {linear:.1f} ms" in str(found)


def taken(size: int) -> set[int]:
    """Channels of the layers that "auto" takes."""
    unet = xl()
    linfusion.linearize(unet, "linfusion", layers="auto", size=size)
    return {layer.channels for layer in linfusion.summary(unet).layers if layer.linear}


def test_auto_counts_multiplications_on_no_gpu():
    assert taken(1664) == {640, 1280}


def test_auto_takes_what_pays_in_time(card):
    """The second level sees 2,704 tokens at 1,664 px: fewer multiplications, but more time."""
    assert taken(1664) == {640}
    assert taken(2176) == {640, 1280}


def test_a_model_that_is_on_no_gpu_is_judged_by_multiplications():
    assert paying.card_of(tiny_unet()) is None
    found = linfusion.summary(tiny_unet())
    assert found.card is None and found.milliseconds is None
    assert "fewer FLOPs from" in str(found)


@pytest.mark.parametrize("capability, expected", [((9, 0), H100), ((8, 9), RTX_4090)])
def test_the_card_is_one_of_the_same_kind(capability, expected, monkeypatch):
    class Pretended:
        device = torch.device("cuda", 0)

        def parameters(self):
            return iter([self])

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.version.hip", None)
    assert paying.card_of(Pretended()) is expected


@pytest.mark.parametrize("head_dim", [64, 160])
def test_the_break_even_of_a_window_and_of_a_scan_is_where_times_cross(head_dim):
    from types import SimpleNamespace

    attn = SimpleNamespace(heads=4, query_dim=4 * head_dim, inner_dim=4 * head_dim)
    window = {"radius": 8, "down_factor": 4}
    scan = {"layer": 0, "qk_norm": None, "qk_norm_eps": None}
    for name, setting in (("clear", window), ("mate", scan)):
        method = get_method(name)
        tokens = paying.tokens_from(method, attn, setting, H100)
        for n, sign in ((tokens, 1), (tokens - 1, -1)):
            softmax, linear = paying.times(method, attn, setting, H100, n)
            assert (softmax - linear) * sign > 0 or softmax == linear
        assert 256 < tokens < 1 << 16
