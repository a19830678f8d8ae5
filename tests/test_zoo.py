"""The model that ships: whole, small, and what its card says it is."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

import linfusion
from linfusion import zoo


def draw(pipe, steps=2):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a red heart",
        height=128,
        width=128,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=generator,
        output_type="pt",
    ).images


def test_it_fits_in_24_megabytes_of_half_precision_safetensors():
    folder = zoo.path("emoji")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 24_000_000
    assert not list(folder.rglob("*.bin"))
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "BF16", "I64"}, file


def test_its_student_replaces_every_self_attention():
    layers = linfusion.summary(zoo.load("emoji")).layers
    assert layers and all(layer.linear for layer in layers)


def test_its_student_restored_is_its_teacher_to_the_bit():
    student, teacher = zoo.load("emoji"), zoo.load("emoji", linear=False)
    assert not torch.equal(draw(student), draw(teacher))
    linfusion.restore(student)
    theirs = teacher.unet.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in student.unet.state_dict().items())


@pytest.mark.parametrize("linear", [True, False])
def test_a_red_heart_is_red_on_white(linear):
    image = draw(zoo.load("emoji", linear=linear), steps=8)[0]
    red, green, blue = image[:, 56:72, 56:72].mean((1, 2))
    assert red > 0.7 and green < 0.3 and blue < 0.6
    assert image[:, :4, :4].mean() > 0.85
