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
LIBRARY.define(
    "directional_conv(Tensor x, Tensor? weight, Tensor? bias, Tensor? weight_b, Tensor? bias_b, "
    "int first, bool silu) -> (Tensor forward, Tensor backward)"
)
LIBRARY.define(
    "directional_conv_backward(Tensor dy, Tensor dy_b, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? weight_b, Tensor? bias_b, int first, bool silu) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dweight_b, Tensor dbias_b)"
)
LIBRARY.define(
    "gated_rms_norm(Tensor x, Tensor? other, Tensor? z, Tensor? weight, float eps, float scale, "
    "bool gate_last) -> Tensor"
)
LIBRARY.define(
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor? other, Tensor? z, Tensor? weight, "
    "float eps, float scale, bool gate_last) -> (Tensor dx, Tensor dz, Tensor dweight)"
)


def norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """The registered operator; as x, contiguous."""
    return torch.ops.linfusion.norm_leaky_relu(x, weight, bias, eps, slope)


def rotary_rms_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The registered operator; as x, contiguous."""
    return torch.ops.linfusion.rotary_rms_norm(x, weight, cos, sin, eps)


def directional_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    first: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The registered operator; a direction that there is not is empty."""
    return torch.ops.linfusion.directional_conv(x, weight, bias, weight_b, bias_b, first, silu)


def gated_rms_norm(
    x: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    gate_last: bool,
) -> Tensor:
    """The registered operator; as x, contiguous."""
    return torch.ops.linfusion.gated_rms_norm(x, other, z, weight, eps, scale, gate_last)


def _kernels(file: str = "triton") -> ModuleType:
    return import_module(f"linfusion.kernels.elementwise.{file}")


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


def _conv_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.first, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_grad(ctx: Any, dy: Tensor, dy_b: Tensor) -> tuple[Tensor | None, ...]:
    _, *weights = ctx.saved_tensors
    dx, *grads = torch.ops.linfusion.directional_conv_backward(
        dy, dy_b, *ctx.saved_tensors, ctx.first, ctx.silu
    )
    return dx, *_of_those_there(grads, weights), None, None


def _gated_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.scale, ctx.gate_last = inputs
    ctx.save_for_backward(*tensors)


def _gated_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, other, *rest = ctx.saved_tensors
    dx, *grads = torch.ops.linfusion.gated_rms_norm_backward(
        dy, *ctx.saved_tensors, ctx.eps, ctx.scale, ctx.gate_last
    )
    d_other = None if other is None else dx.to(other.dtype)
    return dx, d_other, *_of_those_there(grads, rest), None, None, None


def _of_those_there(grads: list[Tensor], inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else g for g, x in zip(grads, inputs, strict=True)]


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
register(
    "directional_conv",
    lambda *args: _kernels("triton_conv").directional_conv(*args),
    lambda x, w, b, w_b, b_b, *_: tuple(
        x.new_empty(x.shape if t is not None else 0) for t in (w, w_b)
    ),
    _conv_grad,
    _conv_save,
)
register(
    "directional_conv_backward",
    lambda *args: _kernels("triton_conv").directional_conv_backward(*args),
    lambda dy, dy_b, x, *args: (
        x.new_empty(x.shape),
        *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:4]),
    ),
    _no_grad_of_grad("directional_conv"),
)
register(
    "gated_rms_norm",
    lambda *args: _kernels("triton_gate").gated_rms_norm(*args),
    _as_x,
    _gated_grad,
    _gated_save,
)
register(
    "gated_rms_norm_backward",
    lambda *args: _kernels("triton_gate").gated_rms_norm_backward(*args),
    lambda dy, x, other, z, weight, *_: (
        x.new_empty(x.shape),
        x.new_empty(0) if z is None else z.new_empty(x.shape),
        x.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape),
    ),
    _no_grad_of_grad("gated_rms_norm"),
)
