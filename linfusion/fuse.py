"""Fewer, larger matrix products for inference."""

from __future__ import annotations

from typing import Any

from torch import nn

from linfusion.attention import get_method
from linfusion.layers.find import compute_dtype, model_of
from linfusion.layers.offload import lifted
from linfusion.layers.projections import all_or_nothing, projections, refuse_quantized
from linfusion.layers.record import record_of
from linfusion.layers.watch import forget_adapters


def fuse(model_or_pipe: Any) -> Any:
    """Make the linear layers of a model faster for inference; outputs are equal within rounding.

    One GEMM computes all that reads the same input, and the output projection is folded into the
    state. The layers keep their own weights beside the fused copies, for `unfuse`; where those are
    changed afterwards (a LoRA is merged into them, other weights are loaded), the next call of the
    model says so. Not where they are written past autograd (`parameter.data += ...`), which leaves
    no trace but the numbers, and those are not read back every call: `unfuse` before that.

    Args:
        model_or_pipe: linearized before.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not linearized, or fused already, or a layer has a LoRA, quantised
            weights or query/key norms. The model is as it was.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is not linearized; call linfusion.linearize"
            " before linfusion.fuse"
        )
    mechanism = get_method(record.method)
    if mechanism.fused is None or mechanism.fused_name is None:
        raise ValueError(f"model_or_pipe: method {record.method!r} has nothing to fuse")
    with lifted(model), all_or_nothing() as undo:
        fused = {}
        for path, taken in record.layers.items():
            attn = taken.layer
            if hasattr(attn, mechanism.fused_name):
                raise ValueError(f"model_or_pipe: {type(model).__name__} is fused already")
            if attn.norm_q is not None or attn.norm_k is not None:
                raise ValueError(f"model_or_pipe: {path} norms its queries and keys; cannot fuse")
            _refuse_lora(path, attn)
            child = getattr(attn, mechanism.name, None)
            fused[path] = mechanism.fused(attn, child, compute_dtype(model))
        for path, module in fused.items():
            attn = record.layers[path].layer
            undo.callback(attn._modules.pop, mechanism.fused_name, None)
            attn.add_module(mechanism.fused_name, module)
        forget_adapters(model)
    return model_or_pipe


def _refuse_lora(path: str, attn: Any) -> None:
    """Refuse projections that are more than a plain Linear.

    Raises:
        ValueError: a LoRA is on one, or it is quantised.
    """
    for name in projections(attn):
        module = attn.get_submodule(name)
        if type(module) is not nn.Linear:
            raise ValueError(
                f"model_or_pipe: {path}.{name} is a {type(module).__module__}."
                f"{type(module).__name__}, not a plain Linear (a LoRA or quantisation?);"
                " merge and unload a LoRA before linfusion.fuse, with pipe.fuse_lora() and"
                " pipe.unload_lora_weights()"
            )
    refuse_quantized(path, attn)


def unfuse(model_or_pipe: Any) -> Any:
    """Undo `fuse` exactly.

    Args:
        model_or_pipe: fused before.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not fused.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    name = (get_method(record.method).fused_name or "") if record else ""
    layers = [taken.layer for taken in record.layers.values()] if record else []
    if not any(name in layer._modules for layer in layers):
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is not fused, so nothing to unfuse"
        )
    with lifted(model), all_or_nothing() as undo:
        for layer in layers:
            if name in layer._modules:
                undo.callback(layer._modules.__setitem__, name, layer._modules[name])
                layer._modules.pop(name)
    return model_or_pipe
