"""Whether a linearized model still runs as it was made to, looked at before every forward."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from linfusion.attention import get_method
from linfusion.layers.record import Record, record_of, set_processor


def put_back(model: nn.Module, record: Record) -> int:
    """Set our processors where something else has taken over; how many."""
    mechanism = get_method(record.method)
    lost = displaced(model, record)
    processor_for = mechanism.processors(model)
    for path in lost:
        attn: Any = model.get_submodule(path)
        set_processor(attn, processor_for(attn))
    record.warned.discard("displaced")
    return len(lost)


def displaced(model: nn.Module, record: Record) -> dict[str, str]:
    """Layers whose processor is no longer ours, and the class it is of."""
    ours = get_method(record.method).processor
    processors = {path: model.get_submodule(path).processor for path in record.layers}
    return {p: type(x).__name__ for p, x in processors.items() if not isinstance(x, ours)}


def look(model: nn.Module, args: Any) -> None:
    """Before a forward: say, once each, that we were displaced or that nothing was learned."""
    record = record_of(model)
    if record is None or torch.compiler.is_compiling():
        return
    if "displaced" not in record.warned:
        lost = displaced(model, record)
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
        learned = [model.get_submodule(f"{path}.{mechanism.name}") for path in record.layers]
        if all(mechanism.is_fresh(child) for child in learned):
            warnings.warn(
                f"{type(model).__name__} is linearized without weights: pictures will be wrong"
                " until those of a distilled student are loaded (restore, then"
                f" linearize(pipe, {mechanism.student})) or trained.",
                UserWarning,
                stacklevel=2,
            )
