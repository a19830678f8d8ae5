"""The projections of an attention layer, and exchanging their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linfusion.layers.difference import Difference
from linfusion.layers.record import TakenLayer

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


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


def projections(attn: Attention) -> dict[str, nn.Linear]:
    """to_q, to_k, to_v and, where there is one, to_out.0 of a layer.

    They are what LoRA wraps, rather than its wrapper.
    """
    names = ["to_q", "to_k", "to_v"]
    if getattr(attn, "to_out", None) is not None:  # a single block of FLUX has none
        names.append("to_out.0")
    modules: dict[str, Any] = {name: attn.get_submodule(name) for name in names}
    return {name: getattr(module, "base_layer", module) for name, module in modules.items()}
