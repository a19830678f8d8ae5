"""fuse and unfuse: the same function in fewer products, undone exactly."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import linfusion
from linfusion.attention.linfusion import fused
from tests.student_files import student_for
from tests.tiny import denoise, run, tiny_sd_pipeline, tiny_unet, unet_inputs


def linear_unet(mid=None, **kwargs):
    unet = tiny_unet(**kwargs)
    return linfusion.linearize(unet, weights=student_for(unet, projection_mid_dim=mid))


def attn(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1


@pytest.mark.parametrize("mid", [None, 4, -1])
@pytest.mark.parametrize("size", [8, 20])  # fewer and more tokens than channels
def test_fusing_changes_rounding_alone(mid, size):
    unet = linear_unet(mid)
    inputs = unet_inputs(unet, size, batch=2)
    expected = denoise(unet, **inputs)
    # Softmax with the same weights is off by more than 1e-2.
    torch.testing.assert_close(
        denoise(linfusion.fuse(unet), **inputs), expected, atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500])
def test_the_size_of_a_block_does_not_matter(tokens, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 64)
    unet = linear_unet()
    x = torch.randn(1, tokens, 64)
    expected = attn(unet)(x)
    with torch.no_grad():
        got = attn(linfusion.fuse(unet))(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_unfusing_gives_back_the_same_bits():
    unet = linear_unet()
    names, expected = set(unet.state_dict()), denoise(unet)
    linfusion.unfuse(linfusion.fuse(unet))
    assert torch.equal(denoise(unet), expected) and set(unet.state_dict()) == names


def test_a_pipeline_is_fused_and_unfused_to_the_same_bits():
    pipe = tiny_sd_pipeline()
    linfusion.linearize(pipe, weights=student_for(pipe.unet))
    expected = run(pipe)
    assert linfusion.fuse(pipe) is pipe and linfusion.summary(pipe.unet).fused
    assert linfusion.unfuse(pipe) is pipe and not linfusion.summary(pipe.unet).fused
    assert torch.equal(run(pipe), expected)


def test_restoring_a_fused_model_gives_back_the_same_bits():
    unet = tiny_unet()
    names, expected = set(unet.state_dict()), denoise(unet)
    linfusion.linearize(unet, weights=student_for(unet, attention_weights=True))
    linfusion.restore(linfusion.fuse(unet))
    assert torch.equal(denoise(unet), expected) and set(unet.state_dict()) == names


def test_a_fused_layer_honours_a_key_mask():
    unet, x = linear_unet(), torch.randn(2, 70, 64)
    keep = torch.ones(2, 1, 70, dtype=torch.bool)
    keep[..., 40:] = False
    expected = attn(unet)(x, attention_mask=keep)
    with torch.no_grad():
        got = attn(linfusion.fuse(unet))(x, attention_mask=keep)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("products", [True, False])
def test_bfloat16_is_as_close_fused_as_it_was(products, monkeypatch):
    monkeypatch.setattr(fused.blocked_bf16, "BF16_PRODUCTS", products)
    unet = linear_unet()
    exact = denoise(unet)
    unet.to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in unet_inputs(unet).items()}
    plain = (denoise(unet, **inputs).float() - exact).abs().mean()
    fused_error = (denoise(linfusion.fuse(unet), **inputs).float() - exact).abs().mean()
    assert fused_error <= 1.5 * plain


def test_bfloat16_products_serve_inference_alone(monkeypatch):
    monkeypatch.setattr(fused.blocked_bf16, "BF16_PRODUCTS", True)
    x = torch.randn(1, 9, 64).bfloat16()
    with torch.no_grad():
        assert fused._narrow(x, None)
        assert not fused._narrow(x.float(), None)
        assert not fused._narrow(x, torch.ones(1, 9))
    assert not fused._narrow(x, None)  # gradients take a float32 state


def test_a_fused_model_says_so():
    unet = linear_unet()
    assert not linfusion.summary(unet).fused
    assert linfusion.summary(linfusion.fuse(unet)).fused


def test_fusing_twice_is_refused():
    unet = linfusion.fuse(linear_unet())
    with pytest.raises(ValueError, match="UNet2DConditionModel is fused already"):
        linfusion.fuse(unet)


def test_unfusing_what_is_not_fused_is_refused():
    for unet in (tiny_unet(), linear_unet()):
        with pytest.raises(ValueError, match="is not fused, so nothing to unfuse"):
            linfusion.unfuse(unet)


def test_a_layer_with_a_lora_is_not_fused():
    unet = linear_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"]))
    names = set(unet.state_dict())
    with pytest.raises(ValueError, match=r"attn1\.to_v is a peft.*\.Linear, not a plain Linear"):
        linfusion.fuse(unet)
    assert set(unet.state_dict()) == names


def test_a_lora_that_comes_after_fusing_is_not_ignored():
    unet = linfusion.fuse(linear_unet())
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"to_q became a peft.*Linear after linfusion\.fuse"):
        denoise(unet)


def test_a_fused_layer_is_not_trained():
    unet = linfusion.fuse(linear_unet()).train()
    with pytest.raises(ValueError, match="a fused layer cannot be trained"):
        unet(**unet_inputs(unet))


def test_a_fused_layer_attends_to_its_own_input_alone():
    layer = attn(linfusion.fuse(linear_unet()))
    with pytest.raises(ValueError, match="encoder_hidden_states: a fused layer"):
        layer(torch.randn(1, 4, 64), torch.randn(1, 6, 64))


def test_gradients_flow_to_the_input_of_a_fused_layer():
    unet, x = linear_unet(), torch.randn(1, 70, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(attn(unet)(x).square().sum(), x)
    (got,) = torch.autograd.grad(attn(linfusion.fuse(unet))(x).square().sum(), x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [4, 16])  # fewer and more tokens than channels
def test_autocast_fused_is_as_close_as_autocast_was(size):
    unet = linear_unet()
    inputs = unet_inputs(unet, size, batch=2)
    exact = denoise(unet, **inputs)

    def run_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return denoise(unet, **inputs)

    plain, dtype = run_autocast(), attn_dtype(unet)
    linfusion.fuse(unet)
    assert attn_dtype(unet) == dtype == torch.bfloat16
    found = run_autocast()
    # An error of another kind, as of a state in bfloat16, would be many times as large.
    assert (found - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()
    assert torch.equal(denoise(linfusion.unfuse(unet), **inputs), exact)


def attn_dtype(unet):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return attn(unet)(torch.randn(1, 70, 64)).dtype
