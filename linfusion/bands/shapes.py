"""Shape and dtype of what a function gives: found on the meta device, once for each kind of call.

A UNet makes the same few hundred calls in every forward. Running each on meta tensors takes longer
than launching it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

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
    """What `func` of the arguments gives, whose leaves are `flat` and whose form is `tree`.

    Args:
        func: a function of tensors.
        flat, tree: its (args, kwargs), as `tree_flatten` gives them.
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
