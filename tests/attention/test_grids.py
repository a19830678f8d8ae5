"""What a call knows lives in the call: hosts with hooks under threads, adapters and copies."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import LoraConfig
from torch import nn

import linfusion
from tests.tiny_joint import (
    flux_inputs,
    forward,
    sd3_inputs,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_sd3,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")


def controlled(model, inputs):
    with torch.no_grad():
        return model(**inputs, controlnet_cond=inputs["hidden_states"], return_dict=False)[0][0]


HOSTS = {
    "flux": (tiny_flux, flux_inputs, forward, {"ntk": 10.0}),
    "controlnet": (tiny_flux_controlnet, flux_inputs, controlled, {"ntk": 10.0}),
    "sd3": (tiny_sd3, sd3_inputs, forward, {}),
}
host = pytest.mark.parametrize("name", HOSTS)


def linear(name):
    make, inputs, call, options = HOSTS[name]
    return linfusion.linearize(make(), "clear", radius=2, **options), inputs, call


def at_once(calls, times):
    """What goes wrong when each call runs in a thread of its own, compared with alone."""
    expected, failed = [call() for call in calls], []

    def work(call, wanted):
        for _ in range(times):
            try:
                torch.testing.assert_close(call(), wanted, atol=1e-4, rtol=0)
            except Exception as error:
                failed.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@host
def test_two_threads_with_two_sizes_compute_what_one_does(name):
    model, inputs, call = linear(name)
    jobs = [inputs(6, 12), inputs(8, 10)]
    assert not at_once([lambda j=job: call(model, j) for job in jobs], times=12)
    if name != "sd3":
        assert model.pos_embed.theta == 10000
        linfusion.restore(model)
        assert torch.equal(call(model, jobs[0]), call(HOSTS[name][0](), jobs[0]))


class Wrapped(nn.Module):
    """As adapters, offloading and quantisation put something in the place of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@host
def test_any_part_of_a_host_may_be_wrapped_after_linearize(name):
    model, inputs, call = linear(name)
    expected = call(model, inputs(4, 6))
    for child, module in list(model.named_children()):
        if not isinstance(module, nn.ModuleList):
            setattr(model, child, Wrapped(module))
    assert torch.equal(call(model, inputs(4, 6)), expected)


@host
def test_a_copy_needs_nothing_of_the_model_it_was_made_from(name):
    model, inputs, call = linear(name)
    expected = call(model, inputs(4, 6))
    twin = copy.deepcopy(model)
    linfusion.restore(model)
    assert torch.equal(call(twin, inputs(4, 6)), expected)
    assert torch.equal(call(linfusion.restore(twin), inputs(4, 6)), call(model, inputs(4, 6)))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_lora_on_the_last_layer_adds_what_it_adds_without_windows(name):
    make, inputs, call, options = HOSTS[name]

    def adapted(model):
        model.add_adapter(LoraConfig(r=2, target_modules=r"proj_out"))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_()
        return model

    first = linfusion.linearize(adapted(make()), "clear", radius=2, **options)
    plain = call(linear(name)[0], inputs(4, 6))
    expected = call(first, inputs(4, 6))
    assert (expected - plain).abs().max() > 0.1
    last = adapted(linear(name)[0])
    torch.testing.assert_close(call(last, inputs(4, 6)), expected, atol=1e-5, rtol=0)
    last.unload_lora()
    torch.testing.assert_close(call(last, inputs(4, 6)), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_order_of_the_tokens_is_undone_in_every_form_of_output(name, as_tuple):
    model, inputs, _ = linear(name)
    job = inputs(9, 10)  # tiles of 8 by 8 are ragged here
    with torch.no_grad():
        ordered = model(**job, return_dict=not as_tuple)[0]
    raster = model(**job, return_dict=not as_tuple)[0]  # with gradients
    torch.testing.assert_close(ordered, raster, atol=1e-4, rtol=0)


def test_a_lit_and_a_mate_host_hand_on_what_they_were_called_with():
    from tests import tiny_dit, tiny_video_hosts

    pixart = linfusion.linearize(tiny_dit.tiny_pixart(), "lit")
    wan = linfusion.linearize(tiny_video_hosts.tiny_wan(), "mate", window=(2, 2, 2))
    calls = [
        lambda: tiny_dit.forward(pixart, tiny_dit.pixart_inputs(8, 8)),
        lambda: tiny_dit.forward(pixart, tiny_dit.pixart_inputs(12, 6)),
        lambda: tiny_video_hosts.forward(wan, tiny_video_hosts.inputs(wan, (5, 4, 3))),
        lambda: tiny_video_hosts.forward(wan, tiny_video_hosts.inputs(wan, (3, 4, 4))),
    ]
    assert not at_once(calls, times=5)


def test_stable_diffusion_3_compiles_in_one_graph():
    model, inputs, call = linear("sd3")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(call(compiled, inputs(9, 10)), call(model, inputs(9, 10)))
