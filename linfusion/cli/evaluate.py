"""`linfusion eval`: a student beside its teacher and real pictures, or one large picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from linfusion.cli import check, load
from linfusion.cli.check import check_pixels
from linfusion.cli.console import Json, emit_json, emit_table, working
from linfusion.files.whole_files import writable_folder

_ONE_PICTURE = {"picture", "base", "border", "band", "crop"}  # what --picture alone takes
_BOTH = {"images", "count", "seed"}


def evaluate(
    context: Context,
    images: Annotated[
        Path | None,
        Option(help="Folder of real pictures, with captions unless --prompts or --picture."),
    ] = None,
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
    device: load.DeviceOption = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for teacher | student grids.")
    ] = None,
    picture: Annotated[
        Path | None, Option(help="Judge this one picture, of any size, instead of a student.")
    ] = None,
    base: Annotated[
        Path | None, Option(help="--picture: the small picture that it was made from.")
    ] = None,
    border: Annotated[
        list[int] | None, Option(min=1, help="--picture: row where a band begins; repeat.")
    ] = None,
    band: Annotated[
        int | None, Option(min=1, help="--picture: rows of a band, if all have as many.")
    ] = None,
    crop: Annotated[
        int, Option(min=8, help="--picture: pixels of a crop compared with those of --images.")
    ] = 128,
    as_json: Json = False,
) -> None:
    """Measure a student against its teacher.

    Kernel and Fréchet distances of both to real pictures; PSNR and SSIM of one to the other at
    equal prompts and seeds.

    With --picture: distances of its crops (--num-images of them) to crops of the pictures of
    --images, its likeness to --base, a seam score at --border or --band (1 is no seam), and a
    repetition score (1 for equal tiles), less that of --base. Each is left out without its flag.
    """
    _check_flags(context, picture is not None)
    if picture is not None:
        result = _judge_picture(
            picture, images, base, border, band=band, crop=crop, n=count, seed=seed
        )
        if as_json:
            emit_json(result)
        else:
            rows = [[name.replace("_", " "), _figure(v)] for name, v in result["scores"].items()]
            title = f"{picture}: {result['width']} x {result['height']} px"
            emit_table(["", "score"], rows, title=title)
        return
    if images is None:
        raise ValueError("images: missing; accepted is a folder of real pictures")
    check.check_model(model)
    check.check_device(device)
    check.check_weights(weights)
    check.check_file("inception", inception)
    for size in sizes or []:
        check_pixels("size", size)
    if not images.is_dir():
        raise ValueError(f"images: {str(images)!r} is not a folder")
    if prompts is not None and not prompts.is_file():
        raise ValueError(f"prompts: {str(prompts)!r} is not a file")
    if output:
        writable_folder("output", output)
    with working(f"evaluating {model}"):
        from linfusion.evaluation.compare import evaluate as judge
        from linfusion.evaluation.features import inception_features
        from linfusion.training.data.pictures import read_lines

        pipe = load.load_pipeline(model, dtype=dtype, variant=variant, device=device)
        pipe.set_progress_bar_config(disable=True)  # `judge` shows one of its own
        weights = _student(pipe, model, weights)
        result = judge(
            pipe,
            weights,
            images=images,
            prompts=None if prompts is None else read_lines(prompts, "prompts"),
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


def _student(pipe: Any, model: str, weights: str | None) -> str:
    """The student to judge, once the pipeline has its teacher's denoiser.

    Where the student is a whole model, it is the pipeline's own, and its teacher lies in the
    pipeline's folder.

    Raises:
        ValueError: there is none.
    """
    from linfusion.layers.record import MARKER

    if type(pipe).__name__ == "LinGenPipeline":
        raise ValueError(f"model: {model} draws videos, which are not judged here")
    folder = Path(check.check_model(model))
    own = getattr(pipe, "transformer", None)
    if weights is None and own is not None and MARKER in own.config and folder.is_dir():
        teacher = folder / "teacher"
        if not teacher.is_dir():
            raise ValueError(
                f"model: {model} is its own student, and has no teacher beside it to compare with"
            )
        softmax = type(own).from_pretrained(teacher, torch_dtype=own.dtype).to(own.device)
        pipe.register_modules(transformer=softmax)
        return str(folder / "transformer")
    return load.find_weights(pipe, model, weights)


def _check_flags(context: Context, large: bool) -> None:
    """Refuse a flag that the kind of call, of a large picture or of a student, would not read."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is None or source.name == "DEFAULT" or name == "as_json":
            continue
        flag = next(p.opts[0] for p in context.command.params if p.name == name).lstrip("-")
        if large and name not in _ONE_PICTURE | _BOTH:
            raise ValueError(f"{flag}: not taken together with --picture")
        if not large and name in _ONE_PICTURE:
            raise ValueError(f"{flag}: taken only together with --picture")


def _judge_picture(
    picture: Path,
    images: Path | None,
    base: Path | None,
    border: list[int] | None,
    *,
    band: int | None,
    crop: int,
    n: int,
    seed: int,
) -> dict[str, Any]:
    """{"picture", "height", "width", "scores": {name: number}}, of what the flags allow."""
    if border and band:
        raise ValueError("band: give either --border or --band")
    if images is not None and not images.is_dir():
        raise ValueError(f"images: {str(images)!r} is not a folder")
    for name, path in (("picture", picture), ("base", base)):
        if path is not None and not path.is_file():
            raise ValueError(f"{name}: {str(path)!r} is not a file")
    with working(f"judging {picture}"):
        import numpy as np

        from linfusion.evaluation import large_pictures as large
        from linfusion.files.picture_reader import open_picture
        from linfusion.training.data.pictures import image_folder

        real = []
        if images is not None:
            examples = image_folder(images, captions=False, argument="images")
            for i in range(min(n, len(examples))):  # a crop takes one each, more are not needed
                real.append(np.asarray(examples[i * len(examples) // min(n, len(examples))].open()))
        pixels = open_picture(picture)
        small = None if base is None else open_picture(base)
        scores: dict[str, float] = {}
        if band:
            border = list(range(band, len(pixels), band))
            if not border:
                raise ValueError(f"band: got {band}, accepted is below the {len(pixels)} rows")
        if border:
            scores["seam"] = large.seam_score(pixels, border)
        if small is not None:
            scores |= large.consistency(pixels, small)
        scores["repetition"] = large.repetition_score(pixels)
        if small is not None:
            scores["repetition_above_base"] = large.repetition_score(pixels, small)
        if real:
            found = large.patch_distances(pixels, real, crop=crop, n=n, seed=seed)
            scores |= {f"patch_{name}_distance": value for name, value in found.items()}
    height, width = pixels.shape[:2]
    return {"picture": str(picture), "height": height, "width": width, "scores": scores}


def _figure(value: float | list[float]) -> str:
    """0.1234, or "0.9 to 1.2" for an interval."""
    values = value if isinstance(value, list) else [value]
    return " to ".join(f"{v:.4g}" for v in values)
