"""The projections of an attention layer, and exchanging their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from linfusion.layers.difference import Difference
from linfusion.layers.record import TakenLayer


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


def projections(attn: Any) -> dict[str, nn.Linear]:
    """Those of to_q, to_k, to_v and to_out.0 that a layer has.

    They are what LoRA wraps, rather than its wrapper. A single block of FLUX has no to_out; hosts
    that project queries, keys and values in one have none of them.
    """
    found = {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        parent, _, leaf = name.partition(".")
        module = getattr(attn, parent, None)
        if leaf and module is not None:  # a list, but in some hosts a single layer
            module = module[0] if isinstance(module, nn.ModuleList) else None
        if module is not None:
            found[name] = getattr(module, "base_layer", module)
    return found
