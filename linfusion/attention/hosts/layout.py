"""What one call of a model knows of its tokens, and how its layers learn it.

It is kept beside the model, for the thread that calls: a model may be called by several threads, at
any number of sizes. `threading.local`, not a context variable, as `torch.compile` reads the one and
puts a guard on it, and cannot trace the other.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from linfusion.attention.hosts.host import Grid, Levels, Piece, samples_of
from linfusion.attention.hosts.table import host_of


@dataclass(frozen=True)
class Layout:
    """Where the pixels lie among the tokens of one call.

    Attributes:
        samples: pieces of each sample, or of all where there is one.
        levels: grids of a UNet, and then no samples.
        text_first, text_lengths, other_calls: as of the `Host`.
        masks: what the masks of this call leave, by identity; layers share them.
    """

    samples: tuple[tuple[Piece, ...], ...]
    levels: tuple[Grid, ...]
    text_first: bool
    text_lengths: tuple[int, ...] | None
    other_calls: bool
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)


class _Call(threading.local):
    """Of this thread: the layout of the call it is in, the layer, and the calls around it."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.layer: Any = None
        self.around: list[tuple[int, Layout | None]] = []


CALL = _Call()

_CHECKPOINT = "_gradient_checkpointing_func"  # diffusers' name


def attach(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Have every call of `model` read the layout of its tokens."""
    model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
    model.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing is left."""
    for hooks, kept in (
        (model._forward_pre_hooks, ("_forward_pre_hooks_with_kwargs",)),
        (model._forward_hooks, ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
    ):
        for key, hook in list(hooks.items()):
            if hook in (_enter, _leave):
                del hooks[key]
                for name in kept:
                    getattr(model, name).pop(key, None)
    for module in model.modules():
        inner = getattr(vars(module).get(_CHECKPOINT), "_linfusion_inner", None)
        if inner is not None:
            setattr(module, _CHECKPOINT, inner)


def read_layout(model: Any, args: Any, kwargs: Any) -> Layout:
    """From the arguments of a forward.

    Raises:
        ValueError: one is missing or does not tell the grid.
    """
    host = host_of(model)
    assert host is not None  # what linearize has taken has a row
    arguments = {**dict(zip(_names(type(model).forward), args, strict=False)), **kwargs}
    try:
        found = host.grid(arguments, model.config)
        lengths = None if host.text_lengths is None else host.text_lengths(arguments)
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(model).__name__}: the grid of its tokens cannot be read from the arguments it"
            f" was called with ({', '.join(sorted(arguments))}): {type(error).__name__}: {error}"
        ) from error
    levels = isinstance(found, Levels)
    return Layout(
        () if levels else samples_of(found),
        tuple(found) if levels else (),
        host.text_first,
        None if lengths is None else tuple(lengths),
        host.other_calls,
    )


def _enter(model: Any, args: Any, kwargs: Any) -> None:
    """Before the model: the layout of this call."""
    CALL.around.append((id(model), CALL.layout))
    if torch.is_grad_enabled():
        _remember_layouts(model)
    CALL.layout = read_layout(model, args, kwargs)


def _leave(model: Any, args: Any, kwargs: Any, output: Any) -> None:
    """After the model, also after an error: that of the call around it, if there is one."""
    while CALL.around and CALL.around[-1][0] != id(model):
        CALL.around.pop()  # of a model whose hooks did not run
    if CALL.around:
        CALL.layout = CALL.around.pop()[1]


def _remember_layouts(model: nn.Module) -> None:
    """Have gradient checkpointing compute again with the layout of its own forward.

    At every forward: it may be switched on at any time.
    """
    for module in model.modules():
        func = vars(module).get(_CHECKPOINT)
        if func is not None and not hasattr(func, "_linfusion_inner"):
            setattr(module, _CHECKPOINT, _remembering(func))


def _remembering(func: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(func)
    def checkpoint(block: Any, *args: Any, **kwargs: Any) -> Any:
        layout = CALL.layout

        def again(*a: Any, **k: Any) -> Any:  # backward has threads of its own
            before, CALL.layout = CALL.layout, layout
            try:
                return block(*a, **k)
            finally:
                CALL.layout = before

        return func(again, *args, **kwargs)

    checkpoint._linfusion_inner = func  # type: ignore[attr-defined]
    return checkpoint


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
