"""`linfusion video`: prompts to a video of any length, written while it is drawn."""

from __future__ import annotations

import math
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from linfusion.cli import check, load
from linfusion.cli.check import choose_size
from linfusion.cli.console import Json, emit_json, keeping, kept_in, say, working
from linfusion.cli.generate import check_length, check_prompts
from linfusion.cli.ranks import ParallelOption, join_ranks
from linfusion.files.whole_files import writable_folder

if TYPE_CHECKING:
    import numpy as np

    from linfusion.pipelines.lingen.pipeline import LinGenPipeline

DEFAULT_MODEL = "zoo:emoji-video"


def video(
    prompts: Annotated[
        list[str], Argument(metavar="PROMPT...", help="What to draw; several take turns.")
    ],
    starts: Annotated[
        list[int] | None,
        Option("--start", help="First frame of a prompt after the first; repeat for each."),
    ] = None,
    output: Annotated[
        Path,
        Option("--output", "-o", help="A .mp4, .webp or .gif file, or a folder of PNG frames."),
    ] = Path("video.mp4"),
    seconds: Annotated[float, Option(help="Length of the whole video.")] = 5.0,
    fps: Annotated[float, Option(help="Frames a second.")] = 12.0,
    size: Annotated[
        str | None,
        Option(metavar="WxH", help="In pixels, e.g. 64x64; the model's own if absent."),
    ] = None,
    height: Annotated[int | None, Option(help="In pixels, instead of --size.")] = None,
    width: Annotated[int | None, Option(help="In pixels, instead of --size.")] = None,
    image: Annotated[Path | None, Option(help="A picture: the first frame.")] = None,
    go_on: Annotated[
        Path | None,
        Option("--continue", metavar="VIDEO", help="A video that this one begins with."),
    ] = None,
    state: Annotated[
        Path | None, Option(metavar="DIR", help="Folder that keeps what is done.")
    ] = None,
    resume: Annotated[
        bool,
        Option("--resume", help="Go on with the video in --state; it is written from its start."),
    ] = False,
    model: load.ModelOption = DEFAULT_MODEL,
    negative_prompt: Annotated[str | None, Option(help="What not to draw.")] = None,
    steps: Annotated[
        int, Option("--num-inference-steps", "--steps", min=1, help="Denoising steps of a block.")
    ] = 50,
    guidance_scale: Annotated[
        float, Option(min=0, help="Strength of the prompt (classifier-free guidance).")
    ] = 5.0,
    seed: Annotated[
        int | None, Option(min=0, max=2**63 - 1, help="Of all noise; random if absent.")
    ] = None,
    codec: Annotated[
        str | None, Option(help="Of an .mp4, as FFmpeg names it; libx264 if absent.")
    ] = None,
    dtype: load.DtypeOption = "auto",
    variant: load.VariantOption = None,
    revision: load.RevisionOption = None,
    token: load.TokenOption = None,
    device: load.DeviceOption = None,
    parallel: ParallelOption = None,
    as_json: Json = False,
) -> None:
    """Draw a video in memory that does not grow with its length, writing it as it comes.

    Whenever it is stopped, the .mp4 plays as far as it was written.

    For example: linfusion video "a waving hand" --seconds 60 -o hand.mp4 --state run
    """
    check_prompts(prompts)
    if len(starts or []) != len(prompts) - 1:
        raise ValueError(
            f"start: got {len(starts or [])} for {len(prompts)} prompts; accepted is one for each"
            " prompt after the first"
        )
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: {guidance_scale}; accepted are finite numbers")
    for name, number in (("seconds", seconds), ("fps", fps)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: {number}; accepted are numbers above 0")
    num_frames = max(1, round(seconds * fps))
    height, width = choose_size(size, height, width)
    check.check_state(state, resume, "video")
    check.check_device(device)
    if image is not None and go_on is not None:
        raise ValueError("image: got one beside --continue; accepted is one of them")
    check.check_file("image", image)
    if go_on is not None and not go_on.exists():
        raise ValueError(f"continue: there is no video {str(go_on)!r}")
    check.check_model(model)
    writable_folder("output", output.parent)
    place = join_ranks(parallel)

    import torch

    from linfusion.cli.measure import human_bytes, peak_rss
    from linfusion.files.video_reader import read_video
    from linfusion.files.video_writer import check_video, open_video
    from linfusion.pipelines.state import seed_of

    check_video(output, fps, codec)
    clip = None if go_on is None else read_video(go_on)
    if clip is not None and len(clip) >= num_frames:
        raise ValueError(
            f"continue: {go_on} has {len(clip)} frames, {len(clip) / fps:g} s at this rate;"
            f" --seconds is the length of both and has to be longer, got {seconds:g}"
        )
    if resume and seed is None and seed_of(state) is not None:
        generator = None  # the seed is in the folder
    else:
        seed = place.agreed(secrets.randbelow(2**32) if seed is None else seed)
        generator = torch.Generator().manual_seed(seed)
    with working(f"loading {model}"):
        pipe = _load(model, dtype, variant, revision, token, device or place.device)
        place.share(pipe)
        for text in [*prompts, *([negative_prompt] if negative_prompt else [])]:
            check_length(pipe, text)
        call: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "height": height or pipe.default_size[0],
            "width": width or pipe.default_size[1],
            "num_frames": num_frames,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
        }
        given: dict[str, Any] = {
            "image": None if image is None else _picture(image),
            "video": None if clip is None else _fitting(pipe, clip),
        }
        start = time.perf_counter()
        prompt: Any = list(zip([0, *(starts or [])], prompts, strict=True))
        stream = pipe.stream(
            prompt if starts else prompts[0],
            generator=generator,
            state=state,
            resume=resume,
            replay=resume,
            **given,
            **call,
        )
        first = None
        if not place.first:  # it computes its rows; the first one writes
            for _ in stream:
                pass
            return
        with (
            open_video(output, fps, (call["width"], call["height"]), codec=codec) as out,
            keeping(lambda: f"{out.frames} frames are in {output}; {kept_in(state)}"),
        ):
            for frames in stream:
                out.write(frames)
                if first is None:
                    first = time.perf_counter() - start
        took = time.perf_counter() - start
        say(
            f"{out.frames} frames of {call['width']}x{call['height']} in {took:.1f} s, the first"
            f" after {first or took:.1f} s; at most {human_bytes(peak_rss())} of memory"
        )
    if as_json:
        about = {"path": str(output), "model": model, "prompts": prompts, "starts": starts or []}
        made = {"frames": out.frames, "fps": fps, "seed": seed, "seconds": round(took, 3)}
        memory = {"first_seconds": round(first or took, 3), "peak_rss": peak_rss()}
        emit_json({**about, **made, **memory, "call": call})
    else:
        print(output)


