"""`linfusion upscale`: a prompt, or a picture, to a picture of any size."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from linfusion.cli import check, load
from linfusion.cli.check import choose_size
from linfusion.cli.console import Json, emit_json, emit_table, keeping, kept_in, say, working
from linfusion.cli.generate import check_length, check_prompts
from linfusion.cli.ranks import ParallelOption, join_ranks
from linfusion.files.whole_files import writable_folder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from linfusion.pipelines.highres.plan import Plan

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def upscale(
    prompt: Annotated[str, Argument(help="What to draw, or what the picture shows.")],
    size: Annotated[
        str | None, Option(metavar="WxH", help="In pixels, e.g. 16384 or 4096x8192.")
    ] = None,
    height: Annotated[int | None, Option(help="In pixels, instead of --size.")] = None,
    width: Annotated[int | None, Option(help="In pixels, instead of --size.")] = None,
    output: Annotated[
        Path, Option("--output", "-o", help="A .png, .tif or .jpg file; a preview lies beside it.")
    ] = Path("upscaled.png"),
    image: Annotated[
        Path | None, Option(help="Start from this picture instead of drawing one.")
    ] = None,
    control_image: Annotated[
        str | None,
        Option(help='For the model\'s ControlNet: a file, or "previous" (tile ControlNets).'),
    ] = None,
    strategy: Annotated[
        Literal["sdedit", "guided", "superres"], Option(help="What later stages do.")
    ] = "sdedit",
    strength: Annotated[
        list[float] | None,
        Option(help="Noise of a stage, in (0, 1]; repeat for each stage, the last one goes on."),
    ] = None,
    base_size: Annotated[
        str | None, Option(metavar="WxH", help="Of the first stage; the model's own if absent.")
    ] = None,
    factor: Annotated[float, Option(help="From one stage to the next.")] = 2.0,
    shift: Annotated[
        float | None, Option(help="FLUX, SD3: of the noise levels in later stages; 3 if absent.")
    ] = None,
    low_resolution_guidance: Annotated[
        float | None,
        Option(
            help="FLUX, SD3: hold stages to the picture before, 0 to 1; above 4096 px if absent."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None, Option(metavar="BYTES", help="What the model may take, e.g. 12GB.")
    ] = None,
    scratch: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for what does not fit into the budget.")
    ] = None,
    state: Annotated[
        Path | None, Option(metavar="DIR", help="Folder that keeps what is done.")
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on with the run in --state, if there is one.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only say what it takes: memory, disk, time.")
    ] = False,
    model: load.ModelOption = load.DEFAULT_MODEL,
    weights: load.WeightsOption = None,
    method: load.MethodOption = None,
    softmax: Annotated[
        bool, Option("--softmax", help="The model as it is, with softmax attention.")
    ] = False,
    negative_prompt: Annotated[str | None, Option(help="What not to draw.")] = None,
    steps: Annotated[
        int | None, Option("--num-inference-steps", "--steps", help="Denoising steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None, Option(help="Strength of the prompt (classifier-free guidance).")
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, max=2**63 - 1, help="Of all noise; random if absent.")
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
    pipeline_kwargs: Annotated[
        str | None, Option(metavar="JSON", help="More arguments of the pipeline's call.")
    ] = None,
    parallel: ParallelOption = None,
    as_json: Json = False,
) -> None:
    """Draw or enlarge a picture, stage by stage, up to 16K and within a memory budget.

    For example: linfusion upscale "a red heart" --size 16384 --memory-budget 12GB --state run
    """
    check_prompts([prompt])
    pixels = choose_size(size, height, width)
    if None in pixels:
        raise ValueError("size: missing; accepted is --size, or --height and --width")
    base = choose_size(base_size, None, None) if base_size else None
    check.check_state(state, resume, "run")
    check.check_device(device)
    check.check_method(method)
    check.check_weights(weights)
    check.check_file("image", image)
    if control_image not in (None, "previous"):
        check.check_file("control_image", Path(control_image or ""))
    for given in strength or []:
        if not 0 < given <= 1:
            raise ValueError(f"strength: {given}; accepted are numbers above 0, up to 1")
    if softmax and weights:
        raise ValueError("--softmax: takes no --weights")
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"output: {str(output)!r}; accepted are {', '.join(_SUFFIXES)}")
    call: dict[str, Any] = {
        "height": pixels[0],
        "width": pixels[1],
        "base_size": base,
        "factor": factor,
        "image": image,
        "control_image": control_image,
        "strategy": strategy,
        "strengths": strength,
        "num_inference_steps": steps,
        "shift": shift,
        "low_resolution_guidance": low_resolution_guidance,
        "output": output,
    }
    call = {name: value for name, value in call.items() if value is not None}
    more = check.parse_json_object("--pipeline-kwargs", pipeline_kwargs)
    loras = check.parse_lora(lora)
    check.check_model(model)
    writable_folder("output", output.parent)
    if parallel and (state is not None or softmax or dry_run):
        raise ValueError(
            "parallel: takes neither --state nor --dry-run, which are of one process, nor --softmax"
        )
    place = join_ranks(parallel)
    if parallel:
        seed = place.agreed(secrets.randbelow(2**32) if seed is None else seed)

    import torch

    from linfusion.bands.budget import parse_bytes
    from linfusion.linearize import linearize
    from linfusion.pipelines import HighResPipeline
    from linfusion.pipelines.arguments import draw_arguments
    from linfusion.pipelines.highres.hosts import image_to_image, is_transformer

    if memory_budget is not None:
        parse_bytes(memory_budget)
    with working(f"loading {model}"):
        pipe = load.load_pipeline(
            model,
            dtype=dtype,
            variant=variant,
            revision=revision,
            token=token,
            device=device or place.device,
        )
        image_to_image(pipe)  # refuses what cannot be taken further, whatever its attention
        for text in [prompt, *([negative_prompt] if negative_prompt else [])]:
            check_length(pipe, text)
        call |= draw_arguments(pipe, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
        check.check_call(pipe, more, ("prompt", "generator", "output_type", "return_dict"))
        call |= more
        clear: Any = True
        if is_transformer(pipe):
            clear = False if softmax else _windows(pipe, model, method, weights)
        elif not softmax:
            linearize(pipe, method, weights=load.find_weights(pipe, model, weights))
        load.optimize(
            pipe,
            lora=loras,
            cpu_offload=None,
            device=device,
            attention_backend=None,
            vae_tiling=False,
            vae_slicing=False,
            compile_blocks=False,
        )
        if parallel and is_transformer(pipe):
            raise ValueError(
                f"parallel: the stages of {type(pipe.transformer).__name__} have other attention"
                " than the first, so it cannot stay shared; accepted are pipelines with a UNet"
            )
        place.share(pipe)
        highres = HighResPipeline(pipe, memory_budget=memory_budget, scratch=scratch, clear=clear)
        if dry_run:
            with check.blaming(more):
                plan = highres.plan(prompt, **call)
        else:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            if not place.first:  # it computes its rows, also of the VAE; the first one writes
                call |= {"output": None, "output_type": "pil"}
            begun = time.perf_counter()
            with keeping(lambda: kept_in(state)), check.blaming(more):
                made = highres(prompt, generator=generator, state=state, resume=resume, **call)
            seconds = round(time.perf_counter() - begun, 3)
            if not place.first:
                return
            say(f"{pixels[1]}x{pixels[0]} in {seconds:.1f} s")
    if dry_run:
        _show(plan, as_json)
    elif as_json:
        from linfusion.files.picture_reader import read_parameters

        about = {"path": str(made.path), "seconds": seconds, "width": pixels[1]}
        emit_json({**about, "height": pixels[0], **read_parameters(output)})
    else:
        print(made.path)


def _windows(
    pipe: DiffusionPipeline, model: str, method: str | None, weights: str | None
) -> dict[str, Any]:
    """Options of the later stages of a transformer; the base picture has full attention.

    Raises:
        ValueError: another method than theirs, or no weights.
    """
    if method not in (None, "clear"):
        raise ValueError(
            f"method: got {method!r}; {type(pipe.transformer).__name__} takes 'clear' here"
        )
    try:
        return {"weights": load.find_weights(pipe, model, weights)}
    except ValueError as error:
        raise ValueError(
            f"weights: {model} has no student in its folder; for FLUX.1 CLEAR's authors published"
            " Huage001/CLEAR/clear_local_8.safetensors; --softmax goes without"
        ) from error


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        emit_json(plan.to_dict())
        return
    heading, *rows = plan.rows()
    emit_table(heading, rows, title="Plan")
    print(*plan.notes(), sep="\n")
