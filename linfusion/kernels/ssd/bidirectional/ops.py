"""Both scans as one `torch.library` operator; see `linfusion.kernels.ssd.ops`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.library import LIBRARY, register
from linfusion.kernels.ssd.common import accumulator, kept_states

# Steps dt and log-decays a are [B, L, H, 2], forward and backward, in the dtype of the states; skip
# is D [B, H, P]. What is kept for the backward pass are some states [B, kept, H, 2, P, N]: those of
# `kept_states`, in Triton none.
LIBRARY.define(
    "ssd_bidirectional(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? skip, "
    "SymInt chunk_size, str impl) -> (Tensor y, Tensor kept)"
)
LIBRARY.define(
    "ssd_bidirectional_backward(Tensor dy, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, "
    "Tensor? skip, Tensor kept, SymInt chunk_size, str impl) -> "
    "(Tensor dx, Tensor ddt, Tensor da, Tensor db, Tensor dc, Tensor dskip)"
)


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    chunk_size: int,
    impl: str,
) -> Tensor:
    """The registered operator, without what it keeps; [B, L, H, P]."""
    y: Tensor
    y, _ = torch.ops.linfusion.ssd_bidirectional(x, dt, a, b, c, skip, chunk_size, impl)
    return y


def _kernels(impl: str) -> ModuleType:
    return import_module(f"linfusion.kernels.ssd.bidirectional.{impl}")


def _scan(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, impl = args
    return _kernels(impl).scan(x, *rest)


def _scan_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, impl = args
    return _kernels(impl).scan_backward(dy, *rest)


def _scan_fake(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    chunk_size: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, channels = x.shape
    count = 0 if impl == "triton" else kept_states(length, chunk_size, impl)
    kept = x.new_empty(batch, count, heads, 2, channels, b.shape[3], dtype=accumulator(x, dt, b, c))
    return x.new_empty(x.shape), kept


def _scan_backward_fake(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dskip = x.new_empty(x.shape[0], 0) if skip is None else skip.new_empty(skip.shape)
    return *(t.new_empty(t.shape) for t in (x, dt, a, b, c)), dskip


def _scan_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, chunk_size, impl = inputs
    ctx.choices = chunk_size, impl
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _scan_grad(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpointing gives them out only once
    *grads, dskip = torch.ops.linfusion.ssd_bidirectional_backward(dy, *saved, *ctx.choices)
    return *grads, None if saved[5] is None else dskip, None, None


def _grad_of_grad(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "ssd_bidirectional: this implementation is differentiable once; impl='reference' is "
        "differentiable any number of times"
    )


register("ssd_bidirectional", _scan, _scan_fake, _scan_grad, _scan_save)
register("ssd_bidirectional_backward", _scan_backward, _scan_backward_fake, _grad_of_grad)
