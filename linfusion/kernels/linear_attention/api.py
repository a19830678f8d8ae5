"""Linear attention as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from linfusion.kernels.common import accumulator, check_device, check_tensor, implementation
from linfusion.kernels.linear_attention import ops, reference
from linfusion.kernels.linear_attention.common import FEATURE_MAPS, Choices, LinearState

FeatureMap = str | Callable[[Tensor], Tensor]

HEAD_DIMS = (8, 576)  # what the Triton kernels are compiled and tested for


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu1",
    normalizer: str | None = "mean",
    eps: float = 1e-4,
    key_weight: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Non-causal linear attention, linear in tokens (Liu et al. 2024, LinFusion, eq. 7).

    o_i = φ(q_i)·S / (φ(q_i)·m + eps),  S = mean_j φ(k_j)ᵀ v_j,  m = mean_j φ(k_j)

    Sums over tokens are float32 (float64 for float64 inputs) and divided once, after the sum.

    Args:
        q: queries [B, N, H, D], any strides.
        k: keys [B, M, H, D]; M may differ from N.
        v: values [B, M, H, E].
        feature_map: φ. "elu1" is elu(x) + 1 (LinFusion), "relu" (SANA), "relu_eps"
            is relu(x) + 1e-6 (LiT), "identity", or a function
            from [B, T, H, D] to [B, T, H, D'] that gets q and k in the accumulator's dtype.
        normalizer: "mean" as above; "sum" puts eps on the sum over keys instead (SANA);
            None leaves the plain sum Σ_j φ(q_i)·φ(k_j) v_j (TransNormer, no denominator).
        eps: added to the denominator; finite and not negative.
        key_weight: weight of each key, [B, M] or [1, M], floating or bool; it multiplies φ(k_j),
            and means divide by its sum. A bool mask keeps the keys that are True. With every key
            masked the output is zero.
        impl: "reference" (the definition), "blocked" (token blocks, any device), "triton" (CUDA,
            ROCm). None takes "triton" on a GPU that has it and "blocked" elsewhere. A named
            implementation is used or refused, never replaced by another.

    Returns:
        [B, N, H, E] in the dtype of v, contiguous.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
        ImportError: impl="triton" without triton.
    """
    if has_torch_function((q, k, v)):  # tensors that know better, as torch's own functions ask
        return handle_torch_function(
            linear_attention,
            (q, k, v),
            q,
            k,
            v,
            feature_map=feature_map,
            normalizer=normalizer,
            eps=eps,
            key_weight=key_weight,
            impl=impl,
        )
    choices = _checked(feature_map, normalizer, eps)
    _check_keys(k, v)
    _check_queries(q, k, heads=k.shape[2], against="k")
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k: expected one head dimension, got {q.shape[3]} in q and {k.shape[3]} in k"
        )
    dtype = accumulator(q, k, v)
    if callable(feature_map):
        q, k = _featurize(feature_map, q, "q", dtype), _featurize(feature_map, k, "k", dtype)
    key_weight = _key_weight(key_weight, k, dtype)
    impl = _implementation(impl, (q, k, v), key_weight)
    if impl == "reference":
        state = reference.state_forward(k.to(dtype), v.to(dtype), key_weight, choices.feature_map)
        return reference.read_forward(q, state, choices, v.dtype)
    return ops.linear_attention(q, k, v, key_weight, choices, impl)


def linear_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu1",
    key_weight: Tensor | None = None,
    impl: str | None = None,
) -> LinearState:
    """What linear attention remembers of keys and values; states of disjoint tokens merge.

    Args:
        k: keys [B, M, H, D].
        v: values [B, M, H, E].
        feature_map, key_weight, impl: as for `linear_attention`.

    Returns:
        LinearState(kv [B, H, D, E], k_mean [B, H, D], count [B]), float32 or float64.

    Raises:
        ValueError, ImportError: as `linear_attention`.
    """
    name = _checked(feature_map, "mean", 0.0).feature_map
    _check_keys(k, v)
    dtype = accumulator(k, v)
    if callable(feature_map):
        k = _featurize(feature_map, k, "k", dtype)
    key_weight = _key_weight(key_weight, k, dtype)
    impl = _implementation(impl, (k, v), key_weight)
    if impl == "reference":
        return reference.state_forward(k, v, key_weight, name)
    return ops.linear_state(k, v, key_weight, name, impl)


def linear_read(
    q: Tensor,
    state: LinearState,
    *,
    feature_map: FeatureMap = "elu1",
    normalizer: str | None = "mean",
    eps: float = 1e-4,
    impl: str | None = None,
) -> Tensor:
    """What queries read from a state; `linear_attention` is a read of the state of its keys.

    Args:
        q: queries [B, N, H, D].
        state: from `linear_state` or `LinearState.merge`, made with the same feature map.
        feature_map, normalizer, eps, impl: as for `linear_attention`.

    Returns:
        [B, N, H, E] in the dtype of q, contiguous.

    Raises:
        ValueError, ImportError: as `linear_attention`.
    """
    choices = _checked(feature_map, normalizer, eps)
    kv, k_mean, count = _check_state(state)
    _check_queries(q, kv, heads=kv.shape[1], against="state.kv")
    out_dtype = q.dtype
    if callable(feature_map):
        q = _featurize(feature_map, q, "q", accumulator(q, kv))
    if q.shape[3] != kv.shape[2]:
        raise ValueError(
            f"q: expected head dimension {kv.shape[2]} as in state.kv, got {q.shape[3]}"
        )
    if accumulator(q) == torch.float64:
        kv, k_mean, count = kv.double(), k_mean.double(), count.double()
    impl = _implementation(impl, (q, kv), None)
    state = LinearState(kv, k_mean, count)
    if impl == "reference":
        return reference.read_forward(q, state, choices, out_dtype)
    return ops.linear_read(q, state, out_dtype, choices, impl)


