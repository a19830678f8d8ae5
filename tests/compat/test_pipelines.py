"""Whole diffusers pipelines, linear: they run, what is linear takes effect, restore is exact."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

import linfusion
from linfusion import LinFusionProcessor
from tests.student_files import student_for
from tests.tiny import (
    XL_TEXT_WIDTH,
    denoise,
    run,
    tiny_controlnet,
    tiny_image,
    tiny_sd_pipeline,
    tiny_unet,
    tiny_xl_pipeline,
)

IMAGE = tiny_image()
CALLS = {
    "text to image": (StableDiffusionPipeline, {}, {}),
    "image to image": (
        StableDiffusionImg2ImgPipeline,
        {},
        {"image": IMAGE, "strength": 1.0},
    ),
    "inpaint": (
        StableDiffusionInpaintPipeline,
        {},
        {"image": IMAGE, "mask_image": IMAGE.convert("L"), "height": 64, "width": 64},
    ),
    "ControlNet": (
        StableDiffusionControlNetPipeline,
        {"controlnet": tiny_controlnet},
        {"image": IMAGE},
    ),
    "PAG": (StableDiffusionPAGPipeline, {"pag_applied_layers": lambda: "mid"}, {"pag_scale": 3.0}),
}


def build(name):
    cls, extra, call = CALLS[name]
    return tiny_sd_pipeline(cls, **{key: make() for key, make in extra.items()}), call


@pytest.mark.parametrize("name", CALLS)
def test_a_pipeline_runs_linear_and_comes_back_to_the_bit(name):
    pipe, call = build(name)
    before = run(pipe, **call)
    side = student_for(pipe.unet, attention_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nobody took our place
        linear = run(linfusion.linearize(pipe, weights=side), **call)
    assert torch.isfinite(linear).all() and not torch.allclose(linear, before, atol=1e-3)
    assert torch.equal(run(linfusion.restore(pipe), **call), before)


@pytest.mark.parametrize("name", CALLS)
def test_a_pipeline_runs_fused(name):
    pipe, call = build(name)
    linfusion.linearize(pipe, weights=student_for(pipe.unet))
    expected = run(pipe, **call)
    torch.testing.assert_close(run(linfusion.fuse(pipe), **call), expected, atol=1e-4, rtol=0)


def test_diffusers_own_call_sets_the_processor():
    pipe = tiny_sd_pipeline()
    linfusion.linearize(pipe)
    expected = run(pipe)
    linfusion.restore(pipe)
    pipe.unet.set_attn_processor(LinFusionProcessor())
    torch.testing.assert_close(run(pipe), expected, atol=1e-5, rtol=0)


def test_the_controlnet_of_a_pipeline_is_taken_by_itself():
    pipe, call = build("ControlNet")
    before = run(pipe, **call)
    linfusion.linearize(pipe.controlnet, weights=student_for(tiny_unet()))
    assert not torch.allclose(run(pipe, **call), before, atol=1e-4)
    linfusion.restore(pipe.controlnet)
    assert torch.equal(run(pipe, **call), before)


def test_perturbed_guidance_is_linear_where_the_model_is():
    pipe, call = build("PAG")
    linfusion.linearize(pipe, weights=student_for(pipe.unet))
    perturbed = run(pipe, **call)
    # Without guidance nothing is perturbed: the layers under guidance compute what the others do.
    plain = tiny_sd_pipeline(StableDiffusionPipeline, **{**pipe.components, "unet": pipe.unet})
    torch.testing.assert_close(run(pipe, pag_scale=0.0), run(plain), atol=1e-5, rtol=0)
    assert not torch.allclose(perturbed, run(plain), atol=1e-4)


def test_a_pag_pipeline_made_later_says_what_to_do():
    pipe = tiny_sd_pipeline()
    linfusion.linearize(pipe, weights=student_for(pipe.unet))
    expected = run(pipe)
    pag = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers="mid")
    pag.set_progress_bar_config(disable=True)
    with pytest.warns(
        UserWarning, match=r"1 of 7 .* run PAGCFGIdentity.*linearize\(pipe\) on that"
    ):
        run(pag)
    linfusion.linearize(pag)
    torch.testing.assert_close(run(pag, pag_scale=1e-9), expected, atol=1e-5, rtol=0)


def test_restoring_a_pag_pipeline_gives_back_its_processors():
    pipe, _ = build("PAG")
    before = pipe._pag_attn_processors
    linfusion.restore(linfusion.linearize(pipe))
    assert pipe._pag_attn_processors is before


def test_sdxl_hands_its_latents_to_a_refiner():
    base = tiny_xl_pipeline()
    unet = tiny_unet(1, **{**base.unet.config, "cross_attention_dim": XL_TEXT_WIDTH})
    refiner = tiny_xl_pipeline(
        StableDiffusionXLImg2ImgPipeline,
        **{k: v for k, v in base.components.items() if v is not None and k != "unet"},
        unet=unet,
    )

    def both():
        latents = run(base, output_type="latent", denoising_end=0.5, num_inference_steps=4)
        return run(refiner, image=latents, denoising_start=0.5, num_inference_steps=4)

    before = both()
    linfusion.linearize(base, weights=student_for(base.unet))
    one = both()
    linfusion.linearize(refiner, weights=student_for(refiner.unet))
    two = both()
    assert not torch.allclose(before, one, atol=1e-4) and not torch.allclose(one, two, atol=1e-4)
    linfusion.restore(base)
    linfusion.restore(refiner)
    assert torch.equal(both(), before)


def test_a_saved_pipeline_gets_its_student_back(tmp_path):
    pipe = tiny_sd_pipeline(image_encoder=None, feature_extractor=None)
    linfusion.linearize(pipe, weights=student_for(pipe.unet))
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert not torch.allclose(run(again), expected, atol=1e-4)  # diffusers drops what it knows not
    torch.testing.assert_close(run(linfusion.linearize(again)), expected, atol=1e-5, rtol=0)


def test_from_pipe_shares_the_linear_model():
    pipe = tiny_sd_pipeline()
    linfusion.linearize(pipe, weights=student_for(pipe.unet))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=pipe.unet.dtype)
    other.set_progress_bar_config(disable=True)
    linear = run(other, image=IMAGE, strength=1.0)
    linfusion.restore(other)
    assert not torch.allclose(run(other, image=IMAGE, strength=1.0), linear, atol=1e-4)
    with pytest.raises(ValueError, match="is not linearized"):
        linfusion.restore(pipe)


def test_the_model_runs_outside_its_pipeline():
    pipe = tiny_sd_pipeline()
    linear = denoise(linfusion.linearize(pipe, weights=student_for(pipe.unet)).unet)
    assert not torch.allclose(linear, denoise(linfusion.restore(pipe).unet), atol=1e-4)
