"""Whether a student fits a model, and exchanging the weights of the two."""

from __future__ import annotations

import os
import reprlib
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linfusion.attention import get_method, names
from linfusion.attention.base import channels_of
from linfusion.attention.linfusion import NAME
from linfusion.entries import Difference
from linfusion.layers import TakenLayer, compute_dtype, projections, shorten

if TYPE_CHECKING:
    from linfusion.weights import LinFusion


def method_of(weights: Any, marker: Any) -> str:
    """The method of a student, or of what a model saved linearized came with; else "linfusion".

    Raises:
        ValueError: there is no such folder or repository.
    """
    if weights is None:
        return marker["method"] if marker else NAME
    from linfusion.weights import LinFusion, unreadable

    if isinstance(weights, LinFusion):
        return str(weights.config["method"])
    if not isinstance(weights, str | os.PathLike):
        return NAME  # student_of refuses it
    if os.fspath(weights).endswith(".safetensors"):
        return next(name for name in names() if get_method(name).read_file is not None)
    try:
        config: Any = LinFusion.load_config(weights)
    except OSError as error:
        raise unreadable(weights, error) from error
    return config.get("method", NAME)


def student_of(
    model: nn.Module, found: dict[str, Any], weights: Any, marker: Any, method: str
) -> LinFusion | None:
    """The student that `weights` names, or that a model saved linearized came with, or None."""
    if weights is None and not marker:
        return None
    from linfusion.weights import LinFusion, from_saved_model

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
        from linfusion.official import read

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
    from linfusion.weights import tensors_by_layer

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
            ("heads", entry.heads, attn.heads),
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


def attention_parameters(attn: Any) -> dict[str, nn.Parameter]:
    """to_q.weight, ..., to_out.0.bias, without what LoRA adds to them."""
    return {
        f"{name}.{leaf}": parameter
        for name, linear in projections(attn).items()
        for leaf, parameter in linear.named_parameters(recurse=False)
    }


def put_in(attn: Any, new: dict[str, Tensor | Difference], taken: TakenLayer) -> None:
    """Give a layer the projections of a student; those it had are laid aside in `taken`."""
    for name, parameter in attention_parameters(attn).items():
        if name in new:
            taken.base_weights[name] = parameter.data.cpu()
            value = new[name]
            if isinstance(value, Difference):
                parameter.data = value.onto(parameter.data)
            else:
                parameter.data = value.to(parameter.device, parameter.dtype, copy=True)


def swap(attn: Any, taken: TakenLayer) -> None:
    """Exchange the base weights laid aside with those in the layer."""
    parameters = attention_parameters(attn)
    for name, value in list(taken.base_weights.items()):
        parameter = parameters[name]
        taken.base_weights[name] = parameter.data.cpu()
        parameter.data = value.to(parameter.device, parameter.dtype)


def refuse_copied(path: str, attn: Any) -> None:
    """Refuse to exchange weights of which something else holds a copy or a changed form.

    Raises:
        ValueError: a LoRA is merged into them, or diffusers has fused them.
    """
    for name in projections(attn):
        if getattr(attn.get_submodule(name), "merged", False):
            raise ValueError(
                f"model_or_pipe: a LoRA is merged into {path}.{name}, whose weights are about to"
                " be swapped; call pipe.unfuse_lora() first"
            )
    # Other classes of attention keep to_q beside to_qkv and set processors that read the latter.
    if hasattr(attn, "unfuse_projections") and attn.fused_projections:
        raise ValueError(
            f"model_or_pipe: {path} computes with a copy of weights that are about to be swapped;"
            " call transformer.unfuse_qkv_projections() first"
        )
