"""The models that ship: whole, small, and what their cards say they are."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors import safe_open

import linfusion
from linfusion import zoo
from linfusion.layers.find import model_of
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
def test_it_is_small_and_of_half_precision_safetensors(name):
    folder = zoo.path(name)
    limit = 32_000_000 if (folder / "teacher").is_dir() else 24_000_000  # two models, or one
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= limit
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


def classes(pipe, steps=8):
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe(
        ["heart", "face"],
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in (13, 0)],
        output_type="pt",
    ).images


def test_a_whole_student_lies_beside_its_teacher():
    student, teacher = zoo.load("emoji-lit"), zoo.load("emoji-lit", linear=False)
    layers = linfusion.summary(student).layers
    assert len(layers) == 8 and all(layer.linear for layer in layers)
    with pytest.raises(ValueError, match=r"student: got 'lit' .* one that is the model itself"):
        zoo.load("emoji-lit", student="lit")
    ours, theirs = classes(student), classes(teacher)
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).square().mean() < 0.05
    for images in (ours, theirs):
        red, green, blue = images[1, :, 56:72, 56:72].mean((1, 2))  # a face is yellow
        assert red > 0.8 and green > 0.4 and blue < 0.45
        assert images[:, :, :4, :4].mean() > 0.85  # on white


def test_the_video_model_draws_a_red_heart_that_moves_and_stays_one():
    pipe = zoo.load("emoji-video")
    pipe.set_progress_bar_config(disable=True)
    clip = pipe(
        "a red heart",
        num_frames=8,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    assert clip.shape == (8, 3, 128, 128)
    red, green, blue = clip[:, :, 48:72, 56:72].mean((0, 2, 3))
    assert red > 0.7 and green < 0.35 and blue < 0.6
    assert clip[:, :, :4, :4].mean() > 0.85
    moved = clip.diff(dim=0).abs().mean((1, 2, 3))
    assert (moved > 0.001).all() and moved.max() < 0.1
