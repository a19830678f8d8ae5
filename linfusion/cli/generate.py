"""`linfusion generate`: prompts to pictures."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from linfusion.cli import check, load
from linfusion.cli.check import check_pixels, choose_size
from linfusion.cli.console import Json, emit_json, keeping, say, working
from linfusion.cli.ranks import ParallelOption, join_ranks
from linfusion.files.whole_files import writable_folder, writing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image


def generate(
    prompts: Annotated[
        list[str] | None, Argument(metavar="PROMPT...", help="What to draw.", show_default=False)
    ] = None,
    classes: Annotated[
        list[str] | None,
        Option("--class", help="What to draw, for a model of classes: name or number; repeat."),
    ] = None,
    output: Annotated[
        Path,
        Option("--output", "-o", help="A .png file (one picture) or a folder (made if missing)."),
    ] = Path("."),
    model: load.ModelOption = load.DEFAULT_MODEL,
    weights: load.WeightsOption = None,
    method: load.MethodOption = None,
    layers: load.LayersOption = None,
    softmax: Annotated[
        bool, Option("--softmax", help="The model as it is, with softmax attention.")
    ] = False,
    negative_prompt: Annotated[str | None, Option(help="What not to draw.")] = None,
    size: Annotated[
        str | None,
        Option(metavar="WxH", help="In pixels, e.g. 512x512; the model's own if absent."),
    ] = None,
    height: Annotated[int | None, Option(help="In pixels, instead of --size.")] = None,
    width: Annotated[int | None, Option(help="In pixels, instead of --size.")] = None,
    steps: Annotated[
        int | None, Option("--num-inference-steps", "--steps", help="Denoising steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None, Option(help="Strength of the prompt (classifier-free guidance).")
    ] = None,
    num_images_per_prompt: Annotated[int, Option(min=1, help="Each with the next seed.")] = 1,
    seed: Annotated[
        int | None, Option(min=0, max=2**63 - 1, help="Of the first picture; random if absent.")
    ] = None,
    dtype: load.DtypeOption = "auto",
    variant: load.VariantOption = None,
    revision: load.RevisionOption = None,
    token: load.TokenOption = None,
    device: load.DeviceOption = None,
    lora: Annotated[
        list[str] | None,
        Option(metavar="JSON", help='{"lora_id": ..., "lora_scale": 1.0}; repeat to stack.'),
    ] = None,
    cpu_offload: Annotated[
        Literal["model", "group"] | None, Option(help="Keep on the GPU only what works.")
    ] = None,
    attention_backend: Annotated[
        str | None, Option(help="diffusers' backend for the softmax attention that remains.")
    ] = None,
    vae_tiling: Annotated[bool, Option("--vae-tiling", help="Decode in tiles.")] = False,
    vae_slicing: Annotated[
        bool, Option("--vae-slicing", help="Decode one picture at a time.")
    ] = False,
    compile_blocks: Annotated[
        bool, Option("--compile", help="torch.compile the repeated blocks.")
    ] = False,
    pipeline_kwargs: Annotated[
        str | None, Option(metavar="JSON", help="More arguments of the pipeline's call.")
    ] = None,
    parallel: ParallelOption = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts.

    For example: linfusion generate "a red apple" --size 256x256 --seed 0
    """
    if bool(prompts) == bool(classes):
        raise ValueError(
            "prompt: got both a prompt and --class; accepted is one kind"
            if prompts
            else "prompt: missing; say what to draw (--class for a model of classes)"
        )
    prompts = prompts or classes or []
    check_prompts(prompts)
    height, width = choose_size(size, height, width)
    call: dict[str, Any] = {
        "num_inference_steps": _at_least(1, "num_inference_steps", steps),
    }
    call = {name: value for name, value in call.items() if value is not None}
    check.check_device(device)
    check.check_method(method)
    check.check_weights(weights)
    check.check_backend(attention_backend)
    guidance_scale = _at_least(0, "guidance_scale", guidance_scale)
    more = check.parse_json_object("--pipeline-kwargs", pipeline_kwargs)
    loras = check.parse_lora(lora)
    where = check.check_model(model)
    check.check_class(model, classes)
    if softmax and (weights or layers):
        raise ValueError("--softmax: takes no --weights and no --layers")
    if parallel and (softmax or compile_blocks):
        raise ValueError(
            "parallel: takes neither --softmax nor --compile; what is shared is linear attention"
        )
    place = join_ranks(parallel)
    seed = place.agreed(secrets.randbelow(2**32) if seed is None else seed)
    paths = output_paths(output, prompts, num_images_per_prompt, seed)

    from linfusion.pipelines.arguments import draw_arguments, pixel_multiple
    from linfusion.pipelines.kinds import refuse_other_kinds
    from linfusion.summary import summary

    with working(f"loading {model}"):
        with load.reaching(model, revision):
            refuse_other_kinds(model, where, revision=revision, token=token)
        pipe = load.load_pipeline(
            model,
            dtype=dtype,
            variant=variant,
            revision=revision,
            token=token,
            device=device or place.device,
            cpu_offload=cpu_offload,
        )
        of_classes = hasattr(pipe, "labels")
        if of_classes != bool(classes):
            raise ValueError(
                f"class: {model} is a model of classes: {', '.join(pipe.labels)}; give --class"
                if of_classes
                else f"class: {model} has none; give a prompt"
            )
        for text in [*prompts, *([negative_prompt] if negative_prompt else [])]:
            check_length(pipe, text)
        pixels = load.size_in_pixels(pipe, height, width)
        for name, side in zip(("height", "width"), pixels, strict=True):
            check_pixels(name, side, pixel_multiple(pipe))
        call |= {"height": pixels[0], "width": pixels[1]}
        call |= draw_arguments(pipe, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
        check.check_call(pipe, more, ("prompt", "generator", "output_type", "return_dict"))
        call |= more
        if not softmax:
            size_of_auto = pixels if layers == "auto" else None
            weights = load.put_student(
                pipe, model, weights, method=method, layers=layers, size=size_of_auto
            )
        load.optimize(
            pipe,
            lora=loras,
            cpu_offload=cpu_offload,
            device=device,
            attention_backend=attention_backend,
            vae_tiling=vae_tiling,
            vae_slicing=vae_slicing,
            compile_blocks=compile_blocks,
        )
        place.share(pipe)
        common = {
            "model": model,
            "method": "softmax" if softmax else summary(pipe).method,
            "weights": weights,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": str(pipe._execution_device),
        }
        jobs = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        images: list[dict[str, Any]] = []
        with keeping(lambda: _drawn(images, len(jobs), seed)), check.blaming(more):
            for i, (prompt, path) in enumerate(zip(jobs, paths, strict=True)):
                image, seconds = _draw(pipe, prompt, seed + i, call)
                described = {"prompt": prompt, "seed": seed + i, "seconds": round(seconds, 3)}
                described |= {"width": image.width, "height": image.height}
                if place.first:
                    save_png(image, path, {**common, **described, "call": call})
                    say(f"{image.width}x{image.height} in {seconds:.1f} s, seed {seed + i}")
                images.append({"path": str(path), **described})
    if not place.first:
        return
    if as_json:
        emit_json({**common, "call": call, "images": images})
    else:
        print(*paths, sep="\n")


def _drawn(images: list[dict[str, Any]], wanted: int, seed: int) -> str:
    """What there is of the pictures, and how to go on."""
    if not images:
        return "nothing was drawn"
    left = f"; --seed {seed + len(images)} goes on with the others"
    last = images[-1]["path"]
    return f"{len(images)} of {wanted} pictures are written, the last {last}{left}"


def check_prompts(prompts: list[str]) -> None:
    """Refuse a prompt with nothing in it."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"prompt: {prompt!r} is empty; say what to draw")


def check_length(pipe: DiffusionPipeline, prompt: str) -> None:
    """Refuse a prompt of which the text encoder would not read the end."""
    tokenizers = [t for name, t in pipe.components.items() if name.startswith("tokenizer") and t]
    if not tokenizers:
        return
    tokenizer = max(tokenizers, key=lambda t: t.model_max_length)
    limit = tokenizer.model_max_length
    if limit > 1 << 20:  # it was saved without one
        return
    ids = tokenizer(prompt, truncation=True, max_length=limit + 1, verbose=False).input_ids
    if len(ids) <= limit:
        return
    total = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    marks = tokenizer.num_special_tokens_to_add()
    read = tokenizer.decode(ids[: limit - marks + 1], skip_special_tokens=True)
    raise ValueError(
        f"prompt: {len(prompt)} characters are {total - marks} tokens, but this model reads "
        f"{limit - marks}; shorten it. The last words read would be: ...{read[-40:]}"
    )


def output_paths(output: Path, prompts: list[str], per_prompt: int, seed: int) -> list[Path]:
    """One file a picture: `output` itself, or <prompt>-<seed>.png in the folder, which is made.

    Raises:
        ValueError: not a .png file and not a folder, a file for several pictures, or not writable.
    """
    count = len(prompts) * per_prompt
    if output.suffix and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise ValueError(f"output: {str(output)!r} is neither a .png file nor a folder")
        if count > 1:
            raise ValueError(
                f"output: {str(output)!r} is one file, but {count} pictures are wanted"
            )
        folder, paths = output.parent, [output]
    else:
        folder, paths = output, []
        for i in range(count):
            name = f"{_slug(prompts[i // per_prompt])}-{seed + i}"
            paths.append(_unused(folder, name, paths))
    writable_folder("output", folder)
    return paths


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write the file whole or not at all, with the parameters as JSON in its text chunk."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    with writing(path) as file:
        image.save(file, format="PNG", pnginfo=about)


def _draw(
    pipe: DiffusionPipeline, prompt: str, seed: int, call: dict[str, Any]
) -> tuple[Image.Image, float]:
    """One picture and its seconds. The noise is drawn on the CPU: the same on every device."""
    import torch

    pipe.set_progress_bar_config(desc=prompt[:24], leave=False)
    start = time.perf_counter()
    what = int(prompt) if hasattr(pipe, "labels") and prompt.isdecimal() else prompt
    image = pipe(what, generator=torch.Generator().manual_seed(seed), **call).images[0]
    return image, time.perf_counter() - start


def _at_least(least: int, name: str, value: float | None) -> float | None:
    if value is not None and not value >= least:  # `not >=` also refuses nan
        raise ValueError(f"{name}: {value}; accepted is {least} or more")
    if value == math.inf:
        raise ValueError(f"{name}: {value}; accepted are finite numbers")
    return value


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "picture"


def _unused(folder: Path, name: str, taken: list[Path]) -> Path:
    path, n = folder / f"{name}.png", 1
    while path.exists() or path in taken:
        path, n = folder / f"{name}-{n}.png", n + 1
    return path
