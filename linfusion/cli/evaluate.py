"""`linfusion eval`: how far the student's pictures are from real ones, and the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from linfusion.cli import load
from linfusion.cli.console import Json, check_writable, emit_json, emit_table, working
from linfusion.cli.size import check_pixels


def evaluate(
    images: Annotated[Path, Option(help="Folder of real pictures with captions.")],
    model: load.ModelOption = load.DEFAULT_MODEL,
    weights: load.WeightsOption = None,
    sizes: Annotated[
        list[int] | None, Option("--size", help="Pixels of a side; repeat. [default: 128]")
    ] = None,
    prompts: Annotated[
        Path | None, Option(help="Text file, one prompt a line; the captions if absent.")
    ] = None,
    count: Annotated[int, Option("--num-images", min=2, help="Of each kind and size.")] = 256,
    batch_size: Annotated[int, Option(min=1, help="Pictures drawn at a time.")] = 16,
    steps: Annotated[
        int, Option("--num-inference-steps", "--steps", min=1, help="Denoising steps.")
    ] = 50,
    guidance_scale: Annotated[float, Option(min=0, help="Classifier-free guidance.")] = 7.5,
    seed: Annotated[int, Option(min=0, help="Of the first picture.")] = 0,
    inception: Annotated[
        Path | None,
        Option(help="weights-inception-2015-12-05-6726825d.pth; random features if absent."),
    ] = None,
    dtype: load.DtypeOption = "auto",
    variant: load.VariantOption = None,
    device_map: load.DeviceMapOption = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for teacher | student grids.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a student against its teacher.

    Kernel and Fréchet distances of both to real pictures; PSNR and SSIM of one to the other at
    equal prompts and seeds.
    """
    load.check_model(model)
    for size in sizes or []:
        check_pixels("size", size)
    if not images.is_dir():
        raise ValueError(f"images: {str(images)!r} is not a folder")
    lines = None
    if prompts is not None:
        if not prompts.is_file():
            raise ValueError(f"prompts: {str(prompts)!r} is not a file")
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if output:
        check_writable("output", output)
    with working(f"evaluating {model}"):
        from linfusion.training.evaluation import evaluate as judge
        from linfusion.training.features import inception_features

        pipe = load.load_pipeline(model, dtype=dtype, variant=variant, device_map=device_map)
        pipe.set_progress_bar_config(disable=True)  # `judge` shows one of its own
        result = judge(
            pipe,
            load.find_weights(pipe, model, weights),
            images=images,
            prompts=lines,
            sizes=sizes or [128],
            n=count,
            batch_size=batch_size,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            extractor=inception_features(inception) if inception else None,
            output_dir=output,
        )
    if as_json:
        emit_json(result)
        return
    columns = list(next(iter(result["sizes"].values())))
    emit_table(
        ["", *(f"{size} px" for size in result["sizes"])],
        [
            [name.replace("_", " "), *(_figure(row[name]) for row in result["sizes"].values())]
            for name in columns
        ],
        title=f"{model}: {result['n']} pictures, seed {result['seed']}",
    )


def _figure(value: float | list[float]) -> str:
    """0.1234, or "0.9 to 1.2" for an interval."""
    values = value if isinstance(value, list) else [value]
    return " to ".join(f"{v:.4g}" for v in values)
