"""Which student this is, and whether it fits a model: from a file to the tensors of layers."""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linfusion.attention import get_method, names
from linfusion.attention.linfusion.feature_map import NAME
from linfusion.attention.method import channels_of, heads_of
from linfusion.layers.difference import Difference
from linfusion.layers.find import compute_dtype, serving, shorten
from linfusion.layers.projections import attention_parameters, refuse_copied
from linfusion.layers.record import marker_of, source_of

if TYPE_CHECKING:
    from linfusion.students.student import LinFusion


def method_of(weights: Any, model: nn.Module) -> str:
    """The method of a student, or of what a model saved linearized came with; else "linfusion".

    Raises:
        ValueError: there is no such folder or repository.
    """
    if weights is None:
        marker = marker_of(model)
        return marker["method"] if marker else NAME
    from linfusion.students.student import LinFusion, read_config

    if isinstance(weights, LinFusion):
        return str(weights.config["method"])
    if not isinstance(weights, str | os.PathLike):
        return NAME  # student_of refuses it
    if os.fspath(weights).endswith(".safetensors"):
        published = [name for name in names() if get_method(name).read_file is not None]
        marker = marker_of(model)
        if marker:
            return str(marker["method"])
        served = serving(model)
        fitting = [] if NAME in served else [name for name in served if name in published]
        return fitting[0] if fitting else NAME  # `read` says what there is instead
    return str(read_config(weights).get("method", NAME))


def weights_by_model(weights: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    """A student for each of the models of a pipeline, by their names in it.

    Args:
        weights: as `linearize` takes it; for several models a mapping by name, or a folder with a
            folder of each name, as `save` writes it.
        models: by name.

    Raises:
        ValueError: it is one student and there are several models, or another name.
    """
    alone = "" in models or (len(models) == 1 and not isinstance(weights, Mapping))
    if weights is None or alone:
        return dict.fromkeys(models, weights)
    found = weights
    if isinstance(weights, str | os.PathLike):
        found = {n: os.path.join(weights, n) for n in models}
        found = {n: folder for n, folder in found.items() if os.path.isdir(folder)}
    if not isinstance(found, Mapping) or set(found) != set(models):
        raise ValueError(
            f"weights: got {reprlib.repr(weights)} for the models {sorted(models)}; expected a"
            " student of each, in a mapping or in folders of those names"
        )
    return dict(found)


def student_of(
    model: nn.Module, found: dict[str, Any], weights: Any, method: str
) -> LinFusion | None:
    """The student that `weights` names, or that a model saved linearized came with, or None."""
    marker = marker_of(model)
    if weights is None and not (marker and source_of(model)):
        return None  # or made from the config of a linear one, without its weights
    from linfusion.students.saved_models import from_saved_model
    from linfusion.students.student import LinFusion

    if weights is None:
        if marker["attention_weights"]:
            warnings.warn(
                f"{type(model).__name__} was saved with the projections of its linear student; its"
                " own are not in that file, so linfusion.restore will not give a softmax model",
                UserWarning,
                stacklevel=3,
            )
        return from_saved_model(model)
    if isinstance(weights, LinFusion):
        return weights
    if not isinstance(weights, str | os.PathLike):
        raise ValueError(
            f"weights: got {reprlib.repr(weights)} of type {type(weights).__name__}; expected a"
            " folder or hub name (str or Path), a LinFusion, or None"
        )
    if os.fspath(weights).endswith(".safetensors"):
        from linfusion.students.authors_files import read

        if marker and os.path.isfile(weights):
            return from_saved_model(model, os.fspath(weights))
        return read(weights, found, method)
    return LinFusion.from_pretrained(weights, dtype=compute_dtype(model))


def fit(
    model: nn.Module, found: dict[str, Any], side: LinFusion, partial: bool
) -> dict[str, dict[str, Tensor | Difference]]:
    """The tensors of a student by layer, once it is certain that they fit.

    Args:
        model: the model.
        found: its layers that the method may take, by path.
        side: the student.
        partial: whether the caller chose layers, so that the student may hold fewer.

    Raises:
        ValueError: they do not; the message lists the names.
    """
    from linfusion.students.student import tensors_by_layer

    entries = {entry.path: entry for entry in side.entries}
    if not hasattr(model, "up_blocks"):  # a ControlNet is the first half of a UNet
        entries = {p: e for p, e in entries.items() if not p.startswith("up_blocks.")}
    missing = [path for path in found if path not in entries]
    unexpected = [path for path in entries if path not in found]
    # Our own files may hold some layers by choice; the authors' always hold all.
    if unexpected or (missing and not partial and side.layout == "numbered"):
        raise ValueError(
            f"weights: expected {len(found)} layers for this {type(model).__name__}, the"
            f" checkpoint has {len(entries)}. Missing: {shorten(missing) or 'none'}. Unexpected:"
            f" {shorten(unexpected) or 'none'}."
        )
    tensors = tensors_by_layer(side)
    wrong = []
    for path, entry in entries.items():
        attn = found[path]
        for what, theirs, ours in (
            ("channels", entry.dim, channels_of(attn)),
            ("heads", entry.heads, heads_of(attn)),
        ):
            if theirs != ours:
                wrong.append(f"{path} has {theirs} {what}, the model {ours}")
        base = attention_parameters(attn)
        theirs_too = {name for name in tensors[path] if name.startswith("to_")}
        if not theirs_too:
            continue
        refuse_copied(path, attn)
        if theirs_too != set(base):
            wrong.append(f"{path} has {sorted(theirs_too)}, the model {sorted(base)}")
        for name in theirs_too & set(base):
            shape = tuple(tensors[path][name].shape)
            if shape != tuple(base[name].shape) or not base[name].is_floating_point():
                wrong.append(
                    f"{path}.{name} is {shape}, the model's is {tuple(base[name].shape)}"
                    f" {base[name].dtype}"
                )
    if wrong:
        raise ValueError(
            f"weights: the checkpoint is for another model than this {type(model).__name__}: "
            + shorten(wrong)
        )
    return {path: tensors[path] for path in entries}
