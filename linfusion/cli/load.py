"""From the flags of `diffusers-cli run` to a pipeline that is ready to call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from linfusion import zoo
from linfusion.cli.check import check_device, check_model
from linfusion.cli.console import quiet, say

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

DEFAULT_MODEL = "zoo:emoji"

Dtype = Literal["auto", "float32", "fp32", "float16", "fp16", "bfloat16", "bf16"]

ModelOption = Annotated[
    str, Option("--model", "-m", help="Pipeline: a folder, a hub name, or zoo:<name>.")
]
DtypeOption = Annotated[
    Dtype, Option("--dtype", help="Of the weights. auto: float32 on a CPU, else 16 bits.")
]
VariantOption = Annotated[str | None, Option("--variant", help='File variant, e.g. "fp16".')]
RevisionOption = Annotated[
    str | None, Option("--revision", help="Branch, tag or commit on the hub.")
]
TokenOption = Annotated[str | None, Option("--token", help="Hub token, for gated models.")]
# Two names: diffusers-cli says the second.
DeviceOption = Annotated[
    str | None,
    Option(
        "--device",
        "--device-map",
        help="cuda, cuda:1, mps, xpu, cpu, or balanced over all GPUs; found if not given.",
    ),
]
WeightsOption = Annotated[
    str | None,
    Option(
        "--weights",
        "-w",
        help="What the method learned: a folder or hub name, or a student's name in the model's "
        "folder; found if not given.",
    ),
]
MethodOption = Annotated[
    str | None, Option("--method", help="The linear attention to use; that of the weights.")
]
LayersOption = Annotated[
    str | None,
    Option(
        "--layers",
        help='A level ("down_blocks.0"), a regular expression, or "auto": where it pays.',
    ),
]


def parse_dtype(name: Dtype, device: str) -> torch.dtype:
    """The dtype of that name; auto is float32 on a CPU, bfloat16 (else float16) elsewhere."""
    import torch

    if name == "auto":
        if device == "cpu":
            return torch.float32
        half = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        return torch.float16 if half else torch.bfloat16
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(
        name
    ) or getattr(torch, name)


def load_pipeline(
    model: str,
    *,
    dtype: Dtype = "auto",
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    device: str | None = None,
    cpu_offload: str | None = None,
) -> DiffusionPipeline:
    """Load `model` and put it where it runs; with `cpu_offload` it stays on the CPU."""
    chosen = check_device(device)
    if cpu_offload and chosen == "cpu":
        raise ValueError(f"cpu_offload: {cpu_offload!r} needs a GPU, and the device is the CPU")
    if cpu_offload and chosen == "balanced":
        raise ValueError(f"device: 'balanced' does not go with --cpu-offload {cpu_offload}")
    kwargs: dict[str, Any] = {"dtype": parse_dtype(dtype, chosen)}
    if chosen == "cpu" and dtype in ("fp16", "float16"):
        say("dtype: float16 is some thirty times slower on a CPU than bf16 or fp32")
    given = {"variant": variant, "revision": revision, "token": token}
    kwargs |= {name: value for name, value in given.items() if value is not None}
    # diffusers takes no number of a GPU there: such a pipeline is moved.
    if chosen == "balanced":
        kwargs["device_map"] = chosen
    name = check_model(model)
    from transformers.utils import logging as transformers_logging

    # Of the text encoder's tensors; that of the parts is enough.
    transformers_logging.disable_progress_bar()
    from linfusion.pipelines.load import load as load_pipeline

    with quiet():
        with reaching(model, revision):
            pipe = load_pipeline(name, **kwargs)
        if not cpu_offload and chosen != "balanced":
            pipe.to(chosen)
    return pipe


@contextlib.contextmanager
def reaching(model: str, revision: str | None) -> Iterator[None]:
    """Inside, a hub that is not there is named as what it is.

    Raises:
        ValueError: the hub may not be asked, and the model is not in its cache.
        OSError: it cannot be reached.
    """
    _check_offline(check_model(model), revision)
    try:
        yield
    except OSError as error:
        raise _unreachable(model, error) from error


def _check_offline(model: str, revision: str | None) -> None:
    """Refuse a hub name that is not in the cache where the hub may not be asked."""
    import huggingface_hub

    if Path(model).is_dir() or not huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    if isinstance(
        huggingface_hub.try_to_load_from_cache(model, "model_index.json", revision=revision), str
    ):
        return
    raise ValueError(
        f"model: {model} is not in the cache of the hub, and HF_HUB_OFFLINE is set; {_cached()}"
    )


def _cached() -> str:
    import huggingface_hub

    try:
        found = sorted(repo.repo_id for repo in huggingface_hub.scan_cache_dir().repos)
    except (OSError, ValueError, huggingface_hub.errors.CacheNotFound):
        found = []
    return f"cached are {', '.join(found)}" if found else "nothing is cached"


def _unreachable(model: str, error: OSError) -> OSError:
    """What a pipeline could not be loaded for: of a network that is not there, so much is said."""
    cause: BaseException | None = error
    while cause is not None:
        if "Connect" in type(cause).__name__ or "Offline" in type(cause).__name__:
            return OSError(f"model: cannot reach the hub for {model} ({cause}); {_cached()}")
        cause = cause.__cause__ or cause.__context__
    return error


def find_weights(pipe: DiffusionPipeline, model: str, weights: str | None) -> str:
    """What was given; else the first student of a local pipeline; else the published one.

    Raises:
        ValueError: there is none, as an undistilled model draws nothing of use.
    """
    if found := student_of(model, weights):
        return found
    from linfusion.authors_api import published_for

    try:
        return published_for(pipe)
    except ValueError as error:
        raise ValueError(f"weights: {model} has no student in its folder, and {error}") from error


def put_student(
    pipe: DiffusionPipeline,
    model: str,
    weights: str | None,
    *,
    method: str | None = None,
    **options: Any,
) -> str | None:
    """Make a pipeline linear: with what was given, what it was saved with, or what is found.

    Returns:
        The weights; None where the model was saved linear.

    Raises:
        ValueError: there are none, or they do not fit.
    """
    from linfusion.layers.find import model_of
    from linfusion.layers.record import MARKER
    from linfusion.linearize import linearize as make_linear
    from linfusion.lit.whole import is_whole, load_whole

    config: Any = model_of(pipe).config
    if weights is None and MARKER in config:
        make_linear(pipe, **options)
        return None
    weights = find_weights(pipe, model, weights)
    if is_whole(pipe, weights):
        given = [name for name, value in {"method": method, **options}.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: {weights} is a whole model, which says so itself")
        load_whole(pipe, weights)
    else:
        make_linear(pipe, method, weights=weights, **options)
    return weights


def student_of(model: str, weights: str | None) -> str | None:
    """What was given, or the student of that name in a local pipeline's folder, or its first.

    Raises:
        ValueError: it has students, but none of that name, which is no folder and no hub name.
    """
    folder = Path(zoo.resolve(model)).expanduser()
    students = zoo.students(folder) if folder.is_dir() else {}
    if weights is not None:
        name = students and weights not in students and "/" not in weights
        if name and not Path(weights).exists():
            raise ValueError(
                f"weights: {model} has no student {weights!r}, and there is no such folder; it has"
                f" {', '.join(students)}"
            )
        return str(students.get(weights, weights))
    return str(next(iter(students.values()))) if students else None


def size_in_pixels(
    pipe: DiffusionPipeline, height: int | None, width: int | None
) -> tuple[int, int]:
    """(height, width) that the pipeline will draw."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    latents = denoiser.config.get("sample_size")
    # FLUX does not say what its transformer was made for; its VAE was made for the same.
    own = pipe.vae.config.sample_size if latents is None else latents * pipe.vae_scale_factor
    return height or own, width or own


