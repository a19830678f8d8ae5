"""A function around a model's forward, for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Wrapper = Callable[..., Any]


@contextlib.contextmanager
def around(model: nn.Module, wrapper: Wrapper) -> Iterator[None]:
    """Within, `model(...)` calls `wrapper(forward, ...)` with the forward the model had before."""
    before = model.__dict__.get("forward")
    model.forward = functools.wraps(model.forward)(functools.partial(wrapper, model.forward))
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
