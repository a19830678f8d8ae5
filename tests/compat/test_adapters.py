"""IP-Adapter and LoRA, loaded before linearize and after, and unloaded again."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import linfusion
from linfusion import LinFusionProcessor
from tests.student_files import student_for
from tests.tiny import TEXT_WIDTH, run, tiny_image, tiny_sd_pipeline, tiny_unet

IMAGE = {"ip_adapter_image": tiny_image(3, 32)}


def ip_adapter_state(unet):
    """Random weights for the image tokens of every cross-attention layer."""
    torch.manual_seed(5)
    layers, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for which in ("to_k_ip", "to_v_ip"):
                layers[f"{key}.{which}.weight"] = torch.randn(width, TEXT_WIDTH)
            key += 2
    projection = {
        "proj.weight": torch.randn(4 * TEXT_WIDTH, TEXT_WIDTH),
        "proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def with_ip_adapter(pipe):
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    return pipe


def linear(pipe, **kwargs):
    return linfusion.linearize(pipe, weights=student_for(tiny_unet(), **kwargs))


def are_linear(pipe):
    processors = pipe.unet.attn_processors
    return [isinstance(p, LinFusionProcessor) for n, p in processors.items() if "attn1" in n]


def test_an_ip_adapter_loads_before_or_after_alike():
    before = run(linear(with_ip_adapter(tiny_sd_pipeline())), **IMAGE)
    pipe = with_ip_adapter(linear(tiny_sd_pipeline()))
    assert all(are_linear(pipe))
    torch.testing.assert_close(run(pipe, **IMAGE), before, atol=1e-5, rtol=0)


def test_the_picture_of_an_ip_adapter_takes_effect():
    pipe = linear(with_ip_adapter(tiny_sd_pipeline()))
    assert not torch.allclose(
        run(pipe, **IMAGE), run(pipe, ip_adapter_image=tiny_image(4, 32)), atol=1e-4
    )


def test_unloading_an_ip_adapter_leaves_the_linear_model_as_it_was():
    pipe = linear(tiny_sd_pipeline())
    expected = run(pipe)
    with_ip_adapter(pipe).unload_ip_adapter()
    assert all(are_linear(pipe)) and torch.equal(run(pipe), expected)


def test_restore_leaves_an_ip_adapter_in_place():
    pipe = with_ip_adapter(tiny_sd_pipeline())
    expected = run(pipe, **IMAGE)
    assert torch.equal(run(linfusion.restore(linear(pipe)), **IMAGE), expected)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A folder with a LoRA for self- and cross-attention whose effect is large."""
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.manual_seed(9)
    layers = {n: torch.randn_like(t) for n, t in get_peft_model_state_dict(unet).items()}
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.mark.parametrize("attention_weights", [False, True])
def test_a_lora_loads_before_or_after_alike(lora, attention_weights):
    first = tiny_sd_pipeline()
    first.load_lora_weights(lora)
    before = run(linear(first, attention_weights=attention_weights))
    second = linear(tiny_sd_pipeline(), attention_weights=attention_weights)
    without = run(second)
    second.load_lora_weights(lora)
    after = run(second)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert not torch.allclose(after, without, atol=1e-3)


def test_unloading_a_lora_leaves_the_linear_model_as_it_was(lora):
    pipe = linear(tiny_sd_pipeline())
    expected = run(pipe)
    pipe.load_lora_weights(lora)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("attention_weights", [False, True])
def test_restore_keeps_a_lora_and_gives_back_the_weights_under_it(lora, attention_weights):
    pipe = tiny_sd_pipeline()
    pipe.load_lora_weights(lora)
    expected = run(pipe)
    linfusion.restore(linear(pipe, attention_weights=attention_weights))
    assert torch.equal(run(pipe), expected)


def test_no_lora_attaches_to_the_learned_map(lora):
    pipe = linear(tiny_sd_pipeline())
    pipe.load_lora_weights(lora)
    child = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.linfusion
    assert not any("lora" in name for name, _ in child.named_modules())


def test_a_merged_lora_stands_in_the_way_of_a_swap(lora):
    pipe = tiny_sd_pipeline()
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"a LoRA is merged into .*; call pipe\.unfuse_lora"):
        linear(pipe, attention_weights=True)
    assert not any(are_linear(pipe))


def test_a_lora_merged_into_swapped_weights_stands_in_the_way_of_restore(lora):
    pipe = linear(tiny_sd_pipeline(), attention_weights=True)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"a LoRA is merged into .*; call pipe\.unfuse_lora"):
        linfusion.restore(pipe)
    assert all(are_linear(pipe))
