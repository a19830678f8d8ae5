"""Judging a student against its teacher."""

import pytest
import torch

import linfusion
from linfusion.evaluation import evaluate, kernel_distance, psnr, random_features
from linfusion.students.saving import save
from tests.tiny import run, tiny_image, tiny_sd_pipeline, tiny_unet


@pytest.fixture
def student(tmp_path):
    unet = tiny_unet()
    linfusion.linearize(unet, "linfusion")
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".linfusion." in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return save(unet, tmp_path / "student")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(4):
        tiny_image(i, 32).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


SETTINGS = {"sizes": [32], "n": 4, "batch_size": 2, "num_inference_steps": 2}


def test_the_same_arguments_give_the_same_numbers(student, pictures):
    pipe, extract = tiny_sd_pipeline(), random_features()
    before = run(pipe)
    first = evaluate(pipe, student, images=pictures, extractor=extract, **SETTINGS)
    assert torch.equal(run(pipe), before)
    assert evaluate(pipe, student, images=pictures, extractor=extract, **SETTINGS) == first


def test_the_numbers_are_those_of_the_pictures_drawn(student, pictures, tmp_path):
    found = evaluate(
        tiny_sd_pipeline(),
        student,
        images=pictures,
        prompts=["a", "b"],
        seed=5,
        output_dir=tmp_path / "sheets",
        **SETTINGS,
    )
    assert (tmp_path / "sheets" / "teacher-student-32.png").is_file()
    pipe = tiny_sd_pipeline()

    def draw():
        return torch.cat(
            [
                run(pipe, seed=5 + i, prompt=p, height=32, width=32)
                for i, p in enumerate(["a", "b", "a", "b"])
            ]
        )

    teacher = draw()
    linfusion.linearize(pipe, "linfusion", weights=student)
    drawn = draw()
    real = torch.stack(
        [
            torch.tensor(list(tiny_image(i, 32).tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
            for i in range(4)
        ]
    )
    extract = random_features()
    numbers = found["sizes"][32]
    assert numbers["psnr"] == pytest.approx(psnr(teacher, drawn).mean().item(), rel=1e-3)
    for name, images in (("teacher", teacher), ("student", drawn)):
        expected = kernel_distance(extract(images), extract(real))
        assert numbers[f"{name}_kernel_distance"] == pytest.approx(expected, rel=1e-2)
    assert not found["paired"]
    assert numbers["ratio"] == pytest.approx(
        numbers["student_kernel_distance"] / numbers["teacher_kernel_distance"]
    )


def test_pictures_of_captions_are_paired_with_the_real_ones(student, pictures):
    def mean(images):
        return images.mean((2, 3))

    found = evaluate(
        tiny_sd_pipeline(), student, images=pictures, extractor=mean, **{**SETTINGS, "n": 2}
    )
    numbers = found["sizes"][32]
    assert found["paired"]
    pipe = tiny_sd_pipeline()
    # Two of four captions, evenly spread: the first and the third, in the order of their paths.
    drawn = [run(pipe, seed=i, prompt=f"picture {2 * i}", height=32, width=32) for i in range(2)]
    real = [torch.tensor(list(tiny_image(i, 32).tobytes())).view(-1, 3).T / 255 for i in (0, 2)]
    expected = kernel_distance(
        mean(torch.cat(drawn)), torch.stack(real).mean(2), pairs=torch.arange(2)
    )
    assert numbers["teacher_kernel_distance"] == pytest.approx(expected, rel=1e-2)
    low, high = numbers["ratio_interval"]
    assert low <= high


def test_any_extractor_may_judge(student, pictures):
    def blind(images):
        return torch.zeros(len(images), 3)

    found = evaluate(tiny_sd_pipeline(), student, images=pictures, extractor=blind, **SETTINGS)
    assert found["extractor"] == "blind"
    assert found["sizes"][32]["student_kernel_distance"] == 0
    assert found["sizes"][32]["psnr"] < 100  # the pictures do differ


def test_a_student_that_does_not_fit_leaves_the_pipeline_as_it_was(pictures, tmp_path):
    pipe = tiny_sd_pipeline()
    before = run(pipe)
    with pytest.raises(ValueError, match="weights: cannot read"):
        evaluate(pipe, tmp_path / "nowhere", images=pictures, **SETTINGS)
    assert torch.equal(run(pipe), before)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: (folder / "1.txt").unlink(), r"images: .*1\.png has no caption"),
        (lambda folder: [f.unlink() for f in folder.glob("*.png")], "images: no pictures"),
        (
            lambda folder: [f.unlink() for f in folder.glob("[123].*")],
            "images: got 1 pictures, accepted is 2 or more",
        ),
    ],
)
def test_an_unfit_folder_of_pictures_is_named(student, pictures, change, said):
    change(pictures)
    with pytest.raises(ValueError, match=said):
        evaluate(tiny_sd_pipeline(), student, images=pictures, **SETTINGS)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": 0}, "batch_size: got 0, accepted is 1 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, accepted is 1 or more"),
        ({"output_dir": "/dev/null/sheets"}, "output_dir: cannot write to '/dev/null/sheets'"),
        ({"sizes": [33]}, "sizes: got 33, accepted are multiples of 8"),
        ({"sizes": []}, "sizes: got none"),
        ({"n": 1}, "n: got 1, accepted is 2 or more"),
        ({"prompts": []}, "prompts: got none"),
    ],
)
def test_an_unfit_argument_is_named(student, pictures, changes, said):
    with pytest.raises(ValueError, match=said):
        evaluate(tiny_sd_pipeline(), student, images=pictures, **{**SETTINGS, **changes})
