"""The scan as a `torch.library` operator: fake and gradient, one boundary a call.

Importing this file needs torch alone. The kernels behind `impl` are imported at the first call, so
`torch.compile(fullgraph=True)` sees one opaque node and a machine without triton loses nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.library import LIBRARY, register
from linfusion.kernels.ssd.common import Choices, kept_states

_CHOICES = "SymInt chunk_size, bool reverse, str impl"

# Steps dt and log-decays a [B, L, H] are those that the recurrence uses, in the dtype of the
# states; skip is D [B, H, P]. What is kept for the backward are some states, see `kept_states`.
LIBRARY.define(
    "ssd_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? skip, Tensor? initial, "
    f"{_CHOICES}) -> (Tensor y, Tensor final, Tensor kept)"
)
LIBRARY.define(
    "ssd_scan_backward(Tensor dy, Tensor dfinal, Tensor x, Tensor dt, Tensor a, Tensor b, "
    f"Tensor c, Tensor? skip, Tensor kept, {_CHOICES}) -> "
    "(Tensor dx, Tensor ddt, Tensor da, Tensor db, Tensor dc, Tensor dskip, Tensor dinitial)"
)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    choices: Choices,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The registered operator, without what it keeps; [B, L, H, P] and [B, H, P, N]."""
    y, final, _ = torch.ops.linfusion.ssd_scan(x, dt, a, b, c, skip, initial, *choices, impl)
    return y, final


def _kernels(impl: str) -> ModuleType:
    return import_module(f"linfusion.kernels.ssd.{impl}")


def _scan(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, chunk_size, reverse, impl = args
    return _kernels(impl).scan(x, *rest, Choices(chunk_size, reverse))


def _scan_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, chunk_size, reverse, impl = args
    return _kernels(impl).scan_backward(dy, *rest, Choices(chunk_size, reverse))


def _scan_fake(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
    reverse: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, channels = x.shape
    dtype, state = accumulator(x, dt, b, c), (heads, channels, b.shape[3])
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, *state, dtype=dtype),
        x.new_empty(batch, kept_states(length, chunk_size, impl), *state, dtype=dtype),
    )


def _scan_backward_fake(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dskip = x.new_empty(x.shape[0], 0) if skip is None else skip.new_empty(skip.shape)
    return *(t.new_empty(t.shape) for t in (x, dt, a, b, c)), dskip, dfinal.new_empty(dfinal.shape)


def _scan_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, a, b, c, skip, initial, *ctx.choices = inputs
    kept = output[2]
    ctx.initial = None if initial is None else initial.dtype
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(x, dt, a, b, c, skip, kept)


def _scan_grad(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpointing gives them out only once
    *grads, dskip, dinitial = torch.ops.linfusion.ssd_scan_backward(
        dy, dfinal, *saved, *ctx.choices
    )
    return (
        *grads,
        None if saved[5] is None else dskip,
        None if ctx.initial is None else dinitial.to(ctx.initial),
        *[None] * 3,
    )


def _grad_of_grad(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "ssd_scan: this implementation is differentiable once; impl='reference' is "
        "differentiable any number of times"
    )


register("ssd_scan", _scan, _scan_fake, _scan_grad, _scan_save)
register("ssd_scan_backward", _scan_backward, _scan_backward_fake, _grad_of_grad)
