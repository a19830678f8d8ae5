"""FLUX and Stable Diffusion 3 in bands of tokens against the same models as they are."""

from __future__ import annotations

import re

import pytest
import torch

import linfusion
from linfusion.bands import attention_rules as attending
from linfusion.bands import budget
from linfusion.bands.bounded import bounded
from linfusion.kernels import window_attention
from tests.tiny_joint import (
    SD35,
    flux_inputs,
    forward,
    sd3_inputs,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_sd3,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

MODELS = {
    "flux": (tiny_flux, flux_inputs),
    "sd3": (tiny_sd3, sd3_inputs),
    "sd3.5": (lambda: tiny_sd3(**SD35), sd3_inputs),
}
WINDOWS = {
    "softmax": None,
    "windows": {"radius": 2.5, "proportional": True},
    "pooled": {"radius": 2.5, "down_factor": 2},
}


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch):
    """Bands of a few tokens, so that there are many."""
    monkeypatch.setattr(budget, "BAND_BYTES", 1 << 12)


def make(name, window=None):
    model = MODELS[name][0]()
    return model if window is None else linfusion.linearize(model, "clear", **window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", MODELS)
def test_bands_change_nothing(name, window):
    model = make(name, WINDOWS[window])
    size = (6, 14) if window == "pooled" else (7, 13)
    inputs = MODELS[name][1](*size, batch=2)
    whole = forward(model, inputs)
    with bounded(model) as ledger:
        banded = forward(model, inputs)
    # Other latents are 1 away.
    torch.testing.assert_close(banded, whole, atol=2e-5, rtol=0)
    assert ledger.calls == 2
    assert torch.equal(forward(model, inputs), whole)


@pytest.mark.parametrize("window", ["softmax", "windows"])
@pytest.mark.parametrize("name", MODELS)
def test_every_function_of_a_block_has_a_rule(name, window):
    model = make(name, WINDOWS[window])
    with bounded(model, dry=True) as ledger:
        forward(model, MODELS[name][1]())
    assert ledger.unbanded == set()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_counts_what_a_run_takes(name, window):
    model = make(name, WINDOWS[window])
    counted = []
    for dry in (False, True):
        with bounded(model, dry=dry) as ledger:
            forward(model, MODELS[name][1](12, 16))
        counted.append((ledger.peak_bytes, ledger.flops))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("window", ["softmax", "windows"])
def test_the_hidden_layer_of_a_feed_forward_is_never_whole(window, monkeypatch):
    monkeypatch.setattr(attending, "_scratch", lambda *_: 0)  # it does not grow with the tokens
    model = make("flux", WINDOWS[window])
    inputs = flux_inputs(64, 64)
    width, tokens = 32, 64 * 64 + 6
    with bounded(model, dry=True) as ledger:
        forward(model, inputs)
    held = ledger.peak_bytes - ledger.weights_bytes - budget.BANDS_AT_ONCE * budget.BAND_BYTES
    # 2.5 are the latents and the table of rotations, then come the tokens, keys, values and the
    # result, with windows queries as well; the hidden layer has 4.
    assert held / (4 * width * tokens) < (6.6 if window == "softmax" else 7.6)


def test_a_budget_that_is_too_small_is_refused_with_the_one_that_does():
    model = make("flux", WINDOWS["windows"])
    inputs = flux_inputs(48, 80)
    weights = sum(p.nbytes for p in model.parameters())
    with pytest.raises(ValueError, match="memory_budget: got") as error, bounded(model, 3_000_000):
        forward(model, inputs)
    need = int(re.search(r"needs ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert need > 3_000_000 > weights
    with bounded(model, need):
        banded = forward(model, inputs)
    torch.testing.assert_close(banded, forward(model, inputs), atol=2e-5, rtol=0)


def test_scratch_takes_what_lies_idle(tmp_path):
    model = make("flux", WINDOWS["windows"])
    inputs = flux_inputs(48, 80)
    with bounded(model, 3_000_000, scratch=tmp_path) as ledger:
        banded = forward(model, inputs)
    assert ledger.peak_on_disk > 0
    torch.testing.assert_close(banded, forward(model, inputs), atol=2e-5, rtol=0)


def test_a_failing_block_leaves_the_model_as_it_was():
    model = make("flux", WINDOWS["windows"])
    model.single_transformer_blocks[0].proj_out.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), bounded(model):
        forward(model, flux_inputs())
    del model.single_transformer_blocks[0].proj_out.forward
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())


def test_window_attention_asks_tensors_that_know_better():
    class Known(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func, kwargs["radius"]

    q = torch.randn(1, 4, 1, 8)
    found = window_attention(q.as_subclass(Known), q, q, grid=(2, 2), radius=3)
    assert found == (window_attention, 3)


def test_flux_controlnets_are_refused():
    with (
        pytest.raises(ValueError, match="target: got FluxControlNetModel"),
        bounded(tiny_flux_controlnet()),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_bands_are_as_near_in_half_precision(name, dtype):
    model, inputs = make(name, WINDOWS["windows"]), MODELS[name][1](7, 13)
    exact = forward(model, inputs)
    half = {k: v if k.endswith("ids") else v.to(dtype) for k, v in inputs.items()}
    model.to(dtype)
    whole = forward(model, half).float()
    with bounded(model):
        banded = forward(model, half).float()
    assert (banded - exact).abs().max() <= 2 * (whole - exact).abs().max() + 1e-6


def test_a_dry_run_takes_no_memory_for_tokens():
    model = linfusion.linearize(tiny_flux(num_attention_heads=4), "clear", radius=2.5)
    inputs = flux_inputs(64, 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta and out.is_floating_point():
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with bounded(model, dry=True), Watch():
        forward(model, inputs)
    # Latents and the table of rotations have 16 channels, at most in float64, the tokens 64.
    assert largest < 64 * 64 * 64 * 4
