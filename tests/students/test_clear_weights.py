"""Students of CLEAR: the authors' files, ours, low-rank ones, and back to the bit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import linfusion
from linfusion.layers.record import record_of
from linfusion.students.low_rank import save_low_rank
from linfusion.students.saving import learned, save
from linfusion.students.student import LinFusion
from tests.attention.test_clear import GOLDEN, golden
from tests.compat.test_runtime import OFFLOADS
from tests.student_files import student_for
from tests.test_linearize import same, snapshot
from tests.tiny import tiny_unet
from tests.tiny_joint import (
    flux_inputs,
    forward,
    sd3_inputs,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_sd3,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

LEARNED = ("to_q.", "to_k.", "to_v.", "to_out.0.")


def official(folder, *, name="clear_local_3.safetensors", factor=1, seed=5, **changes):
    """A file as the authors publish theirs: part of a state dict, and pooling weights."""
    generator = torch.Generator().manual_seed(seed)
    model = tiny_flux(**changes)
    tensors = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
        if any(f".attn.{part}" in name for part in LEARNED)
    }
    if factor > 1:
        for path in model.attn_processors:
            weight = torch.rand(1, 1, 1, factor, 1, factor, 1, generator=generator)
            tensors[f"{path}.spatial_weight"] = weight
    save_file(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_file_of_the_authors_gives_the_authors_output(file, tmp_path):
    model, inputs, options, expected, pool = golden(file)
    state = model.state_dict()
    tensors = {n: t.clone() for n, t in state.items() if any(f".attn.{p}" in n for p in LEARNED)}
    save_file(tensors | pool, tmp_path / "clear_local_99.safetensors")
    with torch.no_grad():
        for name in tensors:
            model.get_parameter(name).mul_(0.5)
    base, own = snapshot(model), forward(model, inputs)
    factor = options.pop("down_factor")
    linfusion.linearize(model, "clear", weights=tmp_path / "clear_local_99.safetensors", **options)
    assert record_of(model).settings["transformer_blocks.0.attn"]["down_factor"] == factor
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=0)
    linfusion.restore(model)
    assert same(base, snapshot(model)) and torch.equal(forward(model, inputs), own)


def test_the_radius_is_in_the_name_of_the_file_unless_given(tmp_path):
    file = official(tmp_path, name="clear_local_16_down_4.safetensors", factor=4)
    for options, radius in (({}, 16), ({"radius": 5}, 5)):
        model = linfusion.linearize(tiny_flux(), "clear", weights=file, **options)
        setting = record_of(model).settings["single_transformer_blocks.1.attn"]
        assert (setting["radius"], setting["down_factor"]) == (radius, 4)


def test_a_file_whose_name_does_not_tell_the_radius_asks_for_it(tmp_path):
    model, file = tiny_flux(), official(tmp_path, name="student.safetensors")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"radius: the weights do not say it.*as radius=8"):
        linfusion.linearize(model, "clear", weights=file)
    assert same(before, snapshot(model))
    linfusion.linearize(model, "clear", weights=file, radius=3)


def test_pooling_weights_come_from_the_file(tmp_path):
    file = official(tmp_path, factor=2)
    model = linfusion.linearize(tiny_flux(), "clear", weights=str(file))
    stored = load_file(file)
    for path in record_of(model).layers:
        pool = model.get_submodule(f"{path}.clear.pool").weight
        assert torch.equal(pool.flatten(), stored[f"{path}.processor.spatial_weight"].flatten())


def change(file, how):
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "how, message",
    [
        (
            lambda t: t.pop("transformer_blocks.0.attn.to_k.bias"),
            r"Missing: transformer_blocks\.0\.attn\.to_k\.bias\.",
        ),
        (
            lambda t: t.pop("single_transformer_blocks.0.attn.processor.spatial_weight"),
            r"Missing: single_transformer_blocks\.0\.attn\.clear\.pool\.weight\.",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.ff.net.2.bias": torch.ones(2)}),
            r"Unexpected: transformer_blocks\.0\.ff\.net\.2\.bias\.",
        ),
        (
            lambda t: t.update({"transformer_blocks.9.attn.to_q.weight": torch.ones(32, 32)}),
            r"Unexpected: transformer_blocks\.9\.attn\.to_q\.weight\.",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.processor.mean": torch.ones(2)}),
            r"Unexpected: transformer_blocks\.0\.attn\.processor\.mean\.",
        ),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.bias": torch.ones(31)}),
            r"Misshapen: transformer_blocks\.0\.attn\.to_q\.bias \(31,\), expected \(32,\)\.",
        ),
    ],
    ids=["missing", "missing pool", "unexpected", "other layer", "other buffer", "misshapen"],
)
def test_a_file_that_does_not_fit_is_refused_with_the_names(how, message, tmp_path):
    model, file = tiny_flux(), official(tmp_path, factor=2)
    change(file, how)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"weights: the tensors of .*{message}"):
        linfusion.linearize(model, "clear", weights=file)
    assert same(before, snapshot(model))


def test_a_file_of_another_width_is_refused(tmp_path):
    model, file = tiny_flux(), official(tmp_path, num_attention_heads=4)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"Misshapen: .*to_k\.weight \(64, 64\), expected \(32, 32"
    ):
        linfusion.linearize(model, "clear", weights=file)
    assert same(before, snapshot(model))


def test_a_file_for_the_transformer_is_refused_for_its_controlnet(tmp_path):
    with pytest.raises(ValueError, match=r"Unexpected: single_transformer_blocks\.1\.attn"):
        linfusion.linearize(tiny_flux_controlnet(), "clear", weights=official(tmp_path))


@pytest.mark.parametrize("factor, given", [(1, 4), (4, 1), (4, 2)])
def test_another_down_factor_than_that_of_the_weights_is_refused(factor, given, tmp_path):
    model, file = tiny_flux(), official(tmp_path, factor=factor)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"down_factor: got {given}, but .* pools by {factor}"):
        linfusion.linearize(model, "clear", weights=file, down_factor=given)
    assert same(before, snapshot(model))


def test_a_file_of_clear_is_no_student_of_linfusion(tmp_path):
    file = official(tmp_path)
    with pytest.raises(ValueError, match="method 'linfusion' is a folder or hub name"):
        linfusion.linearize(tiny_unet(), "linfusion", weights=file)


@pytest.mark.parametrize("name", ["no.safetensors", "./a/b/c.safetensors", "a/b/c.safetensors"])
def test_a_file_that_is_nowhere_is_refused(name):
    with pytest.raises(ValueError, match=r"weights: (there is no file|cannot get)"):
        linfusion.linearize(tiny_flux(), "clear", weights=name)


def test_a_folder_that_is_nowhere_is_refused_by_that_name():
    model = tiny_flux()
    before = snapshot(model)
    with pytest.raises(ValueError, match="weights: cannot read /nowhere"):
        linfusion.linearize(model, weights="/nowhere")
    assert same(before, snapshot(model))


def test_a_truncated_file_is_refused(tmp_path):
    file = official(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights: cannot read .* as safetensors"):
        linfusion.linearize(tiny_flux(), "clear", weights=file)


def test_a_student_is_saved_in_the_authors_names_and_comes_back(tmp_path):
    file = official(tmp_path, factor=2)
    model = linfusion.linearize(tiny_flux(), "clear", weights=file, proportional=True)
    save(model, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    theirs = load_file(file)
    projections = [name for name in theirs if "processor" not in name]
    assert all(torch.equal(stored[name], theirs[name]) for name in projections)
    again = linfusion.linearize(tiny_flux(), "clear", weights=tmp_path / "ours")
    assert record_of(again).settings == record_of(model).settings
    torch.testing.assert_close(
        forward(again, flux_inputs()), forward(model, flux_inputs()), atol=1e-6, rtol=0
    )


def test_the_learned_part_shares_the_parameters_of_the_model(tmp_path):
    model = linfusion.linearize(tiny_flux(), "clear", weights=official(tmp_path, factor=2))
    side = learned(model)
    mine = {id(p) for p in model.parameters()}
    assert all(id(p) in mine for p in side.parameters())
    assert len(list(side.parameters())) == 8 + 2 * 6 + 3  # one double block, two single, pooling


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3], ids=["FLUX", "SD3"])
def test_a_student_of_some_layers_is_saved_and_loaded(make, tmp_path):
    inputs = (flux_inputs if make is tiny_flux else sd3_inputs)()
    model = linfusion.linearize(make(), "clear", radius=2, layers=r"^transformer_blocks\.0\.")
    save(model, tmp_path)
    again = linfusion.linearize(make(), "clear", weights=tmp_path)
    assert len(record_of(again).layers) == 1
    torch.testing.assert_close(forward(again, inputs), forward(model, inputs), atol=1e-6, rtol=0)


def test_a_model_saved_with_its_student_gets_it_back(tmp_path):
    model = linfusion.linearize(tiny_flux(), "clear", radius=3, down_factor=2)
    with torch.no_grad():
        for path in record_of(model).layers:
            model.get_submodule(f"{path}.clear.pool").weight.copy_(torch.rand(1, 4))
    model.save_pretrained(tmp_path)
    again = linfusion.linearize(FluxTransformer2DModel.from_pretrained(tmp_path), "clear")
    assert record_of(again).settings == record_of(model).settings
    torch.testing.assert_close(
        forward(again, flux_inputs()), forward(model, flux_inputs()), atol=1e-6, rtol=0
    )


def perturbed(rank, scale=0.05):
    """A FLUX whose projections differ from `tiny_flux()` by a difference of this rank."""
    model = tiny_flux()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".attn.{part}" in name for part in LEARNED):
                if parameter.ndim == 1:
                    parameter += scale * torch.randn(parameter.shape, generator=generator)
                    continue
                b = torch.randn(len(parameter), rank, generator=generator)
                a = torch.randn(rank, parameter.shape[1], generator=generator)
                parameter += scale * b @ a
    return model


def student_of(model, folder):
    """A file with the projections of this model, as the authors'."""
    tensors = {
        n: t.clone()
        for n, t in model.state_dict().items()
        if any(f".attn.{p}" in n for p in LEARNED)
    }
    save_file(tensors, folder / "clear_local_3.safetensors")
    return folder / "clear_local_3.safetensors"