def _checked(feature_map: FeatureMap, normalizer: str | None, eps: float) -> Choices:
    """By the names that the kernels know; what a function has mapped is "identity" to them."""
    if not callable(feature_map) and feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map: expected one of {FEATURE_MAPS} or a callable, got {feature_map!r}"
        )
    if normalizer not in ("mean", "sum", None):
        raise ValueError(f"normalizer: expected 'mean', 'sum' or None, got {normalizer!r}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")
    name = "identity" if callable(feature_map) else feature_map
    return Choices(name, normalizer or "none", float(eps))


def _check_keys(k: Tensor, v: Tensor) -> None:
    check_tensor(k, "k", "[B, M, H, D]")
    check_tensor(v, "v", "[B, M, H, E]")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k, v: expected the same batch, tokens and heads, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    check_device(v, "v", k, "k")


def _check_queries(q: Tensor, other: Tensor, *, heads: int, against: str) -> None:
    check_tensor(q, "q", "[B, N, H, D]")
    batch = other.shape[0]
    if q.shape[0] != batch or q.shape[2] != heads:
        raise ValueError(
            f"q: expected batch {batch} and {heads} heads as in {against}, got batch "
            f"{q.shape[0]} and {q.shape[2]} heads (shape {tuple(q.shape)})"
        )
    check_device(q, "q", other, against)


def _check_state(state: LinearState) -> LinearState:
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(f"state: expected a LinearState, got {type(state).__name__}")
    kv, k_mean, count = state
    check_tensor(kv, "state.kv", "[B, H, D, E]")
    if k_mean.shape != kv.shape[:3] or count.shape != kv.shape[:1]:
        raise ValueError(
            f"state: expected k_mean {tuple(kv.shape[:3])} and count {tuple(kv.shape[:1])} beside "
            f"kv {tuple(kv.shape)}, got {tuple(k_mean.shape)} and {tuple(count.shape)}"
        )
    for name, x in (("kv", kv), ("k_mean", k_mean), ("count", count)):
        if x.dtype != kv.dtype or x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"state.{name}: expected float32 or float64 throughout, got {x.dtype}")
        check_device(x, f"state.{name}", kv, "kv")
    return LinearState(kv, k_mean, count)


def _featurize(
    feature_map: Callable[[Tensor], Tensor], x: Tensor, name: str, dtype: torch.dtype
) -> Tensor:
    y = feature_map(x.to(dtype))
    if not isinstance(y, Tensor) or y.shape[:3] != x.shape[:3] or y.dim() != 4:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"feature_map: expected it to keep the first three axes of {name} "
            f"{tuple(x.shape)}, it returned {got}"
        )
    return y


def _key_weight(key_weight: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weights as [B, M] in the accumulator's dtype."""
    if key_weight is None:
        return None
    batch, tokens = k.shape[:2]
    if not isinstance(key_weight, Tensor) or not (
        key_weight.dtype == torch.bool or key_weight.is_floating_point()
    ):
        got = key_weight.dtype if isinstance(key_weight, Tensor) else type(key_weight).__name__
        raise ValueError(f"key_weight: expected a floating or bool tensor, got {got}")
    if (
        key_weight.dim() != 2
        or key_weight.shape[1] != tokens
        or (key_weight.shape[0] != batch and key_weight.shape[0] != 1)
    ):
        raise ValueError(
            f"key_weight: expected shape ({batch}, {tokens}) or (1, {tokens}), got "
            f"{tuple(key_weight.shape)}"
        )
    check_device(key_weight, "key_weight", k, "k")
    return key_weight.to(dtype).expand(batch, tokens)


def _implementation(
    impl: str | None, tensors: tuple[Tensor, ...], key_weight: Tensor | None
) -> str:
    learns_weight = key_weight is not None and key_weight.requires_grad and torch.is_grad_enabled()
    if learns_weight and impl is None:
        return "reference"

    def unfit() -> str | None:
        # Head dimensions of every tensor but the state, whose D equals that of q.
        dims = [t.shape[3] for t in tensors]
        if all(HEAD_DIMS[0] <= d <= HEAD_DIMS[1] for d in dims):
            return None
        return f"'triton' takes head dimensions from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {dims}"

    impl = implementation(impl, tensors[0], accumulator(*tensors), unfit)
    if learns_weight and impl != "reference":
        raise ValueError(
            f"key_weight: impl={impl!r} has no gradient for it; detach it or use impl='reference'"
        )
    return impl