def optimize(
    pipe: DiffusionPipeline,
    *,
    lora: list[dict[str, Any]],
    cpu_offload: str | None,
    device: str | None,
    attention_backend: str | None,
    vae_tiling: bool,
    vae_slicing: bool,
    compile_blocks: bool,
) -> None:
    """What `diffusers-cli run` offers, in its order: LoRA, offload, VAE, backend, compile."""
    names = [spec.get("adapter_name") or f"lora_{i}" for i, spec in enumerate(lora)]
    for name, spec in zip(names, lora, strict=True):
        pipe.load_lora_weights(
            spec["lora_id"], adapter_name=name, weight_name=spec.get("weight_name")
        )
    if lora:
        scales = [float(spec.get("lora_scale", 1.0)) for spec in lora]
        pipe.set_adapters(names, adapter_weights=scales)
    if cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif cpu_offload == "group":
        import torch

        pipe.enable_group_offload(
            onload_device=torch.device(check_device(device)),
            offload_type="leaf_level",
            use_stream=torch.cuda.is_available(),
        )
    if vae_tiling:
        pipe.vae.enable_tiling()
    if vae_slicing:
        pipe.vae.enable_slicing()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if attention_backend:
        denoiser.set_attention_backend(attention_backend)
        softmax = [
            processor
            for processor in denoiser.attn_processors.values()
            if not type(processor).__module__.startswith("linfusion.")
        ]
        if all(getattr(processor, "_attention_backend", None) is None for processor in softmax):
            raise ValueError(
                f"attention_backend: {attention_backend!r} would be without effect, as no softmax "
                f"layer of {type(denoiser).__name__} reads it"
            )
    if compile_blocks:
        denoiser.compile_repeated_blocks(fullgraph=True)
