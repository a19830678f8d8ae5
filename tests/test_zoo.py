"""The models that ship: whole, small, and what their cards say they are."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

import linfusion
from linfusion import zoo
from linfusion.layers import model_of
from linfusion.pipelines.arguments import draw_arguments

# Of a teacher and all of its students.
EVERY = [(name, student) for name in zoo.names() for student in zoo.students(zoo.path(name))]


def draw(pipe, steps=2, prompt="a red heart"):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt,
        **draw_arguments(pipe, guidance_scale=4.0),
        height=128,
        width=128,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@pytest.mark.parametrize("name", zoo.names())
def test_it_fits_in_24_megabytes_of_half_precision_safetensors(name):
    folder = zoo.path(name)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 24_000_000
    assert not list(folder.rglob("*.bin"))
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "BF16", "I64"}, file


@pytest.mark.parametrize("name, student", EVERY)
def test_its_student_replaces_every_self_attention(name, student):
    layers = linfusion.summary(zoo.load(name, student=student)).layers
    assert layers and all(layer.linear for layer in layers)


@pytest.mark.parametrize("name, student", EVERY)
def test_its_student_restored_is_its_teacher_to_the_bit(name, student):
    linear, teacher = zoo.load(name, student=student), zoo.load(name, linear=False)
    assert not torch.equal(draw(linear), draw(teacher))
    linfusion.restore(linear)
    ours, theirs = model_of(linear).state_dict(), model_of(teacher).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_student_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match="student: got 'clear-16' with linear=True; emoji has linf"
    ):
        zoo.load("emoji", student="clear-16")
    with pytest.raises(ValueError, match="student: got 'linfusion' with linear=False"):
        zoo.load("emoji", linear=False, student="linfusion")


@pytest.mark.parametrize("linear", [True, False])
def test_a_red_heart_is_red_on_white(linear):
    image = draw(zoo.load("emoji", linear=linear), steps=8)[0]
    red, green, blue = image[:, 56:72, 56:72].mean((1, 2))
    assert red > 0.7 and green < 0.3 and blue < 0.6
    assert image[:, :4, :4].mean() > 0.85


def test_students_come_in_the_order_of_their_radii():
    assert list(zoo.students(zoo.path("emoji-flux"))) == ["clear-8", "clear-16"]
