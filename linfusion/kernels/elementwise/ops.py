"""The fused elementwise kernels as `torch.library` operators: fakes and gradients.

Importing this file needs torch alone: the kernels are imported at the first call.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.library import LIBRARY, register

LIBRARY.define(
    "norm_leaky_relu(Tensor x, Tensor weight, Tensor bias, float eps, float slope) -> Tensor"
)
LIBRARY.define(
    "norm_leaky_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, float eps, "
    "float slope) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
LIBRARY.define(
    "rotary_rms_norm(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor"
)
LIBRARY.define(
    "rotary_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor cos, Tensor sin, "
    "float eps) -> (Tensor dx, Tensor dweight)"
)


def norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """The registered operator; as x, contiguous."""
    return torch.ops.linfusion.norm_leaky_relu(x, weight, bias, eps, slope)


def rotary_rms_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The registered operator; as x, contiguous."""
    return torch.ops.linfusion.rotary_rms_norm(x, weight, cos, sin, eps)


def _kernels() -> ModuleType:
    return import_module("linfusion.kernels.elementwise.triton")


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.slope = inputs
    ctx.save_for_backward(*tensors)


def _norm_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.linfusion.norm_leaky_relu_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.slope)
    return *grads, None, None


def _rotary_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rotary_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.linfusion.rotary_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
    return *grads, None, None, None


def _no_grad_of_grad(name: str) -> Any:
    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{name}: this implementation is differentiable once; impl='reference' is "
            "differentiable any number of times"
        )

    return refuse


def _as_x(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _as_inputs(count: int) -> Any:
    def fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(t.new_empty(t.shape) for t in args[:count])

    return fake


register(
    "norm_leaky_relu",
    lambda *args: _kernels().norm_leaky_relu(*args),
    _as_x,
    _norm_grad,
    _norm_save,
)
register(
    "norm_leaky_relu_backward",
    lambda *args: _kernels().norm_leaky_relu_backward(*args),
    _as_inputs(3),
    _no_grad_of_grad("norm_leaky_relu"),
)
register(
    "rotary_rms_norm",
    lambda *args: _kernels().rotary_rms_norm(*args),
    _as_x,
    _rotary_grad,
    _rotary_save,
)
register(
    "rotary_rms_norm_backward",
    lambda *args: _kernels().rotary_rms_norm_backward(*args),
    _as_inputs(2),
    _no_grad_of_grad("rotary_rms_norm"),
)
