"""Put a method on a model, and take it off exactly."""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.layers import (
    MARKER,
    RECORD,
    Record,
    TakenLayer,
    candidates,
    compute_dtype,
    mark,
    model_of,
    projections,
    record_of,
    select,
    shorten,
    tokens_at,
)
from linfusion.offload import lifted

if TYPE_CHECKING:
    from pathlib import Path

    from linfusion.weights import LinFusion

_PAG = "_linfusion_pag_processors"  # on a pipeline: the pair it had


def linearize(
    model_or_pipe: Any,
    method: str = "linfusion",
    *,
    weights: str | Path | LinFusion | None = None,
    layers: str | Iterable[str] | None = None,
    size: int | tuple[int, int] | None = None,
    projection_mid_dim: int | None = None,
) -> Any:
    """Make the self-attention of a model linear in the number of pixels, in place.

    Called again after something else has replaced the processors (attention slicing,
    `fuse_qkv_projections`, xformers), it puts them back and keeps the weights. A model that was
    saved linearized with `save_pretrained` and loaded again gets its weights from where it was
    loaded.

    Args:
        model_or_pipe: a pipeline (its `unet` or `transformer` is taken; pass `pipe.controlnet` to
            take that), or a model whose self-attention is diffusers' `Attention`.
        method: name of the mechanism.
        weights: a distilled student: a folder or hub name in our form or the authors', or a
            `LinFusion`. Where it holds attention projections they replace the model's own until
            `restore`. None attaches a fresh learned part, which is for training.
        layers: None takes every layer the weights are for, or every one there is; else a level
            ("down_blocks.0", "mid_block"), a regular expression over layer paths, several of
            those, or "auto": those that cost less than softmax at `size`.
        size: for "auto", height and width of the picture in pixels, or one number for both. A
            bare model counts 8 pixels to a latent.
        projection_mid_dim: hidden channels of a fresh learned part; None means as many as the
            layer has, -1 none.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is linearized already; nothing to take; weights that do not fit or are for
            another method; a selector that selects nothing. The model is as it was.
    """
    mechanism = get_method(method)
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is not None:
        if weights is None and layers is None and method == record.method:
            repaired = _put_back(model, record) + _take_pag(model_or_pipe, mechanism)
            if repaired:
                return model_or_pipe
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is linearized already ({record.method},"
            f" {len(record.layers)} layers); call linfusion.restore first"
        )
    found: dict[str, Any] = dict(candidates(model, method))
    if layers == "auto":
        latent = _latent_size(model_or_pipe, size)
    elif size is not None:
        raise ValueError(f'size: got {size!r}, which only layers="auto" takes')
    marker = getattr(model, "config", {}).get(MARKER)
    side = _student(model, weights, marker)
    if side is not None and side.config["method"] != method:
        raise ValueError(
            f"method: got {method!r}, but the weights are a student of method"
            f" {side.config['method']!r}; give the two the same one"
        )
    if side is None:
        learned: dict[str, dict[str, Tensor]] = {path: {} for path in found}
        mids = dict.fromkeys(found, projection_mid_dim)
    else:
        if projection_mid_dim is not None:
            raise ValueError(
                f"projection_mid_dim: got {projection_mid_dim}, but the weights say what it is"
            )
        learned = _fit(model, found, side, partial=layers is not None)
        mids = {entry.path: entry.mid for entry in side.entries}
    paths = [path for path in found if path in learned]
    if layers == "auto":
        paths = [
            path
            for path in paths
            if tokens_at(model, path, latent) > mechanism.break_even_tokens(found[path], mids[path])
        ]
        if not paths:
            raise ValueError(
                f'layers: "auto" found no layer where linear attention costs less at {size} pixels'
            )
    elif layers is not None:
        paths = select(paths, layers)

    dtype = compute_dtype(model)
    children = {}
    for path in paths:
        child = mechanism.child(found[path], mids[path])
        own = {
            name.removeprefix(f"{mechanism.name}."): tensor
            for name, tensor in learned[path].items()
            if name.startswith(f"{mechanism.name}.")
        }
        if own:
            child.load_state_dict(own)
        children[path] = child.to(dtype).train(found[path].training)

    record = Record(mechanism.name, {}, fresh=side is None)
    with lifted(model):
        processor = mechanism.processor()
        for path in paths:
            attn = found[path]
            taken = TakenLayer(attn.processor)
            for name, parameter in _attention_parameters(attn).items():
                if name in learned[path]:
                    taken.base_weights[name] = parameter.data.cpu()
                    parameter.data = learned[path][name].to(
                        parameter.device, parameter.dtype, copy=True
                    )
            device = projections(attn)["to_q"].weight.device
            attn.add_module(mechanism.name, children[path].to(device))
            attn.set_processor(processor)
            record.layers[path] = taken
    setattr(model, RECORD, record)
    model.register_forward_pre_hook(_look)
    mark(
        model,
        {
            "method": mechanism.name,
            "layers": {path: mids[path] for path in paths},
            "attention_weights": any(t.base_weights for t in record.layers.values()),
        },
    )
    _take_pag(model_or_pipe, mechanism)
    return model_or_pipe


