"""What others do to a model after `linearize`: it stays right, or the next call says it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from peft import LoraConfig
from torch import nn

import linfusion
from linfusion.attention import get_method
from linfusion.layers.find import compute_dtype
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from linfusion.students.saving import learned
from tests.student_files import student_for
from tests.tiny import denoise, tiny_sd_components, tiny_sd_pipeline, tiny_unet
from tests.tiny_joint import tiny_flux, tiny_flux_pipeline
from tests.tiny_video import tiny_transformer
from tests.tiny_video_hosts import tiny_wan

SIDE = student_for(tiny_unet())
WHOLE = student_for(tiny_unet(), attention_weights=True)


def adapted(unet, targets=("to_q", "to_k", "to_v", "to_out.0")):
    unet.add_adapter(LoraConfig(r=2, target_modules=list(targets)))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return unet


def baked(unet, **kwargs):
    """A LoRA merged and unloaded, as diffusers recommends for speed."""
    adapted(unet, **kwargs).fuse_lora()
    unet.unload_lora()
    return unet


# LoRA and fuse


def test_a_lora_baked_under_a_fused_model_is_said():
    unet = linfusion.fuse(linfusion.linearize(tiny_unet(), weights=SIDE))
    denoise(unet)
    baked(unet)
    with pytest.raises(ValueError, match=r"weights were changed after linfusion\.fuse"):
        denoise(unet)
    linfusion.fuse(linfusion.unfuse(unet))
    expected = denoise(baked(linfusion.linearize(tiny_unet(), weights=SIDE)))
    torch.testing.assert_close(denoise(unet), expected, atol=1e-5, rtol=1e-4)


def test_a_lora_baked_before_fuse_or_into_other_layers_is_none():
    unet = linfusion.fuse(baked(linfusion.linearize(tiny_unet(), weights=SIDE)))
    denoise(unet)
    baked(unet, targets=["attn2.to_q"])
    denoise(unet)


@pytest.mark.parametrize("changed", ["to_q", "to_out.0"])
def test_other_weights_loaded_under_a_fused_model_are_said(changed):
    unet = linfusion.fuse(linfusion.linearize(tiny_unet(), weights=SIDE))
    key = f"mid_block.attentions.0.transformer_blocks.0.attn1.{changed}.weight"
    unet.load_state_dict({key: unet.state_dict()[key].clone()}, strict=False)
    denoise(unet)  # the same numbers
    unet.load_state_dict({key: 2 * unet.state_dict()[key]}, strict=False)
    with pytest.raises(ValueError, match=r"weights were changed after linfusion\.fuse"):
        denoise(unet)


def test_a_lora_on_the_output_projection_of_a_fused_model_is_refused():
    unet = linfusion.fuse(linfusion.linearize(tiny_unet(), weights=SIDE))
    adapted(unet, targets=["attn1.to_out.0"])
    with pytest.raises(ValueError, match=r"attn: to_out.0 became a peft.* after linfusion.fuse"):
        denoise(unet)


# LoRA and restore


def test_restore_says_that_a_lora_was_baked_into_the_student_and_gives_back_the_own_bits():
    unet = tiny_unet()
    own = {n: t.clone() for n, t in unet.state_dict().items()}
    linfusion.linearize(unet, weights=WHOLE)
    baked(unet)
    with pytest.warns(UserWarning, match="projections of 7 linear layers were changed after"):
        linfusion.restore(unet)
    now = unet.state_dict()
    assert all(torch.equal(now[n], own[n]) for n in own if "attn1" in n)


@pytest.mark.parametrize("to", [None, torch.bfloat16])
def test_restore_says_nothing_of_an_unchanged_student(to):
    unet = linfusion.linearize(tiny_unet(), weights=WHOLE)
    adapted(unet)
    with as_softmax(unet):
        denoise(unet)
    unet.unload_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linfusion.restore(unet if to is None else unet.to(to))


# Moved layers


def test_layers_that_animatediff_moves_stay_linear_and_are_restored():
    adapter = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
    )
    parts = {**tiny_sd_components(), "motion_adapter": adapter}
    parts.pop("safety_checker")
    pipe = AnimateDiffPipeline(**parts)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, 8),
        "encoder_hidden_states": torch.randn(8, 5, 32),
    }
    softmax = denoise(pipe.unet, **inputs)
    linfusion.linearize(pipe, weights=SIDE)
    linear = denoise(pipe.unet, **inputs)
    pipe.enable_free_noise(context_length=8, context_stride=4)
    pipe.enable_free_noise_split_inference(spatial_split_size=8, temporal_split_size=4)
    torch.testing.assert_close(denoise(pipe.unet, **inputs), linear, atol=1e-4, rtol=0)
    found = linfusion.summary(pipe)
    assert sum(layer.linear for layer in found.layers) == 7 and found.parameters
    assert len(learned(pipe).entries) == 7
    linfusion.restore(pipe)
    torch.testing.assert_close(denoise(pipe.unet, **inputs), softmax, atol=1e-4, rtol=0)
    assert not any("linfusion" in name for name in pipe.unet.state_dict())


# Quantised weights


class QLinear(nn.Linear):
    """As optimum-quanto and bitsandbytes have theirs."""


class Packed(torch.Tensor):
    """As torchao's tensors: what is computed with lies elsewhere."""