def test_a_difference_of_low_rank_is_stored_without_loss(tmp_path):
    model = tiny_flux()
    linfusion.linearize(model, "clear", weights=student_of(perturbed(4), tmp_path))
    report = save_low_rank(model, tmp_path / "low", rank=4)
    assert report.error < 1e-5 and max(report.layer_errors.values()) < 1e-5
    assert report.parameters < 0.4 * report.full_parameters
    base = tiny_flux()
    own = snapshot(base)
    linfusion.linearize(base, "clear", weights=tmp_path / "low")
    torch.testing.assert_close(
        forward(base, flux_inputs()), forward(model, flux_inputs()), atol=2e-5, rtol=0
    )
    assert same(own, snapshot(linfusion.restore(base)))


def test_what_a_low_rank_loses_is_reported(tmp_path):
    model = tiny_flux()
    linfusion.linearize(model, "clear", weights=student_of(perturbed(8), tmp_path))
    report = save_low_rank(model, tmp_path / "low", rank=4)
    read = LinFusion.from_pretrained(tmp_path / "low")
    assert read.config["rank_error"] == report.error > 0.1
    # Measured from outside, on what is read back.
    base = linfusion.linearize(tiny_flux(), "clear", weights=read)
    error = norm = 0.0
    for name, parameter in tiny_flux().requires_grad_(False).named_parameters():
        if any(f".attn.{part}weight" in name for part in LEARNED):
            student = model.get_parameter(name).detach()
            error += float((student - base.get_parameter(name).detach()).norm() ** 2)
            norm += float((student - parameter).norm() ** 2)
    assert (error / norm) ** 0.5 == pytest.approx(report.error, rel=1e-3)
    assert "rank 4" in str(report)


