"""Window attention as a `torch.library` operator: fake and gradient, one boundary a call.

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
from linfusion.kernels.window_attention.common import bounded

_CHOICES = (
    "SymInt[] grid, float radius, str shape, float scale, bool tiled, SymInt[] cells, str impl"
)

# Every query sees k_all and v_all [B, T, H, D], of which there may be none: T = 0. With `cells`,
# which may be empty, the last of them stand for the cells of the grid (`cells`).
LIBRARY.define(
    "window_attention(Tensor q, Tensor k, Tensor v, Tensor k_all, Tensor v_all, "
    f"{_CHOICES}) -> (Tensor o, Tensor lse)"
)
LIBRARY.define(
    "window_attention_backward(Tensor do, Tensor dlse, Tensor q, Tensor k, Tensor v, "
    f"Tensor k_all, Tensor v_all, Tensor o, Tensor lse, {_CHOICES}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_all, Tensor dv_all)"
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The registered operator; [B, N, H, D] in the dtype of v and [B, N, H]."""
    return torch.ops.linfusion.window_attention(
        q, k, v, k_all, v_all, grid, radius, shape, scale, tiled, cells, impl
    )


def _kernels(impl: str) -> ModuleType:
    return import_module(f"linfusion.kernels.window_attention.{impl}")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    grid: list[int],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...],
    impl: str,
) -> tuple[Tensor, Tensor]:
    size = tuple(grid)
    choices = (size, bounded(radius, size), shape, scale, tiled, tuple(cells))
    return _kernels(impl).attention(q, k, v, k_all, v_all, *choices)


def _attention_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    o: Tensor,
    lse: Tensor,
    grid: list[int],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...],
    impl: str,
) -> tuple[Tensor, ...]:
    size = tuple(grid)
    choices = (size, bounded(radius, size), shape, scale, tiled, tuple(cells))
    tensors = (do, dlse, q, k, v, k_all, v_all, o, lse)
    return _kernels(impl).attention_backward(*tensors, *choices)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulator(q))


def _attention_backward_fake(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, k_all: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, k_all, k_all))


def _attention_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.grid, ctx.radius, ctx.shape, ctx.scale, ctx.tiled, ctx.cells, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_grad(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    choices = (ctx.grid, ctx.radius, ctx.shape, ctx.scale, ctx.tiled, ctx.cells, ctx.impl)
    grads = torch.ops.linfusion.window_attention_backward(do, dlse, *ctx.saved_tensors, *choices)
    return *grads, None, None, None, None, None, None, None


def _grad_of_grad(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "window_attention: this implementation is differentiable once; impl='reference' is "
        "differentiable any number of times"
    )


register("window_attention", _attention, _attention_fake, _attention_grad, _attention_save)
register("window_attention_backward", _attention_backward, _attention_backward_fake, _grad_of_grad)
