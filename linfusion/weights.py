"""What a method learned, beside the base model: load, save, push, and the authors' own files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.attention.linfusion import NAME, from_numbered, numbered_layer, to_numbered
from linfusion.entries import Difference, Entry, differences, holder, place
from linfusion.layers import MARKER, candidates, model_of, projections, record_of, shorten
from linfusion.offload import lifted

# The students their authors published, by what tells the teachers apart: the number of layers, the
# heads that occur, and the channels of the text. Names of repositories change; shapes do not.
PUBLISHED = {
    (16, (8,), 768): "Yuanshi/LinFusion-1-5",
    (16, (5, 10, 20), 1024): "Yuanshi/LinFusion-2-1",
    (70, (10, 20), 2048): "Yuanshi/LinFusion-XL",
}

LAYOUTS = ("numbered", "paths")


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
            model (`linfusion.lowrank`); None stores them in full.
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
            ValueError: the file is no readable safetensors file, or its tensors are not those its
                config.json describes; the message lists the names.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors: got False; only safetensors are read, never pickle")
        source = pretrained_model_name_or_path
        want_info = kwargs.pop("output_loading_info", False)
        # Not low memory: that path leaves missing tensors on the meta device before saying so.
        kwargs |= {
            "low_cpu_mem_usage": False,
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            "use_safetensors": True,
        }
        try:
            loaded: Any = super().from_pretrained(source, **kwargs)
        except OSError as error:
            raise unreadable(source, error) from error
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
        """Write config.json and safetensors; each file appears whole or not at all.

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
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
                super().save_pretrained(temporary, **kwargs)
                # config.json last: a folder with one has its tensors.
                for file in sorted(
                    Path(temporary).iterdir(), key=lambda f: f.name == "config.json"
                ):
                    os.replace(file, folder / file.name)
        except OSError as error:
            raise ValueError(f"save_directory: cannot write to {folder}: {error}") from error
        if push:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def construct_for(
        cls,
        pipeline: Any = None,
        unet: nn.Module | None = None,
        load_pretrained: bool = True,
        pretrained_model_name_or_path: Any = None,
        pipe_name_path: str | None = None,
    ) -> LinFusion:
        """Linearize a pipeline or UNet; the call of the original authors' library.

        Args:
            pipeline: a diffusers pipeline; its `unet` is taken.
            unet: a bare UNet instead.
            load_pretrained: False attaches a fresh learned part, for training.
            pretrained_model_name_or_path: folder or hub name; by default the published student
                that fits the shape of the UNet.
            pipe_name_path: accepted for the authors' signature and not needed, as the shape says
                which student fits.

        Returns:
            The learned part; its parameters are those that the UNet now uses.

        Raises:
            ValueError: neither or both of pipeline and unet, or no published student fits.
        """
        from linfusion.linearize import linearize

        if (pipeline is None) == (unet is None):
            raise ValueError("pipeline, unet: expected exactly one of the two")
        target = unet if pipeline is None else pipeline
        weights = pretrained_model_name_or_path
        if load_pretrained and weights is None:
            weights = published_for(target)
        linearize(target, NAME, weights=weights if load_pretrained else None)
        return learned(target)


def published_for(model_or_pipe: Any) -> str:
    """Hub name of the authors' student for a model of this shape.

    Raises:
        ValueError: they published none.
    """
    model = model_of(model_or_pipe)
    found = candidates(model, NAME)
    heads = tuple(sorted({attn.heads for attn in found.values()}))
    text = getattr(getattr(model, "config", None), "cross_attention_dim", None)
    shape = (len(found), heads, text)
    if shape not in PUBLISHED:
        known = "; ".join(f"{name}: {key}" for key, name in PUBLISHED.items())
        raise ValueError(
            f"model_or_pipe: no published student fits a model with (layers, heads, text channels)"
            f" = {shape}; there are {known}. Give a folder or hub name."
        )
    return PUBLISHED[shape]


