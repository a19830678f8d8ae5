"""linearize, restore, summary: which layers, which weights, and back to the bit."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file

import linfusion
from linfusion import LinFusionProcessor
from linfusion.layers.find import select, tokens_at
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from linfusion.students.saving import learned
from linfusion.students.student import LinFusion
from tests.student_files import GOLDEN, self_attention_names, student_for
from tests.tiny import (
    denoise,
    tiny_controlnet,
    tiny_motion_unet,
    tiny_sd_pipeline,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    tiny_xl_unet,
    unet_inputs,
)
from tests.tiny_joint import tiny_flux

GOLDEN_UNETS = ["linfusion_unet_sd15_tiny", "linfusion_unet_xl_tiny"]


def linear_layers(model):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "processor", None), LinFusionProcessor)
    ]


def snapshot(model):
    """Everything a failed call must leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: id(processor) for name, processor in model.attn_processors.items()},
        dict(model.config),
        len(model._forward_pre_hooks),
    )


def same(before, after):
    return (
        before[0].keys() == after[0].keys()
        and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
        and before[1:] == after[1:]
    )


def golden_unet(name):
    unet = UNet2DConditionModel.from_pretrained(GOLDEN / name / "unet")
    return unet, load_file(GOLDEN / name / "io.safetensors")


def run_golden(unet, io):
    with torch.no_grad():
        return unet(io["sample"], io["timestep"], io["encoder_hidden_states"]).sample


@pytest.mark.parametrize("name", GOLDEN_UNETS)
def test_a_checkpoint_of_the_authors_gives_the_authors_output(name):
    unet, io = golden_unet(name)
    linfusion.linearize(unet, weights=GOLDEN / name / "linfusion")
    # Softmax differs from it by 0.4.
    torch.testing.assert_close(run_golden(unet, io), io["output_linfusion"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN_UNETS)
def test_restore_gives_back_the_same_bits(name):
    unet, io = golden_unet(name)
    before, output = snapshot(unet), run_golden(unet, io)
    linfusion.restore(linfusion.linearize(unet, weights=GOLDEN / name / "linfusion"))
    assert same(before, snapshot(unet)) and torch.equal(run_golden(unet, io), output)


@pytest.mark.parametrize("build", [tiny_unet, tiny_xl_unet, tiny_motion_unet, tiny_controlnet])
def test_exactly_the_spatial_self_attention_is_taken(build):
    model = build()
    linfusion.linearize(model)
    assert linear_layers(model) == list(self_attention_names(model))


def test_motion_modules_keep_attending_over_frames():
    unet = tiny_motion_unet()
    linfusion.linearize(unet)
    frames = [p for n, p in unet.attn_processors.items() if "motion_modules" in n]
    assert len(frames) == 14 and not any(isinstance(p, LinFusionProcessor) for p in frames)


def test_a_motion_unet_runs_linear_and_comes_back():
    unet = tiny_motion_unet()
    side = student_for(unet)
    inputs = {"sample": torch.randn(1, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(3, 5, 32)}
    before = denoise(unet, **inputs)
    linear = denoise(linfusion.linearize(unet, weights=side), **inputs)
    assert linear.shape == before.shape and not torch.allclose(linear, before, atol=1e-3)
    assert torch.equal(denoise(linfusion.restore(unet), **inputs), before)


def test_a_controlnet_takes_the_first_half_of_the_unets_student():
    net, side = tiny_controlnet(), student_for(tiny_unet())
    linfusion.linearize(net, weights=side)
    expected = side.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.linfusion")
    got = net.mid_block.attentions[0].transformer_blocks[0].attn1.linfusion
    assert torch.equal(got.map_q.last.weight, expected.map_q.last.weight)


def test_a_transformer_without_set_attn_processor_is_taken():
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, norm_num_groups=4
    ).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]))
    with torch.no_grad():
        before = dit(*inputs).sample
        linear = linfusion.linearize(dit)(*inputs).sample
        after = linfusion.restore(dit)(*inputs).sample
    assert not torch.allclose(before, linear, atol=1e-6) and torch.equal(before, after)


def test_self_attention_that_is_not_called_attn1_is_taken():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = unet(x, 3).sample
        linear = linfusion.linearize(unet)(x, 3).sample
    assert len(linear_layers(unet)) == 4 and not torch.allclose(before, linear, atol=1e-6)


