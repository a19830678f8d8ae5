"""Transformers that ranks share give what they give alone, gradients included."""

from __future__ import annotations

import pytest
import torch

from linfusion.linearize import linearize
from tests.parallel.pool import run
from tests.parallel.sharing import alone_and_shared
from tests.tiny_dit import dit_inputs, pixart_inputs, tiny_dit, tiny_pixart
from tests.tiny_joint import SD35, flux_inputs, sd3_inputs, tiny_flux, tiny_sd3


def double(inputs):
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def lively(model):
    """Fresh children that do something."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lit." in name or ".clear." in name or ".mate." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.1 * noise.to(parameter))
    return model


def job(ranks, name, dtype):
    make, inputs = CASES[name]
    model = lively(make()).to(dtype)
    given = inputs()
    return alone_and_shared(ranks, model, double(given) if dtype == torch.float64 else given)


CASES = {
    # 9 rows of 6 tokens, windows of 5 to either side: with 4 ranks, of three others.
    "flux": (
        lambda: linearize(tiny_flux(), "clear", radius=5.5),
        lambda: flux_inputs(9, 6),
    ),
    "flux pooled": (
        lambda: linearize(tiny_flux(), "clear", radius=2, down_factor=2, proportional=True),
        lambda: flux_inputs(8, 6, batch=2),
    ),
    "sd3": (
        lambda: linearize(tiny_sd3(**SD35), "clear", radius=3),
        lambda: sd3_inputs(9, 6),
    ),
    "dit": (
        lambda: linearize(tiny_dit(), "lit", heads=2, softmax_every=3),
        lambda: dit_inputs(10),
    ),
    "pixart": (
        lambda: linearize(
            tiny_pixart(), "lit", heads=2, key_center=True, conv="input_full", normalizer="sum"
        ),
        lambda: pixart_inputs(14, 8),
    ),
}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_shared_transformer_is_the_one_alone(name, world):
    # FLUX's rotary embedding and diffusers' RMSNorm round to float32, also gradients, of which each
    # rank has its own share of the text's.
    limit = 3e-7 if name.startswith(("flux", "sd3")) else 1e-10
    for out, grads in run(world, job, name, torch.float64):
        assert out < 1e-10 and grads < limit