def learned(model_or_pipe: Any, *, attention_weights: bool | None = None) -> LinFusion:
    """The learned part of a linearized model, sharing its parameters.

    Args:
        model_or_pipe: linearized before.
        attention_weights: whether to take to_q, to_k, to_v and to_out as well; by default where
            they are not the base model's own, and for methods that train little else ("clear").

    Raises:
        ValueError: the model is not linearized.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        raise ValueError(f"model_or_pipe: {type(model).__name__} is not linearized")
    if attention_weights is None:
        attention_weights = get_method(record.method).projections or any(
            layer.base_weights for layer in record.layers.values()
        )
    with torch.device("meta"):
        side = LinFusion(
            modules_list=modules_list(model, record.method, record.settings),
            layout="paths",
            attention_weights=attention_weights,
            method=record.method,
        )
    for path in record.layers:
        attn: Any = model.get_submodule(path)
        layer = side.get_submodule(path)
        layer.add_module(record.method, attn.get_submodule(record.method))
        if attention_weights:
            for name, linear in projections(attn).items():
                parent, _, leaf = name.rpartition(".")
                layer.get_submodule(parent).add_module(leaf, linear)
    return side.train(model.training)


def save(
    model_or_pipe: Any,
    folder: str | os.PathLike[str],
    *,
    layout: str = "paths",
    attention_weights: bool | None = None,
    **kwargs: Any,
) -> Path:
    """Write the learned part of a linearized model.

    Args:
        model_or_pipe: linearized before.
        folder: where to; each file appears whole or not at all.
        layout: "paths" (ours), or "numbered", which the original authors' library reads; that one
            always has the attention weights.
        attention_weights: see `learned`.
        **kwargs: as `ModelMixin.save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not linearized, or the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {LAYOUTS}")
    model = model_of(model_or_pipe)
    with lifted(model):
        if layout == "numbered":
            side = relaid(learned(model, attention_weights=True), "numbered")
        else:
            side = learned(model, attention_weights=attention_weights)
        side.save_pretrained(folder, **kwargs)
    return Path(folder)


def push(model_or_pipe: Any, repo_id: str, *, layout: str = "paths", **kwargs: Any) -> str:
    """Upload the learned part of a linearized model to the hub.

    Args:
        model_or_pipe: linearized before.
        repo_id: name on the hub.
        layout: see `save`.
        **kwargs: as `ModelMixin.push_to_hub` (private, token, commit_message, ...).
    """
    model = model_of(model_or_pipe)
    with lifted(model):
        side = learned(model, attention_weights=True if layout == "numbered" else None)
        return relaid(side, layout).push_to_hub(repo_id, **kwargs)


def from_saved_model(model: nn.Module) -> LinFusion:
    """The learned part that a linearized model wrote with its own `save_pretrained`.

    Args:
        model: loaded by diffusers, which drops tensors it does not know; its config says that it
            was linearized and from where it came.

    Raises:
        ValueError: they are not there, or not those the config says.
    """
    config: Any = model.config
    marker, source = config[MARKER], config.get("_name_or_path")
    method = marker["method"]
    files = sorted(Path(source).glob("*.safetensors")) if source else []
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if f".{method}." in name]  # noqa: SIM118
            state |= {name: tensors.get_tensor(name) for name in names}
    side = LinFusion(
        modules_list=modules_list(model, method, marker["layers"]),
        layout="paths",
        attention_weights=False,
        method=method,
    )
    expected = {k: tuple(t.shape) for k, t in side.state_dict().items()}
    wrong = [k for k, shape in expected.items() if k not in state or state[k].shape != shape]
    if wrong:
        raise ValueError(
            f"weights: the model was saved linearized, but {shorten(wrong)} cannot be read from"
            f" {source}; give the student's folder as weights="
        )
    side.load_state_dict({k: state[k] for k in expected})
    return side


def relaid(side: LinFusion, layout: str) -> LinFusion:
    """The same tensors under the names of another layout; nothing is copied.

    Args:
        side: the learned part of a model.
        layout: "paths" (ours) or "numbered" (the original authors').

    Raises:
        ValueError: the layout is unknown, or is the authors' and `side` has no attention weights,
            which theirs always has.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {LAYOUTS}")
    has_attention = side.config["attention_weights"]
    if layout == "numbered" and not has_attention:
        raise ValueError(
            "layout: 'numbered' always has to_q, to_k, to_v and to_out, which these weights lack"
        )
    key = get_method(side.config["method"]).setting_key
    with torch.device("meta"):
        # By name: diffusers takes arguments without one for defaults, and EMAModel drops those.
        other = LinFusion(
            modules_list=[entry.to_dict(key) for entry in side.entries],
            layout=layout,
            attention_weights=has_attention,
            method=side.config["method"],
            rank=side.config["rank"],
            rank_error=side.config["rank_error"],
        )
    state = {}
    for index, (path, tensors) in enumerate(_stored_by_layer(side).items()):
        for name, tensor in tensors.items():
            key = f"{index}.{to_numbered(name)}" if layout == "numbered" else f"{path}.{name}"
            state[key] = tensor
    other.load_state_dict(state, strict=True, assign=True)
    return other


def modules_list(model: nn.Module, method: str, settings: Mapping[str, Any]) -> list[Any]:
    """What a config says of the layers of a model that have these settings, by path."""
    key = get_method(method).setting_key
    return [
        Entry.of(path, model.get_submodule(path), setting).to_dict(key)
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


def unreadable(source: Any, error: OSError) -> ValueError:
    """That there is no student at a folder or hub name, and why."""
    reason = str(error).strip().split("\n")[0]
    return ValueError(
        f"weights: cannot read {source} as a folder or hub repository with config.json and"
        f" diffusion_pytorch_model.safetensors: {reason}"
    )
