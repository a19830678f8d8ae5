"""A pipeline from disk has one dtype, whatever its files have, and draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from linfusion.evaluation import evaluate
from linfusion.pipelines.load import in_one_dtype, load
from linfusion.training import TrainConfig, distill
from tests.student_files import student_for
from tests.tiny import tiny_image, tiny_sd_pipeline, tiny_unet
from tests.tiny_joint import tiny_flux_pipeline

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of pipelines by (name, dtype of the text encoders, of all else)."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for name, make in (("sd", tiny_sd_pipeline), ("flux", tiny_flux_pipeline)):
        for text, rest in itertools.product(DTYPES, (torch.float32, torch.bfloat16)):
            pipe = make()
            for part, module in pipe.components.items():
                if isinstance(module, nn.Module):
                    module.to(text if part.startswith("text_encoder") else rest)
            found[name, text, rest] = root / f"{name}-{text}-{rest}"
            pipe.save_pretrained(found[name, text, rest])
    return found


def dtypes(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {part.dtype for part in parts}  # T5 keeps a few weights in float32 by itself


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32}
    return pipe("a", num_inference_steps=1, output_type="pt", **size).images


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_pipeline_is_loaded_in_one_dtype_and_draws(saved, name, dtype):
    for text, rest in itertools.product(DTYPES, (torch.float32, torch.bfloat16)):
        pipe = load(str(saved[name, text, rest]), dtype=dtype)
        assert dtypes(pipe) == {dtype or torch.float32}
    assert draw(pipe).isfinite().all()


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("text, rest", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16), (torch.float32, torch.bfloat16),
])  # fmt: skip
def test_a_pipeline_of_two_dtypes_draws_under_autocast(name, text, rest):
    pipe = tiny_sd_pipeline() if name == "sd" else tiny_flux_pipeline()
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.to(text if part.startswith("text_encoder") else rest)
    with in_one_dtype(pipe):
        assert draw(pipe).isfinite().all()


def test_a_pipeline_of_one_dtype_draws_as_it_is():
    pipe = tiny_sd_pipeline()
    with in_one_dtype(pipe):
        assert not torch.is_autocast_enabled("cpu")


def teach(folder, tmp_path, **changes):
    (tmp_path / "p.txt").write_text("a\nb\n")
    return TrainConfig(**{
        "pretrained_model_name_or_path": str(folder),
        "train_prompts": str(tmp_path / "p.txt"),
        "output_dir": str(tmp_path / "out"),
        "resolution": 32, "train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0,
        "teacher_steps": 1, "validation_prompts": ("a",), "validation_steps": 1,
        "checkpointing_steps": 0, "use_ema": False, **changes,
    })  # fmt: skip


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_teacher_from_disk_draws_in_every_precision(saved, tmp_path, precision):
    folder = saved["sd", torch.float16, torch.float32]
    config = teach(folder, tmp_path, mixed_precision=precision)
    if precision == "fp16":  # there is no scaler of gradients on a CPU: only the drawing is tried
        from linfusion.training.teachers.images import NoiseTeacher

        pipe = load(str(folder))
        pipe.unet.to(torch.float16)
        generators = [torch.Generator().manual_seed(0)]
        drawn = NoiseTeacher(pipe).latents(["a"], (32, 32), config, generators)
        assert drawn.isfinite().all()
        return
    distill(config)
    assert (tmp_path / "out" / "samples" / "step-0000001.png").is_file()


def test_a_teacher_in_memory_may_have_two_dtypes(tmp_path):
    pipe = tiny_sd_pipeline()
    pipe.text_encoder.half()  # as diffusers and transformers load Stable Diffusion by themselves
    distill(teach("x", tmp_path), pipeline=pipe)
    assert (tmp_path / "out" / "samples" / "step-0000001.png").is_file()


def test_evaluate_takes_the_folder_of_a_teacher(saved, tmp_path):
    student = student_for(tiny_unet())
    student.save_pretrained(tmp_path / "student")
    for i in range(2):
        tiny_image(i, 32).save(tmp_path / f"{i}.png")
    found = evaluate(
        str(saved["sd", torch.float16, torch.float32]), tmp_path / "student", images=tmp_path,
        prompts=["a"], sizes=[32], n=2, batch_size=2, num_inference_steps=1,
    )  # fmt: skip
    assert found["sizes"][32]["psnr"] > 0
