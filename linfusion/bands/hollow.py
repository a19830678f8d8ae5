"""Tensors without memory: what a call would give, and dry runs of code that makes real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

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


# ---- shape and dtype of a call

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_KNOWN: dict[Any, Like] = {}
_MOST = 1 << 14  # calls that are remembered; more than any models in use at once make


class Like(NamedTuple):
    """What a tensor is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def like_of(
    func: Callable[..., Tensor],
    flat: Sequence[Any],
    tree: TreeSpec,
    meta: Callable[[Tensor], Tensor],
) -> Like:
    """What `func` of the arguments gives, found on the meta device once for each kind of call.

    A UNet makes the same few hundred calls in every forward; running each on meta tensors takes
    longer than launching it on a GPU.

    Args:
        func: a function of tensors.
        flat, tree: leaves and form of its (args, kwargs), as `tree_flatten` gives them.
        meta: a tensor -> its like on the meta device.
    """
    key = _key(func, flat, tree)
    if key is not None and key in _KNOWN:
        return _KNOWN[key]
    leaves = [meta(a) if isinstance(a, Tensor) else a for a in flat]
    args, kwargs = tree_unflatten(leaves, tree)
    made = func(*args, **kwargs)
    like = Like(tuple(made.shape), made.dtype)
    if key is not None:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = like
    return like


def _key(func: Any, flat: Sequence[Any], tree: TreeSpec) -> Any:
    """Equal for calls of one kind; None where what decides is more than numbers and shapes."""
    found: list[Any] = []
    if hasattr(func, "__code__"):  # made anew at every call, of the same code
        cells = [cell.cell_contents for cell in func.__closure__ or ()]
        held = [*cells, *(func.__defaults__ or ()), func.__kwdefaults__]
        found.append(func.__code__)
    elif isinstance(func, _BUILT_IN):
        held = []
        found.append(func)
    else:
        return None
    for value in (*held, *flat):
        plain = _plain(value)
        if plain is None:
            return None
        found.append(plain)
    return (*found, tree)


_BUILT_IN = (type(torch.relu), type(torch.Tensor.add))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        parts = [_plain(v) for v in value]
        return None if None in parts else (type(value), *parts)
    # 1 and 1.0 are equal, and give other dtypes.
    return (type(value), value) if isinstance(value, _PLAIN) else None
