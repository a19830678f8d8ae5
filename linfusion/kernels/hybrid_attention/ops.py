"""The parts of hybrid attention as `torch.library` operators: fake and gradient.

Importing this file needs torch alone. The kernels behind `impl` are imported at the first call, so
`torch.compile(fullgraph=True)` sees opaque nodes and a machine without triton loses nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.hybrid_attention import blocked
from linfusion.kernels.library import LIBRARY, register
from linfusion.kernels.window_attention.common import bounded

_CHOICES = "SymInt[] grid, float radius, str shape, float scale, bool tiled, str impl"

LIBRARY.define(
    f"hybrid_window_sum(Tensor phi_q, Tensor phi_k, Tensor v, {_CHOICES}) "
    "-> (Tensor num, Tensor den)"
)
LIBRARY.define(
    "hybrid_window_sum_backward(Tensor dnum, Tensor dden, Tensor phi_q, Tensor phi_k, Tensor v, "
    f"{_CHOICES}) -> (Tensor dphi_q, Tensor dphi_k, Tensor dv)"
)
# log_weight is [B, H], with the logarithm of the number of keys; num and den, what is left out of
# the far part, are [B, N, H, D] and [B, N, H], or have no tokens: N = 0.
_JOINED = (
    "Tensor o, Tensor lse, Tensor phi_q, Tensor rotated_q, Tensor kv, Tensor k_mean, "
    "Tensor log_weight, Tensor num, Tensor den"
)
LIBRARY.define(f"hybrid_join({_JOINED}, str impl) -> (Tensor joined, Tensor total)")
LIBRARY.define(
    f"hybrid_join_backward(Tensor do, Tensor dlse, {_JOINED}, Tensor joined, Tensor total) -> "
    "(Tensor do_near, Tensor dlse_near, Tensor dphi_q, Tensor drotated_q, Tensor dkv, "
    "Tensor dk_mean, Tensor dlog_weight, Tensor dnum, Tensor dden)"
)


def window_sum(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """scale · Σ_j φ(q_i)·φ(k_j) v_j [B, N, H, D] and the same without v [B, N, H], over windows."""
    return torch.ops.linfusion.hybrid_window_sum(
        phi_q, phi_k, v, grid, radius, shape, scale, tiled, impl
    )


def join(*tensors: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Near and far in one normalisation: [B, N, H, D] in the dtype of o, and l [B, N, H]."""
    return torch.ops.linfusion.hybrid_join(*tensors, impl)


def _kernels(impl: str) -> ModuleType:
    return import_module(f"linfusion.kernels.hybrid_attention.{impl}")


def _choices(
    grid: list[int], radius: float, shape: str, scale: float, tiled: bool
) -> tuple[tuple[int, ...], float, str, float, bool]:
    size = tuple(grid)
    return size, bounded(radius, size), shape, scale, tiled


def _sum(phi_q: Tensor, phi_k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *choices, impl = rest
    return _kernels(impl).window_sum(phi_q, phi_k, v, *_choices(*choices))


def _sum_backward(
    dnum: Tensor, dden: Tensor, phi_q: Tensor, phi_k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *choices, impl = rest
    tensors = (dnum, dden, phi_q, phi_k, v)
    return _kernels(impl).window_sum_backward(*tensors, *_choices(*choices))


def _sum_fake(phi_q: Tensor, phi_k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(v)
    return v.new_empty(v.shape, dtype=dtype), v.new_empty(v.shape[:3], dtype=dtype)


def _sum_backward_fake(
    dnum: Tensor, dden: Tensor, phi_q: Tensor, phi_k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (phi_q, phi_k, v))


def _sum_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.choices = inputs[3:]


def _sum_grad(ctx: Any, dnum: Tensor, dden: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.linfusion.hybrid_window_sum_backward
    return *backward(dnum, dden, *ctx.saved_tensors, *ctx.choices), *[None] * len(ctx.choices)


def _join(o: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, impl = rest
    return _kernels(impl).join(o, *tensors)


def _join_fake(o: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), lse.new_empty(lse.shape)


def _join_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    return blocked.join_backward(*tensors)  # products of whole tensors: the same on every device


def _join_backward_fake(do: Tensor, dlse: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors[:9])


def _join_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)


def _join_grad(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.linfusion.hybrid_join_backward(do, dlse, *ctx.saved_tensors), None


def _grad_of_grad(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "hybrid_attention: this implementation is differentiable once; impl='reference' is "
        "differentiable any number of times"
    )


register("hybrid_window_sum", _sum, _sum_fake, _sum_grad, _sum_save)
register("hybrid_window_sum_backward", _sum_backward, _sum_backward_fake, _grad_of_grad)
register("hybrid_join", _join, _join_fake, _join_grad, _join_save)
register("hybrid_join_backward", _join_backward, _join_backward_fake, _grad_of_grad)
