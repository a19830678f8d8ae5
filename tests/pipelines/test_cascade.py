"""HighResPipeline on FLUX and Stable Diffusion 3 against the same thing done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from PIL import Image

import linfusion
from linfusion import HighResPipeline
from tests.pipelines.test_highres import seeded
from tests.tiny_joint import tiny_flux_pipeline, tiny_sd3_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

LEVEL = 1 / 255
TEXT = 9
WINDOW = {"radius": 2.5, "proportional": True}
HOSTS = {"flux": tiny_flux_pipeline, "sd3": tiny_sd3_pipeline}


def draw(pipe, highres=None, **changes):
    """Pixels of a small run: a base of 24 by 32 px and one stage of 48 by 64, [3, H, W]."""
    arguments = {
        "prompt": "a red apple",
        "size": (48, 64),
        "base_size": 32,
        "num_inference_steps": 4,
        "max_sequence_length": TEXT,
        "generator": seeded(),
        "output_type": "pt",
        **changes,
    }
    made = (highres or HighResPipeline(pipe, clear=WINDOW))(**arguments).images
    return made[0] if isinstance(made, torch.Tensor) else made


@torch.no_grad()
def decode(pipe, latents, height=None, width=None):
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(latents).sample[0]
    return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def encode(pipe, picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    mean = pipe.vae.encode(pixels).latent_dist.mode()
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("host", HOSTS)
def test_the_cascade_is_the_one_that_diffusers_gives_by_hand(host):
    pipe = HOSTS[host]()
    later_class = FluxImg2ImgPipeline if host == "flux" else StableDiffusion3Img2ImgPipeline
    base_guidance = 3.5 if host == "flux" else 7.0
    generator = seeded()
    call = {"prompt": "a red apple", "num_inference_steps": 4, "output_type": "latent"}
    call |= {"generator": generator, "max_sequence_length": TEXT}
    latents = pipe(**call, height=24, width=32, guidance_scale=base_guidance).images
    scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, shift=3.0, use_dynamic_shifting=False
    )
    later = later_class(**{**pipe.components, "scheduler": scheduler})
    later.set_progress_bar_config(disable=True)
    ntk = {"ntk": 10.0} if host == "flux" else {}
    picture = Image.fromarray(decode(pipe, latents, 24, 32)).resize((64, 48))
    start = encode(pipe, picture)
    linfusion.linearize(pipe, "clear", **WINDOW, **ntk)
    size = {"height": 48, "width": 64}
    latents = later(**call, **size, image=start, strength=0.7, guidance_scale=7.5).images
    linfusion.restore(pipe)
    expected = torch.from_numpy(decode(pipe, latents, 48, 64)).permute(2, 0, 1) / 255
    ours = draw(pipe)
    assert ours.shape == (3, 48, 64)
    assert (ours - expected).abs().max() < 2.5 * LEVEL
    assert (draw(pipe, generator=seeded(4)) - expected).abs().max() > 20 * LEVEL
