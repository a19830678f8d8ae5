"""Linear attention as `torch.library` operators: fakes and gradients, one boundary a call.

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
from linfusion.kernels.linear_attention.common import Choices, LinearState

_STATE = "Tensor kv, Tensor k_mean, Tensor count"
_CHOICES = "str feature_map, str normalizer, float eps, str impl"

# The state is what the backward pass needs beside the inputs.
LIBRARY.define(
    f"linear_attention(Tensor q, Tensor k, Tensor v, Tensor? key_weight, {_CHOICES}) "
    f"-> (Tensor o, {_STATE})"
)
LIBRARY.define(
    f"linear_state(Tensor k, Tensor v, Tensor? key_weight, str feature_map, str impl) -> ({_STATE})"
)
LIBRARY.define(f"linear_read(Tensor q, {_STATE}, ScalarType out_dtype, {_CHOICES}) -> Tensor")
LIBRARY.define(
    "linear_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? key_weight, "
    f"{_STATE}, {_CHOICES}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
LIBRARY.define(
    "linear_state_backward(Tensor dkv, Tensor dk_mean, Tensor k, Tensor v, Tensor? key_weight, "
    "Tensor count, str feature_map, str impl) -> (Tensor dk, Tensor dv)"
)
LIBRARY.define(
    f"linear_read_backward(Tensor do, Tensor q, {_STATE}, {_CHOICES}) "
    "-> (Tensor dq, Tensor dkv, Tensor dk_mean)"
)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, choices: Choices, impl: str
) -> Tensor:
    """The registered operator, without the state it keeps for its backward."""
    return torch.ops.linfusion.linear_attention(q, k, v, key_weight, *choices, impl)[0]


def linear_state(
    k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str, impl: str
) -> LinearState:
    """The registered operator."""
    return LinearState(*torch.ops.linfusion.linear_state(k, v, key_weight, feature_map, impl))


def linear_read(
    q: Tensor, state: LinearState, out_dtype: torch.dtype, choices: Choices, impl: str
) -> Tensor:
    """The registered operator; [B, N, H, E] in `out_dtype`."""
    return torch.ops.linfusion.linear_read(q, *state, out_dtype, *choices, impl)


def _kernels(impl: str) -> ModuleType:
    return import_module(f"linfusion.kernels.linear_attention.{impl}")


def _attention(
    q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, impl = args
    choices, kernels = Choices(*rest), _kernels(impl)
    if impl == "blocked" and (bf16 := _kernels("blocked_bf16")).applies(q, k, v, key_weight):
        state = bf16.state_forward(k, v, choices.feature_map)
        return bf16.read_forward(q, state, choices), *state
    state = kernels.state_forward(k, v, key_weight, choices.feature_map)
    return kernels.read_forward(q, state, choices, v.dtype), *state


def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *rest, impl = args
    state, choices, kernels = LinearState(*rest[:3]), Choices(*rest[3:]), _kernels(impl)
    if impl == "blocked" and _kernels("blocked_bf16").applies(q, k, v, key_weight):
        state = kernels.state_forward(k, v, key_weight, choices.feature_map)
    return kernels.attention_backward(do, q, k, v, key_weight, state, choices)


def _state(
    k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str, impl: str
) -> tuple[Tensor, ...]:
    return tuple(_kernels(impl).state_forward(k, v, key_weight, feature_map))


def _state_backward(dkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, impl = args
    return _kernels(impl).state_backward(dkv, *rest)


def _read(q: Tensor, *args: Any) -> Tensor:
    *state, out_dtype, feature_map, normalizer, eps, impl = args
    choices = Choices(feature_map, normalizer, eps)
    return _kernels(impl).read_forward(q, LinearState(*state), choices, out_dtype)


def _read_backward(do: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, impl = args
    return _kernels(impl).read_backward(do, q, LinearState(*rest[:3]), Choices(*rest[3:]))


# Fakes: shapes, dtypes and strides of what the kernels return.


def _state_fake(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    dtype = accumulator(k, v)
    return (
        k.new_empty(batch, heads, dim, v.shape[3], dtype=dtype),
        k.new_empty(batch, heads, dim, dtype=dtype),
        k.new_empty(batch, dtype=dtype),
    )


def _read_fake(
    q: Tensor, kv: Tensor, k_mean: Tensor, count: Tensor, out_dtype: torch.dtype, *_: Any
) -> Tensor:
    return q.new_empty(*q.shape[:3], kv.shape[3], dtype=out_dtype)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), *_state_fake(k, v)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _attention_backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _empty_like(q, k, v)


def _state_backward_fake(
    dkv: Tensor, dk_mean: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _empty_like(k, v)


def _read_backward_fake(
    do: Tensor, q: Tensor, kv: Tensor, k_mean: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _empty_like(q, kv, k_mean)


# Gradients. The kernels save their inputs and the state: nothing else as long as the tokens.


def _attention_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, key_weight, *ctx.choices = inputs
    _, *state = output
    ctx.mark_non_differentiable(*state)
    ctx.save_for_backward(q, k, v, key_weight, *state)


def _attention_grad(ctx: Any, do: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.linfusion.linear_attention_backward(do, *ctx.saved_tensors, *ctx.choices)
    return *grads, None, None, None, None, None


def _state_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, key_weight, *ctx.choices = inputs
    count = output[2]
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(k, v, key_weight, count)


def _state_grad(ctx: Any, dkv: Tensor, dk_mean: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.linfusion.linear_state_backward(
        dkv, dk_mean, *ctx.saved_tensors, *ctx.choices
    )
    return *grads, None, None, None


def _read_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, kv, k_mean, count, _, *ctx.choices = inputs
    ctx.save_for_backward(q, kv, k_mean, count)


def _read_grad(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.linfusion.linear_read_backward(do, *ctx.saved_tensors, *ctx.choices)
    return *grads, None, None, None, None, None, None


def _grad_of_grad(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "linear_attention: this implementation is differentiable once; impl='reference' is "
        "differentiable any number of times"
    )


register("linear_attention", _attention, _attention_fake, _attention_grad, _attention_save)
register("linear_state", _state, _state_fake, _state_grad, _state_save)
register("linear_read", _read, _read_fake, _read_grad, _read_save)
register("linear_attention_backward", _attention_backward, _attention_backward_fake, _grad_of_grad)
register("linear_state_backward", _state_backward, _state_backward_fake, _grad_of_grad)
register("linear_read_backward", _read_backward, _read_backward_fake, _grad_of_grad)
