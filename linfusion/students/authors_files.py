"""Students that their authors published as one bare file of tensors, beside no config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from linfusion.attention import get_method
from linfusion.layers.find import shorten
from linfusion.layers.projections import attention_parameters
from linfusion.students.entry import Entry
from linfusion.students.student import LinFusion


def read(source: str | os.PathLike[str], found: dict[str, Any], method: str) -> LinFusion:
    """A student from a file of its authors.

    Args:
        source: path of a `.safetensors` file, or "user/repository/file.safetensors" on the hub.
        found: layers of the model it is for, by path.
        method: name of the mechanism.

    Returns:
        The student; its tensors are those of the file, not copies.

    Raises:
        ValueError: there is no such file, the method has none, or its tensors are not those of a
            student of this model; the message lists the names.
    """
    mechanism = get_method(method)
    if mechanism.read_file is None:
        raise ValueError(
            f"weights: got the file {os.fspath(source)}; a student of method {method!r} is a folder"
            " or hub name with a config.json"
        )
    path = _local(os.fspath(source))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights: cannot read {path} as safetensors: {error}") from error
    file = mechanism.read_file(path.name, tensors)

    learned = {name for layer in file.tensors.values() for name in layer if name[:3] != "to_"}
    missing, unexpected, misshapen = [], list(file.unknown), []
    for layer in file.tensors:
        if layer not in found:
            unexpected += [f"{layer}.{name}" for name in file.tensors[layer]]
    for layer, attn in found.items():
        here = file.tensors.get(layer, {})
        ours = {name: tuple(p.shape) for name, p in attention_parameters(attn).items()}
        missing += [
            f"{layer}.{name}" for name in {**ours, **dict.fromkeys(learned)} if name not in here
        ]
        for name, tensor in here.items():
            if name not in learned and name not in ours:
                unexpected.append(f"{layer}.{name}")
            elif name in ours and tuple(tensor.shape) != ours[name]:
                misshapen.append(f"{layer}.{name} {tuple(tensor.shape)}, expected {ours[name]}")
    problems = [
        f"{kind}: {shorten(names)}."
        for kind, names in (
            ("Missing", missing),
            ("Unexpected", unexpected),
            ("Misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"weights: the tensors of {path} are not those of a student of this model with"
            f" {len(found)} layers. " + " ".join(problems)
        )

    with torch.device("meta"):
        side = LinFusion(
            modules_list=[
                Entry.of(layer, found[layer], setting).to_dict(mechanism.setting_key)
                for layer, setting in file.settings.items()
            ],
            layout="paths",
            attention_weights=True,
            method=method,
        )
    state = {f"{layer}.{n}": t for layer, here in file.tensors.items() for n, t in here.items()}
    side.load_state_dict(state, strict=True, assign=True)
    return side


def _local(source: str) -> Path:
    """Of a path or a name on the hub, the path."""
    if Path(source).is_file():
        return Path(source)
    user, _, rest = source.partition("/")
    repository, _, file = rest.partition("/")
    if not file or source.startswith((".", "/", "~")):
        raise ValueError(
            f"weights: there is no file {source}; expected one, or"
            ' "user/repository/file.safetensors" on the hub'
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{user}/{repository}", file))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"weights: cannot get {source}, here or from the hub: {reason}") from error
