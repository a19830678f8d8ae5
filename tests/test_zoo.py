"""The model that ships: whole, small, and what its card says it is."""

from __future__ import annotations

import torch
from safetensors import safe_open

import linfusion
from linfusion import zoo


def draw(pipe, seed=0):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        "a red heart",
        height=128,
        width=128,
        num_inference_steps=2,
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


def test_it_draws_on_white_as_every_picture_it_was_trained_on():
    image = draw(zoo.load("emoji"))[0]
    assert image.shape == (3, 128, 128)
    assert image[:, :4, :4].mean() > 0.8
