"""Linear attention as `torch.library` operators: schema, fake, autograd and vmap, one boundary a call.

Importing this file needs torch alone. The kernels behind `impl` are imported at the first call, so
`torch.compile(fullgraph=True)` sees one opaque node and a machine without triton loses nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.linear_attention.common import accumulator

HAS_TRITON = find_spec("triton") is not None

_LIBRARY = torch.library.Library("linfusion", "FRAGMENT")

# kv, k_mean and count are what the backward pass needs beside the inputs.
_LIBRARY.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? key_weight, str feature_map, "
    "str normalizer, float eps, str impl) -> (Tensor o, Tensor kv, Tensor k_mean, Tensor count)"
)
_LIBRARY.define(
    "linear_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? key_weight, "
    "Tensor kv, Tensor k_mean, Tensor count, str feature_map, str normalizer, float eps, "
    "str impl) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_LIBRARY.define(
    "linear_state(Tensor k, Tensor v, Tensor? key_weight, str feature_map, str impl) "
    "-> (Tensor kv, Tensor k_mean, Tensor count)"
)
_LIBRARY.define(
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


def check_triton(device: torch.device) -> None:
    """Say why the Triton kernels cannot run on this device, if they cannot.

    Raises:
        ImportError: triton is not installed.
        ValueError: the device is not a GPU and triton does not interpret.
    """
    if not HAS_TRITON:
        raise ImportError("impl: 'triton' needs triton, which is not installed: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl: 'triton' needs tensors on a CUDA or ROCm device, got {device}; on a CPU it "
            "runs only interpreted, with TRITON_INTERPRET=1 set before triton is imported"
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
    return _kernels(impl).attention_backward(
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


_LIBRARY.impl("linear_attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_attention_backward", _attention_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_state", _state, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_read", _read, "CompositeExplicitAutograd")


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