def test_a_pipeline_and_its_unet_are_one_thing():
    pipe = tiny_sd_pipeline()
    assert linfusion.linearize(pipe) is pipe
    assert linear_layers(pipe.unet) and not linear_layers(pipe.vae)
    linfusion.restore(pipe.unet)
    assert not linear_layers(pipe.unet)


def test_a_compiled_model_is_seen_through():
    unet = tiny_unet()
    linfusion.linearize(torch.compile(unet, backend="eager"))
    assert linear_layers(unet)


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("mid_block", 1),
        ("down_blocks.0", 1),
        ("up_blocks", 4),
        (r"up_blocks\.\d\.attentions\.1", 2),
        (["mid_block", "down_blocks"], 3),
        ("attn1$", 7),
    ],
)
def test_layers_are_chosen_by_level_or_by_regex(layers, expected):
    unet = tiny_unet()
    linfusion.linearize(unet, layers=layers)
    assert len(linear_layers(unet)) == expected


def test_a_level_is_no_prefix_of_a_number():
    assert select(["blocks.1.a", "blocks.10.a"], "blocks.1") == ["blocks.1.a"]


@pytest.mark.parametrize(
    "layers, message",
    [
        ("down_blocks.7", "layers: 'down_blocks.7' selects none of down_blocks.0"),
        ("(", r"layers: '\(' is neither a level nor a regex"),
        ([], "layers: got no selector"),
    ],
)
def test_a_selector_that_selects_nothing_is_refused(layers, message):
    unet = tiny_unet()
    before = snapshot(unet)
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(unet, layers=layers)
    assert same(before, snapshot(unet))


@pytest.mark.parametrize(
    "path, tokens",
    [
        ("down_blocks.0.x", 63),
        ("down_blocks.1.x", 20),
        ("mid_block.x", 20),
        ("up_blocks.0.x", 20),
        ("up_blocks.1.x", 63),
    ],
)
def test_tokens_at_a_level_round_up_as_the_strided_convolution_does(path, tokens):
    assert tokens_at(tiny_unet(), path, (7, 9)) == tokens


def test_auto_takes_the_layers_where_linear_is_cheaper():
    # 32 channels of 4 heads: 2·32 + 8 = 72 tokens; 64 channels: 2·64 + 16 = 144.
    unet = tiny_unet()
    linfusion.linearize(unet, layers="auto", size=(72, 72))  # 81 and 25 tokens
    assert all(".0." in name or "up_blocks.1" in name for name in linear_layers(unet))
    assert len(linear_layers(unet)) == 3


def test_auto_counts_the_narrow_map_it_is_given():
    unet = tiny_unet()
    linfusion.linearize(unet, layers="auto", size=72, projection_mid_dim=2)
    assert len(linear_layers(unet)) == 7


@pytest.mark.parametrize(
    "size, message",
    [
        (None, 'size: got None; layers="auto" needs'),
        ((64,), "size: got"),
        (0, "size: got 0"),
        (8, 'layers: "auto" found no layer'),
    ],
)
def test_auto_without_a_usable_size_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(tiny_unet(), layers="auto", size=size)


def test_a_size_without_auto_is_refused():
    with pytest.raises(ValueError, match="size: got 64, which only"):
        linfusion.linearize(tiny_unet(), size=64)


def test_auto_does_not_guess_the_levels_of_an_unknown_model():
    with pytest.raises(ValueError, match="does not know how many tokens"):
        linfusion.linearize(tiny_vae(), layers="auto", size=64)


def test_part_of_the_layers_take_part_of_the_weights():
    unet, side = tiny_unet(), student_for(tiny_unet())
    linfusion.linearize(unet, weights=side, layers="mid_block")
    assert len(linear_layers(unet)) == 1


def test_linearize_twice_is_refused_and_changes_nothing():
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"is linearized already \(linfusion, 7 layers\); call"):
        linfusion.linearize(unet)
    assert same(before, snapshot(unet))


@pytest.mark.parametrize("call", [linfusion.restore, linfusion.fuse])
def test_nothing_to_undo_or_fuse_is_refused(call):
    unet = tiny_unet()
    before = snapshot(unet)
    with pytest.raises(ValueError, match="UNet2DConditionModel is not linearized"):
        call(unet)
    assert same(before, snapshot(unet))


def test_a_model_without_self_attention_is_refused():
    model = tiny_text_encoder()
    before = (list(model.state_dict()), str(model.config), len(model._forward_pre_hooks))
    with pytest.raises(ValueError, match="CLIPTextModel has no self-attention of diffusers' class"):
        linfusion.linearize(model)
    assert before == (list(model.state_dict()), str(model.config), len(model._forward_pre_hooks))


