"""The format of what a method learned, as a model of diffusers beside the base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.attention.linfusion.authors_names import from_numbered, numbered_layer
from linfusion.attention.linfusion.feature_map import NAME
from linfusion.files import sealed_tensors, whole_files
from linfusion.layers.difference import Difference, differences
from linfusion.layers.find import shorten
from linfusion.layers.record import layer_at
from linfusion.students.entry import Entry, holder, place

LAYOUTS = ("numbered", "paths")
_OF_THE_HUB = (
    *("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
    "subfolder",
)


class LinFusion(ModelMixin, ConfigMixin):
    """The learned part of a linearized model, as a model of its own.

    `from_pretrained`, `save_pretrained` and `push_to_hub` are those of diffusers; only safetensors
    are read or written. Give it to `linfusion.linearize(model, weights=...)`.

    Args:
        modules_list: one item a layer, as in the authors' `config.json`.
        layout: how tensors are named: "numbered" as in the authors' files (`0.to_q_.0.weight`), or
            "paths" as in the state dict of a linearized model
            (`down_blocks.0...attn1.linfusion.map_q.first.weight`).
        attention_weights: whether to_q, to_k, to_v and to_out are part of it; the authors' files
            always have them.
        method: the mechanism, for `linfusion.linearize`.
        rank: where attention weights are stored as a difference of that rank to those of the base
            model (`linfusion.students.low_rank`); None stores them in full.
        rank_error: what that lost: |Δ - B A| / |Δ|, over all layers.
    """

    @register_to_config
    def __init__(
        self,
        modules_list: list[Any] | None = None,
        layout: str = "numbered",
        attention_weights: bool = True,
        method: str = NAME,
        rank: int | None = None,
        rank_error: float | None = None,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout: {layout!r} is not one of {LAYOUTS}")
        if not isinstance(modules_list, list) or not modules_list:
            raise ValueError(
                f"modules_list: expected a list of layers in config.json, got {modules_list!r}"
            )
        mechanism = get_method(method)
        if layout == "numbered" and (method != NAME or rank is not None):
            raise ValueError(
                f"layout: 'numbered' holds students of method {NAME!r} in full, not"
                f" {method!r}{'' if rank is None else f' of rank {rank}'}"
            )
        for index, entry in enumerate(self.entries):
            if layout == "numbered":
                layer = numbered_layer(entry.dim, entry.inner_dim, entry.setting, entry.bias)
                self.add_module(str(index), layer)
                continue
            layer = holder(entry, mechanism, attention_weights=attention_weights, rank=rank)
            place(self, entry.path, layer)

    @property
    def entries(self) -> list[Entry]:
        config: Any = self.config
        key = get_method(config.method).setting_key
        return [Entry.read(item, key) for item in config.modules_list]

    @property
    def layout(self) -> str:
        config: Any = self.config
        return config.layout

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a folder or a hub repository, ours or the authors'.

        Args:
            pretrained_model_name_or_path: folder, or name on the hub.
            **kwargs: as diffusers' `ModelMixin.from_pretrained` (revision, subfolder, dtype, ...).

        Raises:
            ValueError: the file is no readable safetensors file, is not as it was written (where it
                holds a checksum, as those that we write do), or its tensors are not those its
                config.json describes; the message lists the names.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors: got False; only safetensors are read, never pickle")
        source = pretrained_model_name_or_path
        want_info = kwargs.pop("output_loading_info", False)
        read_config(source, **{k: v for k, v in kwargs.items() if k in _OF_THE_HUB})
        kwargs |= {
            "low_cpu_mem_usage": True,
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            "use_safetensors": True,
        }
        try:
            sealed_tensors.check_folder(Path(source, kwargs.get("subfolder") or ""))
            # Only what is in the file gets memory: a config may claim any size.
            with torch.device("meta"):
                loaded: Any = super().from_pretrained(source, **kwargs)
        except OSError as error:
            raise unreadable(source, error) from error
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"weights: {source} holds no student ({type(error).__name__}: {error})"
            ) from error
        model, info = loaded
        problems = [
            f"{kind}: {shorten(sorted(names))}."
            for kind, names in (
                ("Missing", info["missing_keys"]),
                ("Unexpected", info["unexpected_keys"]),
                ("Misshapen", [f"{n} {tuple(a)}, expected {tuple(b)}"
                               for n, a, b in info["mismatched_keys"]]),
            )
            if names
        ]  # fmt: skip
        if problems:
            raise ValueError(
                f"weights: the tensors of {source} are not those of its config.json. "
                + " ".join(problems)
            )
        return (model, info) if want_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json and safetensors with checksums; each file appears whole or not at all.

        Args:
            save_directory: folder, made if missing.
            **kwargs: as diffusers' `ModelMixin.save_pretrained` (variant, max_shard_size, ...).

        Raises:
            ValueError: the folder cannot be written, or pickle is asked for.
        """
        if kwargs.pop("safe_serialization", True) is False:
            raise ValueError("safe_serialization: got False; only safetensors are written")
        push, folder = kwargs.pop("push_to_hub", False), Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_files.filling(folder) as temporary:
                super().save_pretrained(temporary, **kwargs)
                for file in Path(temporary).glob("*.safetensors"):
                    sealed_tensors.seal(file)
        except OSError as error:
            raise ValueError(f"save_directory: cannot write to {folder}: {error}") from error
        if push:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)


