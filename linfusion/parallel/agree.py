"""Ranks that compute one picture are called alike: checked, and for a missing seed, agreed upon."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linfusion.parallel.mesh import Mesh
from linfusion.pipelines.state import seed_of


def agree(mesh: Mesh, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call, the same on all ranks.

    A generator that is missing is made from a seed that the first rank draws.

    Raises:
        ValueError: ranks have different arguments, or arguments that do not fit the call; the
            message names them.
    """
    signature = inspect.signature(call)
    bound = signature.bind(*args, **kwargs).arguments
    given = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
    seed = int(torch.empty((), dtype=torch.int64).random_())
    prints = {name: fingerprint(value) for name, value in given.items() if name != "self"}
    # A video that goes on has its seed; asked before any rank may have begun one.
    kept = seed_of(given["state"]) if given.get("resume") and given.get("state") else None
    found = mesh.gather((prints, seed, kept))
    refuse_different([prints for prints, _, _ in found])
    missing = "generator" in signature.parameters and given.get("generator") is None
    if missing and found[0][2] is None:
        given["generator"] = torch.Generator("cpu").manual_seed(found[0][1])
    return given


def refuse_different(found: list[dict[str, str]]) -> None:
    """Raise if the ranks' named values are not the same."""
    for name in sorted({name for prints in found for name in prints}):
        values = [prints.get(name) for prints in found]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{name}: ranks 0 and {other} have different ones; all ranks compute one picture"
                " and have to be called with the same arguments and seed"
            )


def check_inputs(mesh: Mesh, inputs: Mapping[str, Any]) -> None:
    """Refuse a model's call whose tensors are not the same on all ranks.

    Raises:
        ValueError: they are not; the message names one.
    """
    refuse_different(mesh.gather({name: fingerprint(value) for name, value in inputs.items()}))


def fingerprint(value: Any) -> str:
    """The same text for what gives the same picture, another one for nearly all else."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return f"{tuple(value.shape)} {value.dtype}"
        flat = value.detach().contiguous().flatten()
        return f"{tuple(value.shape)} {value.dtype} {_digest(flat.cpu().view(torch.uint8).numpy())}"
    if isinstance(value, torch.Generator):
        return _digest(value.get_state().cpu().numpy())
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype} {_digest(np.ascontiguousarray(value))}"
    if isinstance(value, Mapping):
        return str({str(k): fingerprint(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return str([fingerprint(v) for v in value])
    if isinstance(value, str | int | float | bool | complex) or value is None:
        return repr(value)
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # a picture of PIL
        return f"{value.size} {_digest(value.tobytes())}"
    return type(value).__name__  # callbacks and the like


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
