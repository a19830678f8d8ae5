"""Linear attention as `torch.library` operators: fakes, gradients and vmap, one boundary a call.

Importing this file needs torch alone. The kernels behind `impl` are imported at the first call, so
`torch.compile(fullgraph=True)` sees one opaque node and a machine without triton loses nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.library import LIBRARY, register
from linfusion.kernels.linear_attention.common import accumulator

# kv, k_mean and count are what the backward pass needs beside the inputs.
LIBRARY.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? key_weight, str feature_map, "
    "str normalizer, float eps, str impl) -> (Tensor o, Tensor kv, Tensor k_mean, Tensor count)"
)
LIBRARY.define(
    "linear_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? key_weight, "
    "Tensor kv, Tensor k_mean, Tensor count, str feature_map, str normalizer, float eps, "
    "str impl) -> (Tensor dq, Tensor dk, Tensor dv)"
)
LIBRARY.define(
    "linear_state_backward(Tensor dkv, Tensor dk_mean, Tensor k, Tensor v, Tensor? key_weight, "
    "Tensor count, str feature_map, str impl) -> (Tensor dk, Tensor dv)"
)
LIBRARY.define(
    "linear_read_backward(Tensor do, Tensor q, Tensor kv, Tensor k_mean, Tensor count, "
    "str feature_map, str normalizer, float eps, str impl) "
    "-> (Tensor dq, Tensor dkv, Tensor dk_mean)"
)
LIBRARY.define(
    "linear_state(Tensor k, Tensor v, Tensor? key_weight, str feature_map, str impl) "
    "-> (Tensor kv, Tensor k_mean, Tensor count)"
)
LIBRARY.define(
    "linear_read(Tensor q, Tensor kv, Tensor k_mean, str feature_map, str normalizer, float eps, "
    "Tensor count, ScalarType out_dtype, str impl) -> Tensor"
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    feature_map: str,
    normalizer: str,
    eps: float,
    impl: str,
) -> Tensor:
    """The registered operator, without the state it keeps for its backward."""
    return torch.ops.linfusion.linear_attention(
        q, k, v, key_weight, feature_map, normalizer, eps, impl
    )[0]


def linear_state(
    k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator; [B, H, D, E], [B, H, D] and [B]."""
    return torch.ops.linfusion.linear_state(k, v, key_weight, feature_map, impl)


def linear_read(
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    count: Tensor,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """The registered operator; [B, N, H, E] in `out_dtype`."""
    return torch.ops.linfusion.linear_read(
        q, kv, k_mean, feature_map, normalizer, eps, count, out_dtype, impl
    )


def _kernels(impl: str) -> ModuleType:
    return import_module(f"linfusion.kernels.linear_attention.{impl}")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    feature_map: str,
    normalizer: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels(impl)
    if impl == "blocked" and (bf16 := _kernels("blocked_bf16")).applies(q, k, v, key_weight):
        state = bf16.state_forward(k, v, feature_map)
        return bf16.read_forward(q, *state[:2], feature_map, normalizer, eps, state[2]), *state
    kv, k_mean, count = kernels.state_forward(k, v, key_weight, feature_map)
    o = kernels.read_forward(q, kv, k_mean, feature_map, normalizer, eps, count, v.dtype)
    return o, kv, k_mean, count


def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    kv: Tensor,
    k_mean: Tensor,
    count: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(impl)
    if impl == "blocked" and _kernels("blocked_bf16").applies(q, k, v, key_weight):
        kv, k_mean, count = kernels.state_forward(k, v, key_weight, feature_map)
    return kernels.attention_backward(
        do, q, k, v, key_weight, kv, k_mean, count, feature_map, normalizer, eps
    )


def _state(
    k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(impl).state_forward(k, v, key_weight, feature_map)


def _read(
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    count: Tensor,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return _kernels(impl).read_forward(
        q, kv, k_mean, feature_map, normalizer, eps, count, out_dtype
    )


def _state_backward(
    dkv: Tensor,
    dk_mean: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    count: Tensor,
    feature_map: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _kernels(impl).state_backward(dkv, dk_mean, k, v, key_weight, count, feature_map)


def _read_backward(
    do: Tensor,
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    count: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(impl).read_backward(do, q, kv, k_mean, count, feature_map, normalizer, eps)


# Fakes: shapes, dtypes and strides of what the kernels return.


def _state_fake(
    k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    dtype = accumulator(k, v)
    return (
        k.new_empty(batch, heads, dim, v.shape[3], dtype=dtype),
        k.new_empty(batch, heads, dim, dtype=dtype),
        k.new_empty(batch, dtype=dtype),
    )


def _read_fake(
    q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
    count: Tensor,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return q.new_empty(*q.shape[:3], kv.shape[3], dtype=out_dtype)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    feature_map: str,
    normalizer: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), *_state_fake(k, v, key_weight, feature_map, impl)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _attention_backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _empty_like(q, k, v)


def _state_backward_fake(
    dkv: Tensor, dk_mean: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _empty_like(k, v)


def _read_backward_fake(
    do: Tensor, q: Tensor, kv: Tensor, k_mean: Tensor, *rest: Any
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
    q, kv, k_mean, feature_map, normalizer, eps, count, _, impl = inputs
    ctx.choices = (feature_map, normalizer, eps, impl)
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
