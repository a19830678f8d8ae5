"""A function around a module's call, for a while and in this context alone.

It goes around everything: hooks of adapters and offloading, and what `torch.compile` made of the
module. Not diffusers' `HookRegistry`, whose hooks are there for every thread, inside compiled code,
and leave an attribute behind.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

Wrapper = Callable[..., Any]

# What this thread (or task) has put around which module, the outermost last.
_AROUND: ContextVar[tuple[tuple[nn.Module, Wrapper], ...]] = ContextVar("around", default=())
_LOCK = threading.Lock()
_CALL = "_compiled_call_impl"  # what torch calls in the place of a module that was compiled


@contextlib.contextmanager
def around(module: nn.Module, wrapper: Wrapper) -> Iterator[None]:
    """Within, `module(...)` calls `wrapper(call, ...)` with what it would have called.

    Other threads call the module as it is. When nobody is within, nothing is left on it.
    """
    before = _AROUND.set((*_AROUND.get(), (module, wrapper)))
    with _LOCK:
        there = module.__dict__.get(_CALL)
        call = there if isinstance(there, _Call) else _Call(module, there)
        module.__dict__[_CALL] = call
        call.users += 1
    try:
        yield
    finally:
        with _LOCK:
            call.users -= 1
            if not call.users and module.__dict__.get(_CALL) is call:
                del module.__dict__[_CALL]
                if call.before is not None:
                    module.__dict__[_CALL] = call.before
        _AROUND.reset(before)


def eager(module: nn.Module) -> Callable[..., Any]:
    """The call of a module as Python has it, whether it was compiled or not."""
    return getattr(module, "_orig_mod", module)._call_impl


class _Call:
    """Stands where torch looks for a compiled call."""

    def __init__(self, module: nn.Module, before: Callable[..., Any] | None) -> None:
        self.module, self.before, self.users = module, before, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.module._call_impl if self.before is None else self.before
        for module, wrapper in _AROUND.get():
            if module is self.module:
                call = functools.partial(wrapper, call)
        return call(*args, **kwargs)
