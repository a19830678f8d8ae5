"""LiT under offloading, casting, compilation and adapters: what changes a model below."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

import linfusion
from linfusion.lit.inherit import inherit
from tests.tiny_dit import dit_inputs, forward, pixart_inputs, tiny_dit, tiny_pixart

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

CPU = torch.device("cpu")
OFFLOADS = {
    "sequential": lambda model: cpu_offload(model, CPU),
    "model": lambda model: cpu_offload_with_hook(model, CPU),
    "group": lambda model: apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    ),
}


def student(make=tiny_dit, **options):
    """Inherited, so that convolutions are not 0."""
    model = linfusion.linearize(make(), "lit", **options)
    inherit(model, policy="lit")
    return model


@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_computes_the_same(name):
    expected = forward(student(tiny_pixart), pixart_inputs(4, 12))
    model = student(tiny_pixart)
    OFFLOADS[name](model)
    for _ in range(2):
        out = forward(model, pixart_inputs(4, 12))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_inheritance_and_restore_work_through_offloading():
    model = tiny_pixart()
    before = forward(model, pixart_inputs())
    cpu_offload(model, CPU)
    linfusion.linearize(model, "lit")
    inherit(model, policy="lit-t2i")
    out = forward(model, pixart_inputs())
    linfusion.restore(model)
    torch.testing.assert_close(forward(model, pixart_inputs()), before, atol=1e-6, rtol=0)
    plain = linfusion.linearize(tiny_pixart(), "lit")
    inherit(plain, policy="lit-t2i")
    torch.testing.assert_close(out, forward(plain, pixart_inputs()), atol=1e-5, rtol=0)


def test_weights_may_be_stored_in_bfloat16_and_computed_in_float32():
    expected = forward(student(), dit_inputs())
    model = student()
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn1.lit.dwc.weight.dtype == torch.bfloat16
    difference = (forward(model, dit_inputs()) - expected).norm() / expected.norm()
    assert 0 < difference < 2e-2


def test_under_autocast_it_stays_near_float32():
    model = student()
    expected = forward(model, dit_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(model, dit_inputs())
    assert (out - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("make, inputs", [(tiny_dit, dit_inputs), (tiny_pixart, pixart_inputs)])
def test_it_compiles_into_one_graph(make, inputs):
    model = student(make)
    expected = forward(model, inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(forward(compiled, inputs()), expected, atol=1e-5, rtol=0)


def test_a_copy_is_a_model_of_its_own():
    model = student()
    expected = forward(model, dit_inputs())
    other = copy.deepcopy(model)
    linfusion.restore(model)
    assert torch.equal(forward(other, dit_inputs()), expected)
    linfusion.restore(other)
    assert torch.equal(forward(other, dit_inputs()), forward(tiny_dit(), dit_inputs()))


def test_a_lora_reaches_the_linear_attention():
    from peft import LoraConfig, inject_adapter_in_model

    model = student(tiny_pixart)
    expected = forward(model, pixart_inputs())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), model)
    torch.testing.assert_close(forward(model, pixart_inputs()), expected, atol=1e-6, rtol=0)
    torch.nn.init.ones_(model.transformer_blocks[0].attn1.to_v.lora_B["default"].weight)
    assert not torch.allclose(forward(model, pixart_inputs()), expected, atol=1e-4)