def restore(model_or_pipe: Any) -> Any:
    """Undo `linearize`: processors, weights and outputs are those from before, to the bit.

    Args:
        model_or_pipe: what was linearized, or the model in it.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not linearized, or a LoRA is merged into weights that would be swapped.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is not linearized, so nothing to restore"
        )
    for path, taken in record.layers.items():
        if taken.base_weights:
            _refuse_merged(path, model.get_submodule(path))
    mechanism = get_method(record.method)
    with lifted(model):
        for path, taken in record.layers.items():
            attn: Any = model.get_submodule(path)
            for name in (mechanism.name, mechanism.fused_name):
                attn._modules.pop(name, None)
            _swap(attn, taken)
            attn.set_processor(taken.processor)
    # What fuse_qkv_projections laid aside would bring our processors back.
    stash = getattr(model, "original_attn_processors", None)
    for path, taken in record.layers.items():
        if stash and isinstance(stash.get(f"{path}.processor"), mechanism.processor):
            stash[f"{path}.processor"] = taken.processor
    delattr(model, RECORD)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _look:
            del model._forward_pre_hooks[key]
    mark(model, None)
    if hasattr(model_or_pipe, _PAG):
        model_or_pipe._pag_attn_processors = getattr(model_or_pipe, _PAG)
        delattr(model_or_pipe, _PAG)
    return model_or_pipe


@contextmanager
def as_softmax(model_or_pipe: Any) -> Iterator[Any]:
    """For a while, the model as it was before `linearize`: the teacher of its own student.

    Args:
        model_or_pipe: linearized before.

    Raises:
        ValueError: it is not linearized.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        raise ValueError(f"model_or_pipe: {type(model).__name__} is not linearized")
    layers: list[tuple[Any, TakenLayer]] = [
        (model.get_submodule(path), taken) for path, taken in record.layers.items()
    ]
    ours = [attn.processor for attn, _ in layers]
    swaps = any(taken.base_weights for _, taken in layers)
    with lifted(model) if swaps else nullcontext():
        for attn, taken in layers:
            _swap(attn, taken)
            attn.set_processor(taken.processor)
    delattr(model, RECORD)  # so that nothing says our processors are missing
    try:
        yield model_or_pipe
    finally:
        setattr(model, RECORD, record)
        with lifted(model) if swaps else nullcontext():
            for (attn, taken), processor in zip(layers, ours, strict=True):
                _swap(attn, taken)
                attn.set_processor(processor)


def _student(model: nn.Module, weights: Any, marker: Any) -> LinFusion | None:
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
    return LinFusion.from_pretrained(weights, dtype=compute_dtype(model))


