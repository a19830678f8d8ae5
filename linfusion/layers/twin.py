"""A second model over the weights of one, whose layers may be other ones.

What a run changes about a transformer it changes on a twin: whoever else calls the transformer,
from another thread say, calls it as it is.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.attention.grids.local import SHARED
from linfusion.layers.projections import projections
from linfusion.layers.record import record_of


def can_have_a_twin(model: nn.Module) -> bool:
    """Whether all that is on a model would be on its twin as well.

    Hooks of diffusers (group offloading, casting, caches) hold the calls of the modules they were
    put on, what `torch.compile` made is of one model, and so is what ranks share.
    """
    return SHARED not in model.__dict__ and not any(
        hasattr(module, "_diffusers_hook") or module.__dict__.get("_compiled_call_impl") is not None
        for module in model.modules()
    )


def twin(model: nn.Module, layers: dict[str, Any]) -> nn.Module:
    """A copy of the modules of a model with its very parameters and buffers.

    Args:
        model: any; linearized, it has a linear twin.
        layers: of the model, by path; projections of these have parameters of their own over the
            same numbers, so that others may be put in on the twin alone.
    """
    shared: dict[int, Any] = {
        id(t): t for t in itertools.chain(model.parameters(), model.buffers())
    }
    for module in model.modules():
        # accelerate's, which hold the weights it has laid aside, and the model to run before.
        hook = module.__dict__.get("_hf_hook")
        shared[id(hook)] = hook
    record = record_of(model)
    for taken in record.layers.values() if record is not None else ():
        shared |= {id(t): t for t in taken.base_weights.values()}
    made = copy.deepcopy(model, shared)
    for path in layers:
        for linear in projections(made.get_submodule(path)).values():
            for name, parameter in linear._parameters.items():
                if type(parameter) is nn.Parameter:
                    linear._parameters[name] = _over(parameter)
    return made


def _over(parameter: nn.Parameter) -> nn.Parameter:
    same: Tensor = parameter.detach()
    with torch.no_grad():
        return nn.Parameter(same, requires_grad=parameter.requires_grad)