@pytest.mark.parametrize("thing", [None, "unet", object()])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ValueError, match="model_or_pipe: got"):
        linfusion.linearize(thing)


def test_a_layer_with_a_processor_of_its_own_is_left_alone():
    class Rotary(AttnProcessor):
        pass

    unet = tiny_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Rotary())
    linfusion.linearize(unet)
    assert len(linear_layers(unet)) == 6


def test_restore_after_the_user_changed_processors_and_weights_gives_the_same_bits():
    unet = tiny_unet()
    side = student_for(unet, attention_weights=True)
    before = snapshot(unet)
    linfusion.linearize(unet, weights=side)
    unet.set_attention_slice("max")
    with torch.no_grad():
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.zero_()
    cross = {n: p for n, p in unet.attn_processors.items() if "attn2" in n}
    linfusion.restore(unet)
    after = snapshot(unet)
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert all(before[1][n] == after[1][n] for n in before[1] if "attn1" in n)
    assert all(unet.attn_processors[n] is p for n, p in cross.items())


def test_restore_follows_the_dtype_of_the_model():
    unet, side = tiny_unet(), student_for(tiny_unet(), attention_weights=True)
    expected = copy.deepcopy(unet).to(torch.bfloat16).state_dict()
    linfusion.linearize(unet, weights=side)
    linfusion.restore(unet.to(torch.bfloat16))
    assert all(torch.equal(tensor, expected[n]) for n, tensor in unet.state_dict().items())


def test_a_deepcopy_of_a_linear_model_restores_by_itself():
    unet, side = tiny_unet(), student_for(tiny_unet(), attention_weights=True)
    before = denoise(unet)
    linear = denoise(linfusion.linearize(unet, weights=side))
    twin = copy.deepcopy(unet)
    assert torch.equal(denoise(linfusion.restore(twin)), before)
    assert torch.equal(denoise(unet), linear)


def test_the_attention_weights_of_a_student_replace_the_models_own():
    unet, side = tiny_unet(), student_for(tiny_unet(), attention_weights=True)
    linfusion.linearize(unet, weights=side)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert torch.equal(unet.get_submodule(path).weight, side.get_submodule(path).weight)


def test_the_model_does_not_share_storage_with_the_weights_it_was_given():
    unet, side = tiny_unet(), student_for(tiny_unet(), attention_weights=True)
    linfusion.linearize(unet, weights=side)
    theirs = {t.data_ptr() for t in side.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in unet.state_dict().values()}