def test_a_low_rank_folder_is_plain_data(tmp_path):
    model = linfusion.linearize(tiny_flux(), "clear", weights=student_of(perturbed(2), tmp_path))
    save_low_rank(model, tmp_path / "low", rank=2)
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert (config["method"], config["rank"]) == ("clear", 2)
    stored = load_file(tmp_path / "low" / "diffusion_pytorch_model.safetensors")
    assert stored["transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (2, 32)


@pytest.mark.parametrize("rank", [0, 33, 2.5, True])
def test_a_rank_that_makes_no_sense_is_refused(rank, tmp_path):
    model = linfusion.linearize(tiny_flux(), "clear", weights=official(tmp_path))
    with pytest.raises(ValueError, match=f"rank: got {rank}, expected a whole number from 1 to 32"):
        save_low_rank(model, tmp_path / "low", rank=rank)
    assert not (tmp_path / "low").exists()


def test_a_model_with_its_own_projections_has_no_difference(tmp_path):
    model = linfusion.linearize(tiny_flux(), "clear")
    with pytest.raises(ValueError, match="there is no difference to store"):
        save_low_rank(model, tmp_path, rank=2)


def lora(model):
    """An adapter that changes something, the same for the same seed."""
    torch.manual_seed(11)
    model.add_adapter(
        LoraConfig(
            r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
        )
    )
    return model


def test_a_lora_may_come_before_or_after(tmp_path):
    file, inputs = official(tmp_path), flux_inputs()
    plain = forward(linfusion.linearize(tiny_flux(), "clear", weights=file), inputs)
    after = forward(lora(linfusion.linearize(tiny_flux(), "clear", weights=file)), inputs)
    before = forward(linfusion.linearize(lora(tiny_flux()), "clear", weights=file), inputs)
    assert torch.equal(before, after) and (before - plain).abs().max() > 1e-3


def test_restore_under_a_lora_gives_the_same_bits(tmp_path):
    model, inputs = lora(tiny_flux()), flux_inputs()
    expected = forward(model, inputs)
    linfusion.linearize(model, "clear", weights=official(tmp_path))
    assert torch.equal(forward(linfusion.restore(model), inputs), expected)


def test_the_scale_of_a_lora_is_honoured(tmp_path):
    model = lora(linfusion.linearize(tiny_flux(), "clear", weights=official(tmp_path)))
    full = forward(model, flux_inputs())
    none = forward(model, flux_inputs(joint_attention_kwargs={"scale": 0.0}))
    plain = linfusion.linearize(tiny_flux(), "clear", weights=official(tmp_path))
    torch.testing.assert_close(none, forward(plain, flux_inputs()), atol=1e-6, rtol=0)
    assert (full - none).abs().max() > 1e-3


def test_fused_projections_are_split_before_their_weights_are_swapped(tmp_path):
    model, file = tiny_flux(), official(tmp_path)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call transformer.unfuse_qkv_projections"):
        linfusion.linearize(model, "clear", weights=file)
    model.unfuse_qkv_projections()
    expected = snapshot(model)
    linfusion.linearize(model, "clear", weights=file).fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call transformer.unfuse_qkv_projections"):
        linfusion.restore(model)
    model.unfuse_qkv_projections()
    assert same(expected, snapshot(linfusion.restore(model)))


def test_a_student_is_not_fresh_and_nothing_warns(tmp_path):
    model = linfusion.linearize(tiny_flux(), "clear", weights=official(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(model, flux_inputs())


@pytest.mark.parametrize("order", ["linear first", "offloaded first"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_computes_the_same_and_comes_back(name, order, tmp_path):
    file, inputs = official(tmp_path, factor=2), flux_inputs(6, 12)
    expected = forward(linfusion.linearize(tiny_flux(), "clear", weights=file), inputs)
    model = tiny_flux()
    full = forward(model, inputs)
    if order == "linear first":
        linfusion.linearize(model, "clear", weights=file)
    OFFLOADS[name](model)
    if order == "offloaded first":
        linfusion.linearize(model, "clear", weights=file)
    torch.testing.assert_close(forward(model, inputs), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(forward(linfusion.restore(model), inputs), full, atol=1e-5, rtol=0)


def test_a_student_of_linfusion_may_be_stored_at_a_low_rank_too(tmp_path):
    model = linfusion.linearize(
        tiny_unet(), weights=student_for(tiny_unet(), attention_weights=True)
    )
    report = save_low_rank(model, tmp_path, rank=16)
    again = linfusion.linearize(tiny_unet(), weights=tmp_path)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    student, read, base = (
        m.get_parameter(f"{name}.weight").detach() for m in (model, again, tiny_unet())
    )
    error = (student - read).norm() / (student - base).norm()
    assert float(error) == pytest.approx(report.layer_errors[name], rel=1e-3)
    assert 0.1 < report.layer_errors[name] < 0.9
