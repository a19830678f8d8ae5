"""Offloading, casting, checkpointing, compilation, EMA, slicing: what changes a model below."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.training_utils import EMAModel

import linfusion
from linfusion.students.saving import learned, save
from linfusion.students.student import LinFusion
from tests.student_files import student_for
from tests.tiny import denoise, run, tiny_sd_pipeline, tiny_unet, unet_inputs

CPU = torch.device("cpu")


def group_offload(offload_type):
    def apply(unet):
        apply_group_offloading(
            unet,
            onload_device=CPU,
            offload_device=CPU,
            offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
        )

    return apply


OFFLOADS = {
    "sequential": lambda unet: cpu_offload(unet, CPU),
    "model": lambda unet: cpu_offload_with_hook(unet, CPU),
    "group, blocks": group_offload("block_level"),
    "group, leaves": group_offload("leaf_level"),
}


def student(**kwargs):
    return student_for(tiny_unet(), **kwargs)


def linear_unet(**kwargs):
    return linfusion.linearize(tiny_unet(), weights=student(**kwargs))


@pytest.mark.parametrize("order", ["linear first", "offloaded first"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_computes_the_same_linear(name, order):
    expected = denoise(linear_unet(attention_weights=True))
    unet = tiny_unet()
    if order == "linear first":
        linfusion.linearize(unet, weights=student(attention_weights=True))
    OFFLOADS[name](unet)
    if order == "offloaded first":
        linfusion.linearize(unet, weights=student(attention_weights=True))
    for _ in range(2):
        torch.testing.assert_close(denoise(unet), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_is_fused_and_restored(name):
    unet = tiny_unet()
    expected = denoise(unet)
    OFFLOADS[name](unet)
    softmax = denoise(unet)
    linfusion.fuse(linfusion.linearize(unet, weights=student(attention_weights=True)))
    torch.testing.assert_close(denoise(unet), denoise(linear_unet(attention_weights=True)))
    assert torch.equal(denoise(linfusion.restore(unet)), softmax)
    torch.testing.assert_close(softmax, expected)


def test_an_offloaded_model_is_still_offloaded_afterwards():
    unet = tiny_unet()
    cpu_offload(unet, CPU)
    linfusion.linearize(unet, weights=student())
    denoise(unet)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attn.to_q.weight.is_meta and attn.linfusion.map_q.first.weight.is_meta


def test_the_learned_part_of_an_offloaded_model_is_saved(tmp_path):
    unet = tiny_unet()
    cpu_offload(unet, CPU)
    linfusion.linearize(unet, weights=student())
    save(unet, tmp_path)
    again = LinFusion.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in student().state_dict().items())


def test_hooks_may_be_removed_after_restore():
    unet = tiny_unet()
    expected = unet.state_dict()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    cpu_offload(unet, CPU)
    linfusion.restore(linfusion.linearize(unet, weights=student(attention_weights=True)))
    remove_hook_from_module(unet, recurse=True)
    assert all(torch.equal(unet.state_dict()[n], tensor) for n, tensor in expected.items())


@pytest.mark.parametrize("order", ["linear first", "cast first"])
def test_layerwise_casting_stores_float8_and_computes_in_float32(order):
    unet = tiny_unet()
    if order == "linear first":
        linfusion.linearize(unet, weights=student())
    apply_layerwise_casting(unet, torch.float8_e4m3fn, torch.float32)
    if order == "cast first":
        linfusion.linearize(unet, weights=student())
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    exact = denoise(linear_unet())
    assert attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert attn.linfusion.map_q.norm.weight.dtype == torch.float32
    assert (denoise(unet) - exact).abs().max() < 0.3 * exact.abs().max()


def test_layerwise_casting_leaves_restore_exact():
    unet = tiny_unet()
    apply_layerwise_casting(unet, torch.float8_e4m3fn, torch.float32)
    expected = denoise(unet)
    linfusion.linearize(unet, weights=student(attention_weights=True))
    assert torch.equal(denoise(linfusion.restore(unet)), expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        unet = linear_unet().requires_grad_(False).train()
        learned(unet).requires_grad_(True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**unet_inputs(unet)).sample.square().mean().backward()
        grads.append([p.grad for p in learned(unet).parameters()])
    assert all(g is not None and g.any() for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


def one_level_unet():
    """Small, because tracing a UNet takes seconds."""
    return tiny_unet(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_has_no_graph_break(fused):
    unet = one_level_unet()
    linfusion.linearize(unet, weights=student_for(unet))
    if fused:
        linfusion.fuse(unet)
    expected = denoise(unet)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(denoise(compiled), expected, atol=1e-5, rtol=0)


def test_a_compiled_model_that_is_linearized_later_is_linear():
    unet = one_level_unet()
    side = student_for(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    before = denoise(compiled)
    linfusion.linearize(compiled, weights=side)
    torch.testing.assert_close(denoise(compiled), denoise(unet), atol=1e-5, rtol=0)
    assert not torch.allclose(denoise(compiled), before, atol=1e-3)


def test_ema_of_the_learned_part_is_saved_as_a_student(tmp_path):
    unet = linear_unet()
    side = learned(unet)
    ema = EMAModel(
        side.parameters(), decay=0.5, model_cls=LinFusion, model_config=dict(side.config)
    )
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.add_(1.0)
    ema.step(side.parameters())
    ema.step(side.parameters())
    ema.save_pretrained(tmp_path)
    averaged = denoise(linfusion.linearize(tiny_unet(), weights=tmp_path))
    ema.copy_to(side.parameters())
    torch.testing.assert_close(averaged, denoise(unet), atol=1e-5, rtol=0)


def test_ema_of_the_whole_model_follows_the_learned_part():
    unet = linear_unet()
    ema = EMAModel(unet.parameters(), decay=0.5)
    expected = denoise(unet)
    with torch.no_grad():
        learned(unet).mid_block.attentions.get_submodule("0").to(torch.float32)
        for parameter in learned(unet).parameters():
            parameter.zero_()
    assert not torch.allclose(denoise(unet), expected, atol=1e-4)
    ema.copy_to(unet.parameters())
    assert torch.equal(denoise(unet), expected)


@pytest.mark.parametrize("call", ["enable_attention_slicing", "unet.fuse_qkv_projections"])
def test_a_pipeline_call_that_replaces_processors_is_said(call):
    pipe = tiny_sd_pipeline()
    linfusion.linearize(pipe, weights=student())
    expected = run(pipe)
    target, _, name = call.rpartition(".")
    getattr(getattr(pipe, target) if target else pipe, name)()
    with pytest.warns(UserWarning, match=r"7 of 7 .* run .* instead.*linfusion\.linearize"):
        run(pipe)
    torch.testing.assert_close(run(linfusion.linearize(pipe)), expected, atol=1e-4, rtol=0)


def test_unfusing_the_projections_of_diffusers_gives_back_the_linear_model():
    unet = linear_unet()
    expected = denoise(unet)
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert torch.equal(denoise(unet), expected)


def test_what_fuse_qkv_laid_aside_does_not_bring_back_a_restored_student():
    unet = tiny_unet()
    expected = denoise(unet)
    linfusion.linearize(unet, weights=student())
    unet.fuse_qkv_projections()
    linfusion.restore(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(denoise(unet), expected)


def test_a_deepcopy_for_ema_or_a_teacher_is_independent():
    unet = linear_unet()
    twin = copy.deepcopy(unet)
    expected = denoise(unet)
    with torch.no_grad():
        for parameter in learned(twin).parameters():
            parameter.zero_()
    assert torch.equal(denoise(unet), expected)
