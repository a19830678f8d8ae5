"""What can be said of the flags of a command before a model is loaded."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linfusion import zoo

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LONGEST = 2**18  # pixels of a side: eight times what anybody has drawn here


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


def check_device(device: str | None, *, balanced: bool = True) -> str:
    """The device that was given, or the fastest of this machine.

    Args:
        device: as `--device` takes it.
        balanced: whether it may also be spread over all GPUs.

    Raises:
        ValueError: no device, or one that this machine lacks.
    """
    import torch

    from linfusion.pipelines.load import default_device

    if device is None:
        return default_device()
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }
    if device == "balanced" and balanced:
        if not there["cuda"] and not there["xpu"]:
            raise ValueError("device: 'balanced' needs GPUs; this machine has cpu")
        return device
    found = re.fullmatch(r"(cpu|cuda|mps|xpu)(?::(\d+))?", device)
    if found is None:
        accepted = ["cuda", "cuda:1", "mps", "xpu", "cpu", *(["balanced"] if balanced else [])]
        raise ValueError(f"device: {device!r} is none; accepted are {', '.join(accepted)}")
    if int(found[2] or 0) >= there[found[1]]:
        have = ", ".join(
            name if count == 1 else f"{name}:0 to {name}:{count - 1}"
            for name, count in there.items()
            if count
        )
        raise ValueError(f"device: {device!r} is not here; this machine has {have}")
    return device


def check_method(method: str | None) -> None:
    """Refuse a method that there is not.

    Raises:
        ValueError: the message lists those there are.
    """
    from linfusion.attention import get_method

    if method is not None:
        get_method(method)


def check_weights(weights: str | None) -> None:
    """Refuse a path of weights that is not there.

    Raises:
        ValueError: it looks like a path and there is none.
    """
    if weights is not None and weights.startswith((".", "/", "~")):
        path = Path(weights).expanduser()
        if not path.exists():
            raise ValueError(f"weights: there is no folder or file {weights!r}")


def check_backend(backend: str | None) -> None:
    """Refuse an attention backend that diffusers does not know or cannot use here.

    Raises:
        ValueError: the message says why.
    """
    if backend is None:
        return
    from diffusers.models import attention_dispatch as dispatch

    known = sorted(name.value for name in dispatch.AttentionBackendName)
    if backend.lower() not in known:
        raise ValueError(f"attention_backend: {backend!r} is not one of {', '.join(known)}")
    try:
        dispatch._check_attention_backend_requirements(
            dispatch.AttentionBackendName(backend.lower())
        )
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"attention_backend: {backend!r} cannot be used here ({error})") from error


def check_call(pipe: DiffusionPipeline, given: dict[str, Any], ours: Collection[str]) -> None:
    """Refuse arguments of `--pipeline-kwargs` that the pipeline does not have, or that are ours.

    Raises:
        ValueError: the message names the argument.
    """
    has = inspect.signature(type(pipe).__call__).parameters
    for name in given:
        if name in ours:
            raise ValueError(f"--pipeline-kwargs: {name!r} is set by this command")
        if name not in has or has[name].kind is inspect.Parameter.VAR_KEYWORD:
            raise ValueError(f"--pipeline-kwargs: {type(pipe).__name__} takes no {name!r}")


@contextlib.contextmanager
def blaming(given: dict[str, Any]) -> Iterator[None]:
    """Inside, what a pipeline throws at arguments of `--pipeline-kwargs` is a wrong call."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        if not given:
            raise
        raise ValueError(
            f"--pipeline-kwargs: the pipeline fails with {', '.join(given)}"
            f" ({type(error).__name__}: {error})"
        ) from error


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


def check_file(name: str, path: Path | None) -> None:
    """Refuse a path that is none of a file.

    Raises:
        ValueError: it is not; `name` is the argument to blame.
    """
    if path is not None and not path.is_file():
        raise ValueError(f"{name}: there is no file {str(path)!r}")


def check_state(state: Path | None, resume: bool, what: str) -> None:
    """Refuse a folder that is to be gone on with and is not given, or holds a run and is not.

    Raises:
        ValueError: it is so; the message names the flags.
    """
    if resume and state is None:
        raise ValueError(f"resume: needs --state, the folder of the {what} to go on with")
    if state is not None and not resume and (state / "parameters.json").is_file():
        raise ValueError(
            f"state: {str(state)!r} holds a {what}; --resume goes on with it, or"
            " give another folder"
        )


def check_class(model: str, classes: Collection[str] | None) -> None:
    """Refuse classes for a local model that says it has none, or not these.

    Raises:
        ValueError: the message lists those there are.
    """
    folder = Path(zoo.resolve(model)).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        return
    labels = _json(index).get("id2label")
    if not isinstance(labels, dict):
        if classes:
            raise ValueError(f"class: {model} has none; give a prompt")
        return
    names = sorted({n.strip() for text in labels.values() for n in str(text).split(",")})
    if not classes:
        raise ValueError(
            f"class: {model} is a model of classes: {', '.join(names[:20])}; give --class"
        )
    for name in classes:
        if name not in names and name not in labels:
            raise ValueError(
                f"class_labels: there is no class {name!r}; {model} has {', '.join(names[:20])}"
            )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {file} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"model: {file} is no JSON object")
    return found


def parse_size(size: str) -> tuple[int, int]:
    """(height, width) in pixels from "512x768" (width x height) or "512".

    Raises:
        ValueError: not a size, or not a multiple of 8 pixels.
    """
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", size.lower())
    if not match:
        raise ValueError(f"size: {size!r} is not a size; accepted are 512x768 and 512")
    return check_pixels("height", int(match[2] or match[1])), check_pixels("width", int(match[1]))


def check_pixels(name: str, pixels: int, unit: int = 8) -> int:
    """Refuse a side that is no multiple of a latent's or token's `unit`, and offer the nearest; and
    one that is longer than any picture drawn here."""
    if pixels > LONGEST:
        raise ValueError(f"{name}: {pixels} px; accepted are multiples of {unit} up to {LONGEST}")
    if pixels < unit or pixels % unit:
        low = pixels // unit * unit
        near = f"{low} and {low + unit}" if low else f"{unit}"
        raise ValueError(
            f"{name}: {pixels} px; accepted are multiples of {unit}, from {unit} up; nearest:"
            f" {near}"
        )
    return pixels


def choose_size(
    size: str | None, height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """(height, width) from --size or from --height and --width; None leaves it to the model."""
    if size is None:
        return (
            None if height is None else check_pixels("height", height),
            None if width is None else check_pixels("width", width),
        )
    if height is not None or width is not None:
        raise ValueError("size: give either --size or --height and --width")
    return parse_size(size)
