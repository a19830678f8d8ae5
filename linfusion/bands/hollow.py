"""Dry runs of code that makes real tensors: the large ones take no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

LARGE = 1 << 24  # entries: positions of FLUX at 32K are less, and are read


def hollow(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of that shape, in the memory of one."""
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))


class Hollow(TorchDispatchMode):
    """Within, whatever makes or reads a tensor of `LARGE` entries or more gives `hollow` ones.

    Shapes and dtypes are right, values are not; what is smaller is computed as ever.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat, tree = tree_flatten((args, kwargs))
        tensors = [a for a in flat if isinstance(a, Tensor)]
        made_on = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if made_on.type == "meta" or any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        reads = any(t.numel() >= LARGE for t in tensors)
        if not reads and _most(flat, tensors) < LARGE:
            return func(*args, **kwargs)
        if reads and func._schema.is_mutable:
            return kwargs.get("out", args[0])
        try:
            meta_args, meta_kwargs = _on_meta(flat, tree)
            like = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError):
            return func(*args, **kwargs)  # its result is a number
        made = [t for t in tree_flatten(like)[0] if isinstance(t, Tensor)]
        if not reads and all(t.numel() < LARGE for t in made):
            return func(*args, **kwargs)
        return tree_map(lambda t: hollow(t.shape, t.dtype, made_on) if _is(t) else t, like)


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _most(flat: list[Any], tensors: list[Tensor]) -> int:
    """A bound on the entries of what comes of these arguments."""
    numbers = [a for a in flat if isinstance(a, int) and not isinstance(a, bool) and a > 1]
    return math.prod(numbers) * math.prod(max(t.numel(), 1) for t in tensors)


def _on_meta(flat: list[Any], tree: Any) -> Any:
    meta = [
        torch.empty(a.shape, dtype=a.dtype, device="meta")
        if isinstance(a, Tensor)
        else torch.device("meta")
        if isinstance(a, torch.device)
        else None
        if isinstance(a, torch.Generator)
        else a
        for a in flat
    ]
    args, kwargs = tree_unflatten(meta, tree)
    if not any(isinstance(a, Tensor) for a in flat):
        kwargs["device"] = torch.device("meta")
    return args, kwargs