def _fit(
    model: nn.Module, found: dict[str, Any], side: LinFusion, partial: bool
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a student by layer, once it is certain that they fit."""
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
            ("channels", entry.dim, attn.query_dim),
            ("heads", entry.heads, attn.heads),
        ):
            if theirs != ours:
                wrong.append(f"{path} has {theirs} {what}, the model {ours}")
        base = _attention_parameters(attn)
        theirs_too = {name for name in tensors[path] if name.startswith("to_")}
        if not theirs_too:
            continue
        _refuse_merged(path, attn)
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


def _attention_parameters(attn: Any) -> dict[str, nn.Parameter]:
    """to_q.weight, ..., to_out.0.bias, without what LoRA adds to them."""
    return {
        f"{name}.{leaf}": parameter
        for name, linear in projections(attn).items()
        for leaf, parameter in linear.named_parameters(recurse=False)
    }


def _swap(attn: Any, taken: TakenLayer) -> None:
    """Exchange the base weights laid aside with those in the layer."""
    parameters = _attention_parameters(attn)
    for name, value in list(taken.base_weights.items()):
        parameter = parameters[name]
        taken.base_weights[name] = parameter.data.cpu()
        parameter.data = value.to(parameter.device, parameter.dtype)


def _refuse_merged(path: str, attn: Any) -> None:
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        if getattr(attn.get_submodule(name), "merged", False):
            raise ValueError(
                f"model_or_pipe: a LoRA is merged into {path}.{name}, whose weights are about to"
                " be swapped; call pipe.unfuse_lora() first"
            )


def _put_back(model: nn.Module, record: Record) -> int:
    """Set our processors where something else has taken over; how many."""
    mechanism = get_method(record.method)
    lost = _displaced(model, record)
    processor = mechanism.processor()
    for path in lost:
        attn: Any = model.get_submodule(path)
        attn.set_processor(processor)
    record.warned.discard("displaced")
    return len(lost)


def _take_pag(model_or_pipe: Any, mechanism: Any) -> int:
    """Give a pipeline with perturbed-attention guidance the processors that are linear."""
    if not hasattr(model_or_pipe, "set_pag_applied_layers") or hasattr(model_or_pipe, _PAG):
        return 0
    setattr(model_or_pipe, _PAG, model_or_pipe._pag_attn_processors)
    model_or_pipe.set_pag_applied_layers(
        model_or_pipe.pag_applied_layers, mechanism.pag_processors()
    )
    return 1


def _displaced(model: nn.Module, record: Record) -> dict[str, str]:
    """Layers whose processor is no longer ours, and the class it is of."""
    ours = get_method(record.method).processor
    processors = {path: model.get_submodule(path).processor for path in record.layers}
    return {p: type(x).__name__ for p, x in processors.items() if not isinstance(x, ours)}


def _look(model: nn.Module, args: Any) -> None:
    """Before a forward: say, once each, that we were displaced or that nothing was learned."""
    record = record_of(model)
    if record is None or torch.compiler.is_compiling():
        return
    if "displaced" not in record.warned:
        lost = _displaced(model, record)
        if lost:
            record.warned.add("displaced")
            kinds = ", ".join(sorted(set(lost.values())))
            what = (
                "linfusion.linearize(pipe) on that pipeline makes its guidance linear"
                if kinds.startswith("PAG")
                else "linfusion.linearize(model) puts them back with the weights they had,"
                " linfusion.restore(model) makes the model softmax for good"
            )
            warnings.warn(
                f"{len(lost)} of {len(record.layers)} linear attention layers run {kinds} instead:"
                " a later call replaced their processors (enable_attention_slicing,"
                " fuse_qkv_projections, xformers and set_attn_processor do), and softmax with the"
                f" weights of a linear student gives wrong pictures. {what}.",
                UserWarning,
                stacklevel=2,
            )
    if record.fresh and "fresh" not in record.warned and not torch.is_grad_enabled():
        record.warned.add("fresh")
        mechanism = get_method(record.method)
        learned = [model.get_submodule(f"{path}.{mechanism.name}") for path in record.layers]
        if all(mechanism.is_fresh(child) for child in learned):
            warnings.warn(
                f"{type(model).__name__} is linearized without weights: pictures will be wrong"
                " until those of a distilled student are loaded (restore, then"
                ' linearize(pipe, weights="Yuanshi/LinFusion-1-5")) or trained.',
                UserWarning,
                stacklevel=2,
            )


def _latent_size(model_or_pipe: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(
            f'size: got {size!r}; layers="auto" needs height and width in pixels, or one number'
        )
    scale = getattr(model_or_pipe, "vae_scale_factor", 8)
    return -(-sides[0] // scale), -(-sides[1] // scale)
