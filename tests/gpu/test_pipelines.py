"""One pipeline of each mechanism on a GPU, against itself on the CPU. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

import linfusion
from linfusion import HighResPipeline
from tests.tiny import run, tiny_sd_pipeline
from tests.tiny_dit import dit_inputs, tiny_dit
from tests.tiny_dit import forward as dit_forward
from tests.tiny_joint import tiny_flux_pipeline, tiny_sd3_pipeline
from tests.tiny_video_hosts import forward as video_forward
from tests.tiny_video_hosts import inputs as video_inputs
from tests.tiny_video_hosts import tiny_wan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*linearized without weights"),
]
PIPELINES = {
    "linfusion": (tiny_sd_pipeline, {}),
    "clear": (tiny_flux_pipeline, {"height": 32, "width": 24}),
    "clear on Stable Diffusion 3": (tiny_sd3_pipeline, {"height": 32, "width": 24}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_what_it_draws_on_the_cpu(name):
    make, call = PIPELINES[name]
    pipe = linfusion.linearize(make(), name.split()[0])
    expected = run(pipe, **call)
    assert torch.allclose(run(pipe.to("cuda"), **call).cpu(), expected, atol=2e-3)


@pytest.mark.parametrize(
    "method, make, given, forward",
    [("lit", tiny_dit, dit_inputs, dit_forward), ("mate", tiny_wan, video_inputs, video_forward)],
)
def test_a_transformer_predicts_what_it_predicts_on_the_cpu(method, make, given, forward):
    model = linfusion.linearize(make(), method)
    inputs = given(model) if method == "mate" else given()
    expected = forward(model, inputs)
    there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    assert torch.allclose(forward(model.cuda(), there).cpu(), expected, atol=2e-3)


def test_a_cascade_draws_what_it_draws_on_the_cpu():
    pipe = linfusion.linearize(tiny_sd_pipeline())
    call = {"prompt": "a", "size": 128, "base_size": 64, "strengths": 0.5, "num_inference_steps": 4,
            "output_type": "pt"}  # fmt: skip
    pictures = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        pictures.append(HighResPipeline(pipe.to(device))(**call, generator=generator).images.cpu())
    assert torch.allclose(*pictures, atol=5e-3)
