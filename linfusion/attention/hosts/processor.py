"""The host's own processor, with one call exchanged: that of softmax attention.

Most of diffusers' processors hand queries, keys and values to `dispatch_attention_fn`, where ours
is a backend. The others call `scaled_dot_product_attention`, which is caught while they run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from linfusion.attention.hosts.attend import attend
from linfusion.attention.hosts.layout import CALL

BACKEND = "linfusion"


class HostedProcessor:
    """What `hosted` makes of a processor's class derives from this."""

    _parallel_config: Any = None


class _Layer:
    """A layer while its processor runs."""

    def __init__(self, form: Any, backend: Any) -> None:
        self.form = form
        self.backend = backend  # of queries that are no pixels, if the host asks for one
        self.seen = False


def hosted(processor: Any, name: str) -> HostedProcessor:
    """A processor that computes what `processor` does, but for its attention.

    Args:
        processor: of a layer of a host.
        name: of the child of the layer that has the form of its attention.
    """
    kind: Any = type(processor)
    made = _subclass(kind, name).__new__(_subclass(kind, name))
    made.__dict__.update({k: v for k, v in vars(processor).items() if k != "_attention_backend"})
    made._chosen_backend = getattr(processor, "_attention_backend", None)
    return made


@cache
def _subclass(kind: Any, name: str) -> Any:
    names = set(kind.__call__.__code__.co_names)
    dispatches = {"dispatch_attention_fn", "_attention_backend"} <= names

    @wraps(kind.__call__)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if CALL.layout is None or not hasattr(attn, name):
            raise ValueError(
                "attn: the grid of its tokens is not known; call the whole model, which"
                f' linfusion.linearize(model, "{name}") has prepared, not a block of it'
            )
        if self._parallel_config is not None:
            raise ValueError(
                "_parallel_config: windows do not run under diffusers' context parallelism; they"
                " would see only their own share of the tokens"
            )
        before = CALL.layer
        layer = CALL.layer = _Layer(getattr(attn, name), self._chosen_backend)
        try:
            # A host that attends from other tokens in calls of their own does so past any backend.
            if dispatches and not CALL.layout.other_calls:
                out = kind.__call__(self, attn, *args, **kwargs)
            else:
                with _Caught():
                    out = kind.__call__(self, attn, *args, **kwargs)
        finally:
            CALL.layer = before
        if not layer.seen:
            raise ValueError(
                f"attention backend: {kind.__name__} did not reach the attention that is exchanged;"
                ' call diffusers\' model.set_attention_backend("native"), or leave'
                " DIFFUSERS_ATTN_BACKEND unset"
            )
        return out

    ours = _backend() if dispatches else _native()  # found now: it cannot be traced

    def pinned(self: Any) -> Any:
        return ours

    def choose(self: Any, value: Any) -> None:
        self._chosen_backend = value

    body = {
        "__call__": call,
        "__reduce__": lambda self: (_again, (kind, name, dict(vars(self)))),
        "_parallel_config": None,
    }
    if hasattr(kind, "_attention_backend"):
        body["_attention_backend"] = property(pinned, choose)
    return type(f"Hosted{kind.__name__}", (HostedProcessor, kind), body)


def _again(kind: type, name: str, state: dict[str, Any]) -> Any:
    made = _subclass(kind, name).__new__(_subclass(kind, name))
    made.__dict__.update(state)
    return made


def _native() -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


@cache
def _backend() -> Any:
    """Ours among the backends of diffusers, under a name beside those of its enumeration."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member = str.__new__(AttentionBackendName, BACKEND)
    member._name_ = member._value_ = BACKEND
    _AttentionBackendRegistry.register(member)(_dispatched)
    return member


def _dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As a backend of diffusers: [B, N, H, D]."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend = CALL.layer.backend

    def rest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = dispatch_attention_fn(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            backend=backend,
        )  # fmt: skip
        return out

    return _exchanged(query, key, value, attn_mask, dropout_p, is_causal, scale, rest)


class _Caught(TorchFunctionMode):
    """While a processor runs, its `scaled_dot_product_attention` is ours."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or CALL.layer is None:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (given.pop(name).transpose(1, 2) for name in names[:3])
        mask = given.pop("attn_mask", None)

        def rest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **given).transpose(1, 2)

        out = _exchanged(
            query,
            key,
            value,
            mask,
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            given.get("scale"),
            rest,
        )
        return out.transpose(1, 2)


def _exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    rest: Callable[..., Tensor],
) -> Tensor:
    layer, layout = CALL.layer, CALL.layout
    assert layout is not None
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attn_mask: got a {type(mask).__name__}; windows honour masks over keys, which are"
            " tensors"
        )
    CALL.layer = None  # what `rest` attends to is not exchanged again
    try:
        out = attend(layer.form, layout, q, k, v, mask, scale, rest)
        if out is None:
            return rest(q, k, v, mask)
    finally:
        CALL.layer = layer
    if causal or dropout:
        what = f"dropout_p: got {dropout}" if dropout else "is_causal: got True"
        raise ValueError(f"{what}; windows of pixels have no such form")
    layer.seen = True
    return out