def test_inside_as_softmax_the_model_is_its_own_teacher():
    unet, side = tiny_unet(), student_for(tiny_unet(), attention_weights=True)
    teacher = denoise(unet)
    student = denoise(linfusion.linearize(unet, weights=side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with as_softmax(unet):
            assert torch.equal(denoise(unet), teacher)
        assert torch.equal(denoise(unet), student)


def test_the_map_takes_device_dtype_and_mode_of_the_model():
    unet = linfusion.linearize(tiny_unet().to(torch.bfloat16).train())
    child = unet.mid_block.attentions[0].transformer_blocks[0].attn1.linfusion
    assert child.map_q.first.weight.dtype == torch.bfloat16 and child.training


def test_a_model_without_weights_warns_once_when_it_is_used():
    unet = linfusion.linearize(tiny_unet())
    with pytest.warns(UserWarning, match="linearized without weights: pictures will be wrong"):
        denoise(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(unet)


def test_a_model_whose_map_was_trained_does_not_warn():
    unet = linfusion.linearize(tiny_unet())
    with torch.no_grad():
        for parameter in learned(unet).parameters():
            parameter.add_(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(unet)


@pytest.mark.parametrize(
    "replace, name",
    [
        (lambda unet: unet.set_attention_slice("max"), "SlicedAttnProcessor"),
        (lambda unet: unet.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
        (lambda unet: unet.set_attn_processor(AttnProcessor()), "AttnProcessor"),
    ],
)
def test_replaced_processors_are_said_once_and_can_be_put_back(replace, name):
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    expected = denoise(unet)
    replace(unet)
    with pytest.warns(UserWarning, match=f"7 of 7 linear attention layers run {name} instead"):
        denoise(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(unet)
        linfusion.linearize(unet)  # what the message says
        assert len(linear_layers(unet)) == 7
        # Cross-attention keeps what replaced it; that is softmax to rounding.
        torch.testing.assert_close(denoise(unet), expected, atol=1e-5, rtol=1e-4)


def test_summary_counts_what_is_there():
    unet = linfusion.linearize(tiny_unet(), layers="mid_block", projection_mid_dim=4)
    found = linfusion.summary(unet)
    assert [layer.path for layer in found.layers if layer.linear] == linear_layers(unet)
    # Two MLPs 64 -> 4 -> 64 with a LayerNorm of 4.
    assert found.parameters == 2 * (64 * 4 + 4 + 2 * 4 + 4 * 64 + 64)
    assert found.state_bytes == 4 * (4 * 16 * 16 + 4 * 16)
    assert found.layers[-1].break_even_tokens == 2 * 4 + 16


def test_summary_is_text_and_json():
    found = linfusion.summary(tiny_sd_pipeline())
    assert "0 of 7 self-attention layers linear (softmax)" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["channels"] == 32


def test_a_saved_linear_model_gets_its_weights_back(tmp_path):
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    expected = denoise(unet)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    # Weights read from a file are aligned otherwise in memory, which moves the last bit of a GEMM.
    torch.testing.assert_close(denoise(linfusion.linearize(again)), expected, atol=1e-5, rtol=0)


def test_a_saved_linear_model_restores_to_the_softmax_model(tmp_path):
    unet = tiny_unet()
    expected = snapshot(unet)[0]
    linfusion.linearize(unet, weights=student_for(unet)).save_pretrained(tmp_path)
    again = linfusion.linearize(UNet2DConditionModel.from_pretrained(tmp_path))
    got = linfusion.restore(again).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)


def test_a_saved_model_whose_own_projections_are_lost_says_so(tmp_path):
    unet = tiny_unet()
    linfusion.linearize(unet, weights=student_for(unet, attention_weights=True))
    expected = denoise(unet)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its own are not in that file"):
        linfusion.linearize(again)
    torch.testing.assert_close(denoise(again), expected, atol=1e-5, rtol=0)


def test_a_saved_linear_model_whose_weights_are_gone_is_refused(tmp_path):
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights: the model was saved linearized, but"):
        linfusion.linearize(again)


def test_the_config_carries_the_marker_only_while_linear():
    unet = linfusion.linearize(tiny_unet(), layers="mid_block")
    assert unet.config["_linfusion"]["method"] == "linfusion"
    assert "_linfusion" not in linfusion.restore(unet).config


def test_a_width_beside_weights_is_refused():
    with pytest.raises(ValueError, match="projection_mid_dim: got 4, but the weights say"):
        linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()), projection_mid_dim=4)


@pytest.mark.parametrize("weights", [3.5, {}, b"folder", True], ids=repr)
def test_weights_that_are_neither_name_nor_student_are_refused(weights):
    unet = tiny_unet()
    before = snapshot(unet)
    message = rf"weights: got .* of type {type(weights).__name__}; expected a folder or hub name"
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(unet, weights=weights)
    assert same(before, snapshot(unet))


@pytest.mark.parametrize("saved", [False, True], ids=["object", "folder"])
def test_a_student_of_another_method_is_refused(saved, tmp_path):
    unet, side = tiny_unet(), learned(linfusion.linearize(tiny_flux(), "clear"))
    if saved:
        side.save_pretrained(tmp_path)
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"method: got 'linfusion', but .* of method 'clear'"):
        linfusion.linearize(unet, "linfusion", weights=tmp_path if saved else side)
    assert same(before, snapshot(unet))


@pytest.mark.parametrize("saved", [False, True], ids=["object", "folder"])
def test_the_method_is_that_of_the_weights(saved, tmp_path):
    side = learned(linfusion.linearize(tiny_flux(), "clear", radius=3))
    if saved:
        side.save_pretrained(tmp_path)
    flux = linfusion.linearize(tiny_flux(), weights=tmp_path if saved else side)
    assert linfusion.summary(flux).method == "clear"


def test_a_student_may_be_linearized_over_a_bare_vae():
    vae = tiny_vae()
    assert isinstance(vae, AutoencoderKL)
    linfusion.linearize(vae)
    assert len(linear_layers(vae)) == 2


def test_the_record_names_layers_by_path_alone():
    unet = linfusion.linearize(tiny_unet())
    assert list(record_of(unet).layers) == linear_layers(unet)


def test_linear_attention_takes_any_picture_size():
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    for size in (8, 12, 24):
        assert denoise(unet, **unet_inputs(unet, size)).shape[-1] == size


def test_the_class_of_the_authors_library_is_the_class_of_the_sidecar():
    assert linfusion.LinFusion is LinFusion
