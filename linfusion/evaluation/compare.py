"""Judge a student against its teacher, and both against real pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from linfusion import zoo
from linfusion.evaluation.features import random_features
from linfusion.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    kernel_distance_ratio,
    psnr,
    ssim,
)
from linfusion.files.sheets import side_by_side
from linfusion.files.whole_files import writable_folder, writing
from linfusion.lit.pipeline import with_learned_variance
from linfusion.lit.whole import as_student
from linfusion.pipelines.arguments import draw_arguments, pixel_multiple
from linfusion.pipelines.load import default_device, in_one_dtype, load
from linfusion.training.data.pictures import Example, fit, image_folder


def evaluate(
    pipeline: DiffusionPipeline | str,
    weights: str | Path,
    *,
    images: str | Path,
    prompts: Sequence[str] | None = None,
    sizes: Sequence[int],
    n: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    extractor: Callable[[Tensor], Tensor] | None = None,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Distances of teacher and student to real pictures at each size, and their likeness in pairs.

    The same arguments give the same numbers: picture i is drawn from noise of its own seed.

    Args:
        pipeline: the teacher, or its folder / hub name / "zoo:emoji"; given back as it came.
        weights: the student's weights, as `linfusion.linearize(..., weights=...)` takes them, or
            the folder of a student that was trained whole.
        images: image folder of the real pictures; all of them are used.
        prompts: prompts to draw, cycled up to n; None takes the captions of the image folder,
            evenly spread, and pairs each picture drawn with the real one of its caption.
        sizes: heights = widths in pixels.
        n: pictures drawn of each kind at each size. The interval of the ratio narrows with √n.
        batch_size: pictures drawn at a time.
        seed: picture i starts from noise of seed + i, for teacher and student alike.
        num_inference_steps, guidance_scale: of the sampler.
        extractor: images [B, 3, H, W] in [0, 1] -> features [B, F]; None is `random_features()`.
        output_dir: if given, a teacher | student sheet of each size is written there.

    Returns:
        {"n", "real", "paired", "seed", "num_inference_steps", "guidance_scale", "extractor",
        "sizes": {size: {"teacher_kernel_distance", "student_kernel_distance", "ratio",
        "ratio_interval", "teacher_kernel_distance_std", "student_kernel_distance_std",
        "teacher_frechet_distance", "student_frechet_distance", "psnr", "ssim"}}}.
        "ratio" is student / teacher kernel distance, "ratio_interval" holds 95 % of its bootstrap
        distribution (`kernel_distance_ratio`), "std" is the bootstrap standard error. "paired"
        tells whether the kernel distances are those of pairs, as they are with captions
        (`kernel_distance`); the Fréchet distances are always to all real pictures.

    Raises:
        ValueError: an argument that cannot be; nothing has been drawn then.
    """
    for name, value, least in (("n", n, 2), ("batch_size", batch_size, 1),
                               ("num_inference_steps", num_inference_steps, 1)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: got {value}, accepted is {least} or more")
    if not sizes:
        raise ValueError("sizes: got none, accepted is one or more")
    if prompts is not None and not prompts:
        raise ValueError("prompts: got none, accepted is one or more, or None for the captions")
    examples = image_folder(images, captions=prompts is None, argument="images")
    if len(examples) < 2:
        raise ValueError(f"images: got {len(examples)} pictures, accepted is 2 or more")
    pipe: Any = pipeline
    if isinstance(pipeline, str):
        pipe = load(zoo.resolve(pipeline)).to(default_device())
    pipe = with_learned_variance(pipe)
    for size in sizes:
        if size < 11 or size % pixel_multiple(pipe):
            raise ValueError(
                f"sizes: got {size}, accepted are multiples of {pixel_multiple(pipe)} from 11 on"
            )
    sheets = None if output_dir is None else writable_folder("output_dir", output_dir)
    pairs = None
    if prompts is None:
        pairs = _spread(len(examples), n)
        drawn = [examples[i].caption for i in pairs.tolist()]
    else:
        drawn = [prompts[i % len(prompts)] for i in range(n)]
    extract = random_features() if extractor is None else extractor

    def pictures(size: int, label: str) -> Tensor:
        return _draw(
            pipe,
            drawn,
            size,
            batch_size=batch_size,
            seed=seed,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            label=label,
        )

    with as_student(pipe, weights):  # an unfit student is found out first
        student = {size: pictures(size, "student") for size in sizes}

    found = {}
    for size in sizes:
        teacher = pictures(size, "teacher")
        real = _features(extract, _real(examples, size, batch_size))
        t, s = (_features(extract, p.split(batch_size)) for p in (teacher, student[size]))
        found[size] = _compare(real, t, s, pairs) | {
            "psnr": psnr(teacher, student[size]).mean().item(),
            "ssim": ssim(teacher, student[size]).mean().item(),
        }
        if sheets is not None:
            sheet = side_by_side(*(_images(p[:8]) for p in (teacher, student[size])))
            with writing(sheets / f"teacher-student-{size}.png") as file:
                sheet.save(file, "PNG")
    return {
        "n": n,
        "real": len(examples),
        "paired": pairs is not None,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "extractor": getattr(extract, "__name__", type(extract).__name__),
        "sizes": found,
    }


def _draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    size: int,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    guidance_scale: float,
    label: str,
) -> Tensor:
    """Pictures [len(prompts), 3, size, size] in [0, 1], on the CPU."""
    parts = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"{label} {size} px"):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        with in_one_dtype(pipe):
            drawn = pipe(
                batch,
                **draw_arguments(pipe, len(batch), guidance_scale=guidance_scale),
                height=size,
                width=size,
                num_inference_steps=steps,
                generator=generators,
                output_type="pt",
            ).images
        parts.append(drawn.float().cpu())
    return torch.cat(parts)


def _compare(
    real: Tensor, teacher: Tensor, student: Tensor, pairs: Tensor | None
) -> dict[str, float | list[float]]:
    found = kernel_distance_ratio(student, teacher, real, pairs=pairs)
    return {
        "teacher_kernel_distance": kernel_distance(teacher, real, pairs=pairs),
        "student_kernel_distance": kernel_distance(student, real, pairs=pairs),
        "ratio": found.ratio,
        "ratio_interval": list(found.interval),
        "teacher_kernel_distance_std": found.y_std,
        "student_kernel_distance_std": found.x_std,
        "teacher_frechet_distance": frechet_distance(teacher, real),
        "student_frechet_distance": frechet_distance(student, real),
    }


def _real(examples: Sequence[Example], size: int, batch_size: int) -> list[Tensor]:
    batches = []
    for start in range(0, len(examples), batch_size):
        pixels = []
        for example in examples[start : start + batch_size]:
            pixels.append(np.asarray(fit(example.open(), size, size, "lanczos")))
        batches.append(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255)
    return batches


def _features(extract: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([extract(batch) for batch in batches])


def _spread(examples: int, n: int) -> Tensor:
    """n positions [n] in a folder: evenly spread, or all of them in turn if there are fewer."""
    i = torch.arange(n)
    return i % examples if examples <= n else i * examples // n


def _images(pictures: Tensor) -> list[Image.Image]:
    pixels = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(p) for p in pixels]