def quantized(unet, how):
    for module in unet.modules():
        if type(module) is nn.Linear and module.in_features == module.out_features == 32:
            if how == "class":
                module.__class__ = QLinear
            elif how == "tensor":
                data = module.weight.data.as_subclass(Packed)
                module.weight = nn.Parameter(data, requires_grad=False)
            else:
                module.weight = nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    return unet


@pytest.mark.parametrize("how", ["class", "tensor", "integers"])
def test_a_student_is_never_put_on_quantized_projections(how):
    unet = quantized(tiny_unet(), how)
    before = list(unet.state_dict())
    with pytest.raises(ValueError, match=r"are quantised or otherwise .* quantise it after that"):
        linfusion.linearize(unet, weights=WHOLE)
    assert list(unet.state_dict()) == before and record_of(unet) is None
    if how != "integers":  # where nothing is replaced there is nothing to refuse
        linfusion.linearize(unet, weights=SIDE)
        linfusion.restore(unet)


@pytest.mark.parametrize("call", [linfusion.restore, lambda unet: as_softmax(unet).__enter__()])
def test_what_was_quantized_since_is_not_exchanged(call):
    unet = quantized(linfusion.linearize(tiny_unet(), weights=WHOLE), "class")
    expected = denoise(unet)
    with pytest.raises(ValueError, match="are quantised or otherwise changed"):
        call(unet)
    assert torch.equal(denoise(unet), expected)


def test_quantized_layers_are_not_fused():
    unet = quantized(linfusion.linearize(tiny_unet(), weights=SIDE), "tensor")
    with pytest.raises(ValueError, match="are quantised or otherwise changed"):
        linfusion.fuse(unet)


def test_a_fresh_part_is_not_started_from_quantized_projections():
    wan = tiny_wan()
    for block in wan.blocks:
        block.attn1.to_q.__class__ = QLinear
    with pytest.raises(ValueError, match="are quantised or otherwise changed"):
        linfusion.linearize(wan, "mate", window=(2, 2, 2))


# The same call twice


