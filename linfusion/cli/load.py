"""From the flags of `diffusers-cli run` to a pipeline that is ready to call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from linfusion import zoo

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
DeviceMapOption = Annotated[
    str | None,
    Option("--device-map", help="cuda, cuda:1, mps, cpu, balanced, or JSON; found if not given."),
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


def parse_json_object(flag: str, text: str | None) -> dict[str, Any]:
    """The JSON object a flag was given, {} for None."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag}: {text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag}: expected a JSON object, got {text!r}")
    return value


def parse_lora(texts: list[str] | None) -> list[dict[str, Any]]:
    """The objects `--lora` was given: lora_id and perhaps lora_scale, adapter_name, weight_name."""
    optional = ("lora_scale", "adapter_name", "weight_name")
    specs = [parse_json_object("--lora", text) for text in texts or []]
    for spec in specs:
        if "lora_id" not in spec or not set(spec) <= {"lora_id", *optional}:
            raise ValueError(
                f"--lora: expected lora_id and perhaps {', '.join(optional)}; "
                f"got {', '.join(spec) or 'nothing'}"
            )
    return specs


def check_device(name: str, device: str) -> None:
    """Refuse a device that this machine lacks; "balanced" and JSON are left to diffusers."""
    import torch

    kind = device.partition(":")[0]
    if (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"{name}: {device!r} is not here; this machine has {default_device()}")


def default_device() -> str:
    """The fastest device of this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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


def check_model(model: str) -> str:
    """The folder or hub name that `--model` stands for.

    Raises:
        ValueError: an unknown zoo name, or what looks like a folder and is none.
    """
    model = zoo.resolve(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model: {model!r} has no model_index.json, so it is no pipeline")
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"model: {model!r} is not a folder; accepted are a folder, a hub name like owner/name, "
            f"and {', '.join(zoo.PREFIX + name for name in zoo.names()) or 'zoo:<name>'}"
        )
    return model


def load_pipeline(
    model: str,
    *,
    dtype: Dtype = "auto",
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    device_map: str | None = None,
    cpu_offload: str | None = None,
) -> DiffusionPipeline:
    """Load `model` and put it where it runs; with `cpu_offload` it stays on the CPU."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the text encoder's tensors; that of the parts is enough
    from linfusion.pipelines.load import load as load_pipeline

    device = device_map or default_device()
    check_device("device_map", device)
    if cpu_offload and device == "cpu":
        raise ValueError(f"cpu_offload: {cpu_offload!r} needs a GPU, and the device is the CPU")
    kwargs: dict[str, Any] = {"dtype": parse_dtype(dtype, device)}
    given = {"variant": variant, "revision": revision, "token": token}
    kwargs |= {name: value for name, value in given.items() if value is not None}
    if device.startswith("{"):
        kwargs["device_map"] = parse_json_object("--device-map", device)
    elif not cpu_offload:
        kwargs["device_map"] = device
    return load_pipeline(check_model(model), **kwargs)


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
    device_map: str | None,
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
        pipe.enable_model_cpu_offload(device=device_map)
    elif cpu_offload == "group":
        import torch

        pipe.enable_group_offload(
            onload_device=torch.device(device_map or default_device()),
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
