"""Whole FLUX and Stable Diffusion 3 pipelines under CLEAR: dense-mask pictures, and back."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)

import linfusion
from tests.dense import masked, window_mask
from tests.tiny import run, tiny_image
from tests.tiny_joint import (
    FLUX,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

IMAGE = tiny_image(size=32)
MASK = IMAGE.convert("L")
TEXT = 9
GRID = (8, 6)  # 32 by 24 pixels
SIZE = {"height": 32, "width": 24}
PAINT = {"image": IMAGE, "mask_image": MASK}
KONTEXT = {"image": IMAGE, "_auto_resize": False, "max_area": 32 * 24}

FLUX_CALLS = {
    "text to image": (FluxPipeline, {}, SIZE),
    "image to image": (FluxImg2ImgPipeline, {}, {**SIZE, "image": IMAGE, "strength": 1.0}),
    "inpaint": (FluxInpaintPipeline, {}, {**SIZE, **PAINT, "strength": 1.0}),
    "ControlNet": (
        FluxControlNetPipeline,
        {"controlnet": tiny_flux_controlnet},
        {**SIZE, "control_image": IMAGE},
    ),
    "Kontext": (FluxKontextPipeline, {}, {**SIZE, **KONTEXT}),
    "Fill": (
        FluxFillPipeline,
        {"transformer": lambda: tiny_flux(in_channels=48, out_channels=16)},
        {**SIZE, **PAINT},
    ),
}


def flux(name):
    cls, extra, call = FLUX_CALLS[name]
    pipe = tiny_flux_pipeline(cls, **{key: make() for key, make in extra.items()})
    return pipe, {**call, "max_sequence_length": TEXT}


@pytest.mark.parametrize("name", FLUX_CALLS)
def test_a_flux_pipeline_draws_what_a_dense_mask_draws_and_comes_back(name):
    pipe, call = flux(name)
    before = run(pipe, **call)
    sizes = [GRID, (8, 8)] if name == "Kontext" else [GRID]
    with masked(window_mask(sizes, 2.5, TEXT)):
        expected = run(pipe, **call)
    linfusion.linearize(pipe, "clear", radius=2.5)
    if name == "ControlNet":
        linfusion.linearize(pipe.controlnet, "clear", radius=2.5)
    drawn = run(pipe, **call)
    assert drawn.shape[-2:] == (32, 24) and torch.isfinite(drawn).all()
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    assert (drawn - before).abs().max() > 1e-3
    if name == "ControlNet":
        linfusion.restore(pipe.controlnet)
    assert torch.equal(run(linfusion.restore(pipe), **call), before)


@pytest.mark.parametrize("cls", [StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline])
def test_a_stable_diffusion_3_pipeline_draws_what_a_dense_mask_draws_and_comes_back(cls):
    pipe = tiny_sd3_pipeline(cls)
    call = dict(SIZE)
    if cls is StableDiffusion3Img2ImgPipeline:
        call |= {"image": IMAGE.resize((24, 32)), "strength": 1.0}
    before = run(pipe, **call)
    text = 77 + 256  # CLIP, and zeros for the T5 that is not there
    with masked(window_mask([GRID], 2.5, text, text_first=False)):
        expected = run(pipe, **call)
    drawn = run(linfusion.linearize(pipe, "clear", radius=2.5), **call)
    assert drawn.shape[-2:] == (32, 24) and torch.isfinite(drawn).all()
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    assert (drawn - before).abs().max() > 1e-3
    assert torch.equal(run(linfusion.restore(pipe), **call), before)


def test_a_mask_given_to_the_pipeline_is_not_ignored():
    pipe, call = flux("text to image")
    linfusion.linearize(pipe, "clear")
    with pytest.raises(ValueError, match="joint_attention_kwargs: got attention_mask"):
        run(pipe, **call, joint_attention_kwargs={"attention_mask": torch.ones(1)})


def test_perturbed_attention_guidance_is_refused():
    pipe = tiny_sd3_pipeline(StableDiffusion3PAGPipeline)
    with pytest.raises(ValueError, match="method 'clear' does not have; use the pipeline without"):
        linfusion.linearize(pipe, "clear")


def test_a_loaded_ip_adapter_is_refused_by_name():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe, _ = flux("text to image")
    width = FLUX["attention_head_dim"] * FLUX["num_attention_heads"]
    attn = pipe.transformer.transformer_blocks[0].attn
    attn.set_processor(FluxIPAdapterAttnProcessor(width, 32))
    with pytest.raises(ValueError, match=r"runs FluxIPAdapterAttnProcessor, .*unload_ip_adapter"):
        linfusion.linearize(pipe, "clear")
