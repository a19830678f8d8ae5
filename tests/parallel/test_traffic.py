"""The docs' table of bytes is computed by formulas; here is what tiny models really send."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.traffic import flux_sent, layers_of, sdxl, unet_sent, wan_sent
from linfusion.linearize import linearize
from tests import tiny_video_hosts
from tests.parallel.pool import run
from tests.parallel.sharing import shared, watched
from tests.tiny import UNET, tiny_unet, unet_inputs
from tests.tiny_joint import FLUX, flux_inputs, tiny_flux
from tests.tiny_video_hosts import WAN, tiny_wan

SIDE = 12  # rows and columns of tokens: 4 rows a rank


def unet():
    model = linearize(tiny_unet(), "linfusion")
    inputs = unet_inputs(model)
    inputs["sample"] = torch.zeros(1, 4, 2 * SIDE, 2 * SIDE)
    return model, inputs


def flux():
    return linearize(tiny_flux(), "clear", radius=3.5), flux_inputs(SIDE, SIDE)


def wan():
    model = linearize(tiny_wan(num_layers=4), "mate")
    inputs = tiny_video_hosts.inputs(model, (6, SIDE, SIDE), batch=1)
    return model, inputs


def job(ranks, make):
    model, inputs = make()
    with shared(ranks, model), torch.no_grad(), watched() as sent:
        model(**inputs)
    return [n for n in sent if n]


def test_a_unet_sends_what_the_formula_says():
    _, sent, _ = run(3, job, unet)  # the one in the middle
    with torch.device("meta"):
        model = tiny_unet()
        text = torch.empty(1, 5, UNET["cross_attention_dim"])
    layers = layers_of(model, 2 * SIDE, 2 * SIDE, timestep=7, encoder_hidden_states=text)
    expected = unet_sent(layers, 4 * (2 * SIDE) ** 2, 3, element=4)
    assert sum(sent) == pytest.approx(expected.ours)
    assert len(sent) == expected.collectives


def test_flux_sends_what_the_formula_says():
    _, sent, _ = run(3, job, flux)
    expected = flux_sent(
        16 * SIDE,
        3,
        radius=3.5,
        layers=FLUX["num_layers"] + FLUX["num_single_layers"],
        heads=FLUX["num_attention_heads"],
        dim=FLUX["attention_head_dim"],
        text=6,
        channels=FLUX["in_channels"],
        element=4,
    )
    assert sum(sent) == pytest.approx(expected.ours)
    assert len(sent) == expected.collectives
    # Of windows, no more than the rows within the radius, to either side.
    rows = 2 * 3 * SIDE * 2 * FLUX["num_attention_heads"] * FLUX["attention_head_dim"] * 4
    assert sent.count(rows) == 3


def test_wan_sends_what_the_formula_says():
    _, sent, _ = run(3, job, wan)
    expected = wan_sent(
        16 * SIDE,
        3,
        frames=6,
        layers=4,
        heads=WAN["num_attention_heads"],
        dim=WAN["attention_head_dim"],
        channels=WAN["out_channels"] * 4,
        element=4,
    )
    # Review tokens are a third of a rank's in some orders, and not all of them have to move.
    assert sum(sent) == pytest.approx(expected.ours, rel=0.05)
    assert len(sent) == expected.collectives


def test_the_docs_have_what_the_command_prints():
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text("utf-8")
    for name, sent in (("FLUX.1", flux_sent), ("Wan", wan_sent)):
        for world in (2, 8):
            row = sent(4096, world)
            numbers = " | ".join(f"{n / 1e6:,.0f}" for n in (row.ours, row.ulysses, row.ring))
            assert f"| 4096² | {world} | {numbers} |" in page, name
    layers = sdxl(1024)
    row = unet_sent(layers, 4 * 128**2, 8)
    assert f"| SDXL | 1024² | 8 | {row.ours / 1e6:,.0f} | {row.ulysses / 1e6:,.0f} |" in page
    assert f"| {row.collectives} | {row.efficiency:.0%} |" in page
