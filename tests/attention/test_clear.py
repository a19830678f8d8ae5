"""CLEAR's attention on FLUX and Stable Diffusion 3: what it computes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file

import linfusion
from tests.tiny_joint import flux_inputs, forward, sd3_inputs, tiny_flux, tiny_sd3

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("clear_flux_*.safetensors"))


def golden(file):
    """The model, its inputs, the options of CLEAR, the authors' output, and its pooling weights."""
    with safe_open(file, framework="pt") as f:
        meta = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    model = FluxTransformer2DModel(**json.loads(meta["config"])).eval()
    cut = len("model.")
    model.load_state_dict({k[cut:]: t for k, t in tensors.items() if k.startswith("model.")})
    options = {
        "radius": int(meta["window_size"]),
        "down_factor": int(meta["down_factor"]),
        "proportional": meta["proportional_attention"] == "True",
    }
    inputs = {k[3:]: t for k, t in tensors.items() if k.startswith("io.")}
    pool = {k[len("clear.") :]: t for k, t in tensors.items() if k.startswith("clear.")}
    return model, inputs, options, tensors["output_clear"], pool


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_authors_output_is_reached_to_rounding(file):
    model, inputs, options, expected, pool = golden(file)
    linfusion.linearize(model, "clear", **options)
    for name, weight in pool.items():
        path = name.removesuffix(".processor.spatial_weight")
        model.get_submodule(f"{path}.clear.pool").weight.data = weight.reshape(1, -1)
    # Softmax attention differs from it by 1e-2 and more.
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=0)
