"""The projections of an attention layer, and exchanging their weights, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.layers.difference import Difference
from linfusion.layers.record import TakenLayer, set_processor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Within, what is pushed undoes what was done, the last first, if the block does not end well.

    Push before doing: an undoing is harmless where nothing was done.
    """
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def attention_parameters(attn: Any) -> dict[str, nn.Parameter]:
    """to_q.weight, ..., to_out.0.bias, without what LoRA adds to them."""
    return {
        f"{name}.{leaf}": parameter
        for name, linear in projections(attn).items()
        for leaf, parameter in linear.named_parameters(recurse=False)
    }


def put_in(new: Mapping[str, Tensor | Difference], taken: TakenLayer, undo: ExitStack) -> None:
    """Give a layer the projections of a student; those it had are laid aside in `taken`."""
    for name, parameter in attention_parameters(taken.layer).items():
        if name in new:
            value = new[name]
            if isinstance(value, Difference):
                changed = value.onto(parameter.data)
            else:
                changed = value.to(parameter.device, parameter.dtype, copy=True)
            taken.put_in[name] = checksum(changed)
            undo.callback(_put, parameter, taken, name, parameter.data.cpu(), None)
            taken.base_weights[name] = parameter.data.cpu()
            parameter.data = changed


def swap(taken: TakenLayer, undo: ExitStack) -> None:
    """Exchange the base weights laid aside with those in the layer."""
    parameters = attention_parameters(taken.layer)
    for name, value in list(taken.base_weights.items()):
        parameter = parameters[name]
        laid = parameter.data.cpu()
        new = value.to(parameter.device, parameter.dtype)
        undo.callback(_put, parameter, taken, name, laid, value)
        taken.base_weights[name] = laid
        parameter.data = new


def _put(
    parameter: nn.Parameter, taken: TakenLayer, name: str, here: Tensor, aside: Tensor | None
) -> None:
    parameter.data = here.to(parameter.device)
    if aside is None:
        taken.base_weights.pop(name, None)
    else:
        taken.base_weights[name] = aside


def give_processor(attn: Any, processor: Any, undo: ExitStack) -> None:
    """As `set_processor`, to be undone."""
    undo.callback(set_processor, attn, attn.processor)
    set_processor(attn, processor)


def checksum(tensor: Tensor) -> tuple[torch.dtype, int]:
    """Changes when a number of the tensor does."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return tensor.dtype, int(bits.sum(dtype=torch.int64))


def changed_since(taken: TakenLayer) -> list[str]:
    """Projections of a student that are no longer what was put in; one cast since is not told."""
    return [
        name
        for name, parameter in attention_parameters(taken.layer).items()
        if name in taken.put_in
        and parameter.dtype == taken.put_in[name][0]
        and checksum(parameter) != taken.put_in[name]
    ]


def refuse_copied(path: str, attn: Any) -> None:
    """Refuse to exchange weights that cannot be, or of which something else holds a copy.

    Raises:
        ValueError: a LoRA is merged into them, diffusers has fused them, or they are quantised.
    """
    refuse_quantized(path, attn)
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


def refuse_quantized(path: str, attn: Any) -> None:
    """Refuse weights that are read or written otherwise than as plain tensors.

    Quantised ones keep what they compute with elsewhere: writing to them does nothing.

    Raises:
        ValueError: a projection is not a plain Linear with plain parameters.
    """
    for name, linear in projections(attn).items():
        kind = type(linear)
        own = kind is nn.Linear or kind.__module__.startswith(("torch.nn.", "diffusers.models."))
        odd: list[Any] = [] if own else [kind]
        odd += [
            type(p) if type(p) is not nn.Parameter else p.dtype
            for p in linear.parameters(recurse=False)
            if type(p) is not nn.Parameter or not p.is_floating_point()
        ]
        if odd or "weight" not in linear._parameters:
            what: Any = odd[0] if odd else kind
            what = f"{what.__module__}.{what.__name__}" if isinstance(what, type) else str(what)
            raise ValueError(
                f"model_or_pipe: the weights of {path}.{name} are quantised or otherwise changed"
                f" ({what}), so that they cannot be exchanged; load the model unquantised,"
                " linfusion.linearize it, and quantise it after that, for good"
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
