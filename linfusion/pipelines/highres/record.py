"""What a run is: for the file it makes, and for the folder it can go on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linfusion._version import __version__
from linfusion.bands.hosts import unwrapped
from linfusion.layers.record import record_of
from linfusion.pipelines.highres.hosts import denoiser, is_transformer
from linfusion.pipelines.highres.stages import Job


def about_run(pipe: Any, job: Job, generator: torch.Generator) -> dict[str, Any]:
    """What goes into the file beside the picture."""
    steered = asdict(job.scales) if job.steers else {}
    return {
        "linfusion": __version__,
        "model": str(pipe.config.get("_name_or_path") or type(pipe).__name__),
        "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
        "seed": generator.initial_seed(),
        "strategy": job.strategy,
        "stages": [asdict(stage) for stage in job.stages],
        **steered,
        **({"shift": job.shift, "attention": _attention(pipe)} if is_transformer(pipe) else {}),
        **{name: digest_of(value) for name, value in job.call.items()},
    }


def _attention(pipe: Any) -> Any:
    """The method of later stages and what its layers are set to, where they agree."""
    record = record_of(denoiser(pipe))
    if record is None:
        return "softmax"
    settings = list(record.settings.values())
    same = all(setting == settings[0] for setting in settings)
    return {"method": record.method, **(settings[0] if same else {"layers": record.settings})}


def what_decides(
    pipe: Any, job: Job, generator: torch.Generator, about: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides the picture: not the budget, nor where the model's files lie."""
    state = hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:16]
    return {
        **{name: value for name, value in about.items() if name != "model"},
        "generator": f"{generator.device.type} {state}",
        "image": None if job.picture is None else digest_of(job.picture),
        "control_image": digest_of(job.control),
        "pipeline": type(pipe).__name__,
        **{f"model.{name}": digest for name, digest in fingerprint(pipe).items()},
    }


def fingerprint(pipe: Any) -> dict[str, str]:
    """A digest of each part of a pipeline: configuration, processors, samples of all weights."""
    found = {}
    for name, part in pipe.components.items():
        part = unwrapped(part)
        if part is None or isinstance(part, (str, bool, tuple)):
            continue
        digest = hashlib.sha256(type(part).__name__.encode())
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "items"):
            kept = {k: v for k, v in config.items() if not k.startswith("_")}
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        if isinstance(part, nn.Module):
            _digest_weights(part, digest)
            found[name] = digest.hexdigest()[:16]
        elif name == "scheduler":
            found[name] = digest.hexdigest()[:16]
    return found


def digest_of(value: Any) -> Any:
    """A JSON value as it is; anything else, such as a tensor or a picture, as a digest."""
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(json.dumps(value, allow_nan=False))
    if isinstance(value, (list, tuple)):
        return [digest_of(v) for v in value]
    if isinstance(value, dict):
        return {str(k): digest_of(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        array: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    else:
        try:
            array = np.ascontiguousarray(np.asarray(value))
        except (TypeError, ValueError):
            array = np.array(None)
    if array.dtype == object:
        return type(value).__qualname__
    digest = hashlib.sha256(f"{type(value).__name__}{array.shape}".encode())
    digest.update(array.data)
    return digest.hexdigest()[:16]


def _digest_weights(module: nn.Module, digest: Any) -> None:
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            tensor = _offloaded(module, name)
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    processors = getattr(module, "attn_processors", {})
    for name, processor in processors.items():
        scale = digest_of(getattr(processor, "scale", None))  # of an IP-Adapter
        digest.update(f"{name} {type(processor).__name__} {scale}".encode())
    for name, part in module.named_modules():
        if isinstance(scaling := getattr(part, "scaling", None), dict):  # of a LoRA
            digest.update(f"{name} {sorted(scaling.items())}".encode())
            digest.update(str(getattr(part, "active_adapters", None)).encode())


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps elsewhere."""
    path, _, own = name.rpartition(".")
    hook = module.get_submodule(path)._hf_hook
    hooks = getattr(hook, "hooks", [hook])
    return next(one.weights_map[own] for one in hooks if getattr(one, "weights_map", None))
