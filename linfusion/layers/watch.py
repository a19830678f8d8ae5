"""Whether a linearized model still runs as it was made to, looked at before every forward."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from linfusion.attention import get_method
from linfusion.attention.linfusion.processor import STALE
from linfusion.layers.record import Record, record_of, set_processor

_ADAPTED = "_hf_peft_config_loaded"  # diffusers sets it on a model that has or had a LoRA


def displaced(record: Record) -> dict[str, str]:
    """Layers whose processor is no longer ours, and the class it is of."""
    ours = get_method(record.method).processor
    processors = {path: taken.layer.processor for path, taken in record.layers.items()}
    return {p: type(x).__name__ for p, x in processors.items() if not isinstance(x, ours)}


def put_back(model: nn.Module, record: Record) -> int:
    """Set our processors where something else has taken over; how many."""
    lost = displaced(record)
    processor_for = get_method(record.method).processors(model)
    for path in lost:
        attn = record.layers[path].layer
        set_processor(attn, processor_for(attn))
    record.warned.discard("displaced")
    return len(lost)


def forget_adapters(model: nn.Module) -> None:
    """So that `look` sees whether an adapter comes and goes from here on."""
    if not getattr(model, _ADAPTED, False):
        model.__dict__.pop(_ADAPTED, None)


def _refuse_stale(model: nn.Module, record: Record) -> None:
    """Refuse a fused model into whose weights a LoRA was merged: that counts no version up."""
    mechanism = get_method(record.method)
    if mechanism.fused_name is None or _ADAPTED not in model.__dict__:
        return
    for taken in record.layers.values():
        fused = taken.layer._modules.get(mechanism.fused_name)
        if fused is not None and fused.is_stale(taken.layer, look=True):
            raise ValueError(STALE)
    forget_adapters(model)


def look(model: nn.Module, args: Any) -> None:
    """Before a forward: say, once each, that we were displaced or that nothing was learned.

    Raises:
        ValueError: it is fused, and the weights that was made of have changed.
    """
    record = record_of(model)
    if record is None or torch.compiler.is_compiling():
        return
    _refuse_stale(model, record)
    if "displaced" not in record.warned:
        lost = displaced(record)
        if lost:
            record.warned.add("displaced")
            kinds = ", ".join(sorted(set(lost.values())))
            what = (
                "linfusion.linearize(pipe) on that pipeline makes its guidance linear"
                if kinds.startswith("PAG")
                else f"linfusion.linearize(model, {record.method!r}) puts them back with the"
                " weights they had,"
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
        if is_fresh(record):
            warnings.warn(
                f"{type(model).__name__} is linearized without weights: pictures will be wrong"
                " until those of a distilled student are loaded (restore, then"
                f" linearize(pipe, {mechanism.student})) or trained.",
                UserWarning,
                stacklevel=2,
            )


def is_fresh(record: Record) -> bool:
    """Whether nothing was loaded, nor trained since."""
    mechanism = get_method(record.method)
    children = [taken.layer.get_submodule(mechanism.name) for taken in record.layers.values()]
    return record.fresh and all(mechanism.is_fresh(child) for child in children)