@pytest.mark.parametrize("side", [SIDE, WHOLE], ids=["learned part", "projections too"])
def test_the_same_call_twice_is_the_call_once(side, tmp_path):
    side.save_pretrained(tmp_path)
    pipe = linfusion.linearize(tiny_sd_pipeline(), weights=tmp_path)
    expected = denoise(pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linfusion.linearize(pipe, weights=tmp_path) is pipe
        assert linfusion.linearize(pipe, weights=side) is pipe
    assert torch.equal(denoise(pipe.unet), expected)
    pipe.unet.set_attention_slice("max")
    linfusion.linearize(pipe, weights=tmp_path)
    torch.testing.assert_close(denoise(pipe.unet), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*linearized without weights")
def test_a_fresh_part_is_the_same_until_it_is_trained():
    unet = linfusion.linearize(tiny_unet(), projection_mid_dim=4)
    linfusion.linearize(unet, projection_mid_dim=4)
    with pytest.raises(ValueError, match="is linearized already"):
        linfusion.linearize(unet, projection_mid_dim=8)
    with torch.no_grad():
        next(learned(unet).parameters()).add_(1)
        for child in learned(unet).parameters():
            child.add_(0.1)
    with pytest.raises(ValueError, match="is linearized already"):
        linfusion.linearize(unet, projection_mid_dim=4)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": student_for(tiny_unet(), seed=8)},
        {"weights": WHOLE},
        {"weights": SIDE, "layers": "mid_block"},
        {"weights": SIDE, "method": "clear"},
    ],
    ids=["numbers", "projections", "layers", "method"],
)
def test_another_call_is_refused(other):
    unet = linfusion.linearize(tiny_unet(), weights=SIDE)
    expected = denoise(unet)
    with pytest.raises(ValueError, match=r"is linearized already \(linfusion, 7 layers\); call"):
        linfusion.linearize(unet, **other)
    assert torch.equal(denoise(unet), expected)


# Which method serves


def test_a_model_for_another_method_says_which():
    with pytest.raises(ValueError, match=r"Method 'clear' takes FluxTransformer2DModel: linfusion"):
        linfusion.linearize(tiny_flux_pipeline())
    with pytest.raises(
        ValueError, match=r"weights: they are a student of method 'linfusion', .*'c"
    ):
        linfusion.linearize(tiny_flux_pipeline(), weights=SIDE)
    with pytest.raises(ValueError, match="Method 'linfusion' takes UNet2DConditionModel"):
        linfusion.linearize(tiny_unet(), "lit")


# dtypes


def test_single_modules_in_float32_do_not_mislead_about_the_dtype():
    flux = tiny_flux().to(torch.bfloat16)
    flux.norm_out.float()
    flux.time_text_embed.float()
    flux._keep_in_fp32_modules = "norm"  # letters that every name has
    assert compute_dtype(flux) == torch.bfloat16
    linfusion.linearize(flux, "clear", down_factor=2)
    child = flux.transformer_blocks[0].attn.get_submodule(get_method("clear").name)
    assert child.pool.weight.dtype == torch.bfloat16


# What summary says


def test_summary_knows_processors_that_were_set_and_restore_says_how_to_undo_that():
    unet = tiny_unet()
    unet.set_attn_processor(linfusion.LinFusionProcessor())
    text = str(linfusion.summary(unet))
    assert (
        "7 of 7 self-attention layers linear (linfusion, by set_attn_processor), 0 learned" in text
    )
    with pytest.raises(ValueError, match="given LinFusionProcessor by set_attn_processor; give it"):
        linfusion.restore(unet)


def test_summary_counts_the_projections_that_a_student_replaced():
    unet = linfusion.linearize(tiny_unet(), weights=WHOLE)
    assert linfusion.summary(unet).parameters == sum(p.numel() for p in WHOLE.parameters())
    flux = tiny_flux()
    side = learned(linfusion.linearize(flux, "clear", radius=3))
    linfusion.restore(flux)
    linfusion.linearize(flux, weights=side)
    assert linfusion.summary(flux).parameters == sum(p.numel() for p in side.parameters()) > 0


def test_summary_says_that_it_counts_and_does_not_time():
    assert "FLOPs are counted, not timed" in str(linfusion.summary(tiny_unet()))


@pytest.mark.parametrize("call", [linfusion.summary, linfusion.linearize])
def test_a_model_built_of_linear_layers_is_linear_already(call):
    with pytest.raises(ValueError, match="is linear already: its 2 layers are MATE"):
        call(tiny_transformer(num_layers=2))
