"""Judge a student against its teacher and both against real pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor


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
    """Kernel distances of teacher and student to real pictures at each size, and their likeness.

    Args:
        pipeline: the teacher, or its folder / hub name / "zoo:emoji"; given back as it came.
        weights: the student's weights, as `linfusion.linearize(..., weights=...)` takes them.
        images: image folder of the real pictures.
        prompts: prompts to draw, cycled up to n; None takes the captions of the image folder.
        sizes: heights = widths in pixels.
        n: pictures drawn of each kind at each size.
        batch_size: pictures drawn at a time.
        seed: picture i starts from noise of seed + i, for teacher and student alike.
        num_inference_steps, guidance_scale: of the sampler.
        extractor: images [B, 3, H, W] in [0, 1] -> features [B, F]; None is `random_features()`.
        output_dir: if given, teacher | student grids are written there.

    Returns:
        {"n", "seed", "num_inference_steps", "guidance_scale", "extractor", "sizes": {size:
        {"teacher_kernel_distance", "student_kernel_distance", "ratio", "teacher_frechet_distance",
        "student_frechet_distance", "psnr", "ssim"}}}
    """
    raise NotImplementedError