def _load(
    model: str,
    dtype: load.Dtype,
    variant: str | None,
    revision: str | None,
    token: str | None,
    device: str | None,
) -> LinGenPipeline:
    """A video pipeline.

    Raises:
        ValueError: a pipeline of another kind.
    """
    from linfusion.pipelines.kinds import refuse_all_but
    from linfusion.pipelines.lingen.pipeline import LinGenPipeline

    where = check.check_model(model)
    with load.reaching(model, revision):
        refuse_all_but("LinGenPipeline", model, where, revision=revision, token=token)
    pipe = load.load_pipeline(
        model,
        dtype=dtype,
        variant=variant,
        revision=revision,
        token=token,
        device=device,
    )
    assert isinstance(pipe, LinGenPipeline)
    pipe.set_progress_bar_config(desc="drawing", unit="step")
    return pipe


def _picture(path: Path) -> Any:
    from PIL import Image

    from linfusion.files.picture_reader import open_picture

    return Image.fromarray(open_picture(path))


def _fitting(pipe: LinGenPipeline, frames: np.ndarray) -> np.ndarray:
    """The end of a video, of as many frames as the model can go on from; what goes is said."""
    from linfusion.pipelines.lingen.latents import first_frame

    patch = pipe.transformer.config.patch_size[0]
    latents = (len(frames) - 1) // pipe.vae_scale_factor_temporal + 1
    count = first_frame(pipe.vae, latents // patch * patch)
    if 0 < count < len(frames):
        say(f"continue: the first {len(frames) - count} of {len(frames)} frames do not fit")
        frames = frames[-count:]
    return frames
