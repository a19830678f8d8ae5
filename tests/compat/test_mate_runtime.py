"""MATE under offloading, casting and autocast, and in diffusers' own video pipelines."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading

import linfusion
from tests.tiny_video_hosts import forward, inputs, tiny_cogvideox, tiny_sana, tiny_wan
from tests.tiny_video_pipelines import (
    tiny_cogvideox_pipeline,
    tiny_sana_pipeline,
    tiny_wan_pipeline,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

CPU = torch.device("cpu")
HOSTS = {"wan": tiny_wan, "sana": tiny_sana, "cogvideox": tiny_cogvideox}
PIPELINES = {
    "wan": tiny_wan_pipeline,
    "sana": tiny_sana_pipeline,
    "cogvideox": tiny_cogvideox_pipeline,
}
OFFLOADS = {
    "sequential": lambda model: cpu_offload(model, CPU),
    "model": lambda model: cpu_offload_with_hook(model, CPU),
    "group": lambda model: apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    ),
}
each_host = pytest.mark.parametrize("host", list(HOSTS))


def student(host):
    """Both branches in full, so that the scan shows."""
    return linfusion.linearize(HOSTS[host](), "mate", window=(2, 2, 2), branch_mix="sum")


@each_host
@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("first", ["linearize", "offload"])
def test_an_offloaded_model_computes_the_same(host, name, first):
    model = HOSTS[host]()
    given, expected = inputs(model), forward(student(host), inputs(model))
    if first == "offload":
        OFFLOADS[name](model)
    linfusion.linearize(model, "mate", window=(2, 2, 2), branch_mix="sum")
    if first == "linearize":
        OFFLOADS[name](model)
    for _ in range(2):
        torch.testing.assert_close(forward(model, given), expected, atol=1e-5, rtol=0)
    linfusion.restore(model)
    plain = HOSTS[host]()
    torch.testing.assert_close(forward(model, given), forward(plain, given), atol=1e-6, rtol=0)


@each_host
def test_weights_may_be_stored_in_bfloat16_and_computed_in_float32(host):
    model = student(host)
    given = inputs(model)
    expected = forward(model, given)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    (attn, *_) = [m for n, m in model.named_modules() if n.endswith("attn1")]
    assert attn.mate.ma.in_proj.weight.dtype == torch.bfloat16
    difference = (forward(model, given) - expected).norm() / expected.norm()
    assert 0 < difference < 3e-2


@each_host
def test_under_autocast_it_stays_near_float32(host):
    model = student(host)
    given = inputs(model)
    expected = forward(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(model, given)
    assert (out - expected).norm() / expected.norm() < 3e-2


def test_it_compiles_into_one_graph():
    model = tiny_wan(num_layers=1)
    linfusion.linearize(model, "mate", window=(8, 8, 8), branch_mix="sum")
    given = inputs(model, (2, 2, 2))
    expected = forward(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(forward(compiled, given), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("host", ["wan", "cogvideox"])
def test_a_pipeline_draws_what_softmax_draws_under_windows_of_the_whole_video(host):
    pipe = PIPELINES[host]()
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for step in ("softmax", "covering", "small", "restored"):
        if step == "covering":
            linfusion.linearize(pipe, "mate", window=(16, 16, 16))
        elif step == "small":
            linfusion.restore(pipe)
            linfusion.linearize(pipe, "mate", window=(1, 2, 2))
        elif step == "restored":
            linfusion.restore(pipe)
        drawn.append(
            pipe(
                "a cat",
                height=32,
                width=32,
                num_frames=9,
                num_inference_steps=2,
                guidance_scale=2.0,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
        )
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-4, rtol=0)
    assert (drawn[2] - drawn[0]).abs().max() > 1e-2
    assert torch.equal(drawn[3], drawn[0])


def test_sana_video_draws_with_it():
    pipe = tiny_sana_pipeline()
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for turn in (linfusion.linearize, linfusion.restore):
        turn(pipe, **({"method": "mate"} if turn is linfusion.linearize else {}))
        drawn.append(
            pipe(
                "a cat",
                height=32,
                width=32,
                frames=5,
                num_inference_steps=2,
                use_resolution_binning=False,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
        )
    assert drawn[0].isfinite().all() and (drawn[0] - drawn[1]).abs().max() > 1e-3