def modules_list(model: nn.Module, method: str, settings: Mapping[str, Any]) -> list[Any]:
    """What a config says of the layers of a model that have these settings, by path."""
    key = get_method(method).setting_key
    return [
        Entry.of(path, layer_at(model, path), setting).to_dict(key)
        for path, setting in settings.items()
    ]


def tensors_by_layer(side: LinFusion) -> dict[str, dict[str, Tensor | Difference]]:
    """Tensors of every layer under the names they have on an attention layer of ours."""
    return {path: differences(tensors) for path, tensors in _stored_by_layer(side).items()}


def _stored_by_layer(side: LinFusion) -> dict[str, dict[str, Tensor]]:
    state = side.state_dict()
    layers = {}
    for index, entry in enumerate(side.entries):
        prefix = f"{index}." if side.layout == "numbered" else f"{entry.path}."
        own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        layers[entry.path] = (
            {from_numbered(k): t for k, t in own.items()} if side.layout == "numbered" else own
        )
    return layers


def read_config(source: Any, **kwargs: Any) -> Mapping[str, Any]:
    """The config.json of a student in a folder or on the hub.

    Raises:
        ValueError: there is none, or it holds no JSON object.
    """
    try:
        config: Any = LinFusion.load_config(source, **kwargs)
    except OSError as error:
        raise unreadable(source, error) from error
    except TypeError:  # null, to diffusers
        config = None
    if not isinstance(config, Mapping):
        raise ValueError(f"weights: config.json of {source} is no JSON object, but {config!r:.80}")
    return config


def unreadable(source: Any, error: OSError) -> ValueError:
    """That there is no student at a folder or hub name, and why."""
    name = os.fspath(source)
    there = os.path.exists(name)
    if not there and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        return ValueError(f"weights: cannot read {source}: there is no such folder")
    if there and not os.path.isfile(os.path.join(name, "config.json")):
        return ValueError(f"weights: cannot read {source}: it has no readable config.json")
    if not there and HF_HUB_OFFLINE:
        return ValueError(
            f"weights: cannot read {source}: there is no such folder, and it is not in the cache of"
            " the hub, which HF_HUB_OFFLINE keeps us from asking"
        )
    reason = str(error).strip().split("\n")[0]
    return ValueError(
        f"weights: cannot read {source} as a folder or hub repository with config.json and"
        f" diffusion_pytorch_model.safetensors: {reason}"
    )
