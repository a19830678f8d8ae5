"""From a model to a file: what it learned, saved and pushed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from linfusion.attention import get_method
from linfusion.attention.linfusion.authors_names import to_numbered
from linfusion.layers.find import model_of, models_of
from linfusion.layers.offload import lifted
from linfusion.layers.projections import projections
from linfusion.layers.record import layer_at, record_of
from linfusion.students.student import LAYOUTS, LinFusion, _stored_by_layer, modules_list


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
        attn = layer_at(model, path)
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
        folder: where to; each file appears whole or not at all. A pipeline of two models has a
            folder of each name in it.
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
    models = models_of(model_or_pipe)
    if len(models) > 1:  # as `weights_by_model` reads it
        for name, model in models.items():
            save(
                model,
                Path(folder) / name,
                layout=layout,
                attention_weights=attention_weights,
                **kwargs,
            )
        return Path(folder)
    model = model_of(model_or_pipe)
    with lifted(model):
        if layout == "numbered":
            side = relaid(learned(model, attention_weights=True), "numbered")
        else:
            side = learned(model, attention_weights=attention_weights)
        if not side.state_dict():
            raise ValueError(
                f"model_or_pipe: {type(model).__name__} has learned nothing to save: its method"
                f" {side.config['method']!r} has no weights with these options"
            )
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
