"""What whole pictures and chunks of video share: checks of features, the state, the join."""

from __future__ import annotations

from torch import Tensor

from linfusion.kernels.common import accumulator, check_device
from linfusion.kernels.hybrid_attention import ops, reference
from linfusion.kernels.library import without_autocast
from linfusion.kernels.linear_attention import linear_state
from linfusion.kernels.linear_attention.common import LinearState
from linfusion.kernels.window_attention.arguments import Pair, check_alike


def check_features(
    q: Tensor, phi_q: Tensor, phi_k: Tensor, rotated: Pair | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of the denominator, then those of the numerator.

    Raises:
        ValueError: one does not fit q [B, N, H, D]; the message names it.
    """
    if rotated is None:
        rotated = phi_q, phi_k
    elif not isinstance(rotated, (tuple, list)) or len(rotated) != 2:
        raise ValueError(
            f"rotated: expected None or a pair of features [B, N, H, F], got "
            f"{type(rotated).__name__}"
        )
    named = zip(
        ("phi_q", "phi_k", "rotated phi_q", "rotated phi_k"),
        (phi_q, phi_k, *rotated),
        strict=True,
    )
    for name, x in named:
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor [B, N, H, F], got {type(x).__name__}")
        if x.dim() != 4 or x.shape[:3] != q.shape[:3] or x.shape[3] < 1:
            raise ValueError(
                f"{name}: expected features {tuple(q.shape[:3])} × F as in q, got shape "
                f"{tuple(x.shape)}"
            )
        if x.shape[3] != phi_q.shape[3]:
            raise ValueError(
                f"{name}: expected the {phi_q.shape[3]} features of phi_q, got {x.shape[3]}"
            )
        check_alike(x, name, q)
    return phi_q, phi_k, *rotated


def check_weight(log_weight: Tensor, q: Tensor) -> None:
    """Raise ValueError where `log_weight` is not one number a head of q."""
    if not isinstance(log_weight, Tensor) or not log_weight.is_floating_point():
        got = log_weight.dtype if isinstance(log_weight, Tensor) else type(log_weight).__name__
        raise ValueError(f"log_weight: expected a floating tensor [H], got {got}")
    if log_weight.shape != q.shape[2:3]:
        raise ValueError(
            f"log_weight: expected one number for each of {q.shape[2]} heads, got shape "
            f"{tuple(log_weight.shape)}"
        )
    check_device(log_weight, "log_weight", q, "q")


def state_of(phi_k: Tensor, rotated_k: Tensor, v: Tensor, impl: str | None) -> LinearState:
    """Means of φ(k)ᵀ v, of the numerator's features, and of φ(k), of the denominator's."""
    state = linear_state(rotated_k, v, feature_map="identity", impl=impl)
    if rotated_k is phi_k:
        return state
    return state._replace(k_mean=phi_k.mean(1, dtype=accumulator(phi_k)))


def join(
    near: Pair,
    phi_q: Tensor,
    rotated_q: Tensor,
    state: LinearState,
    log_weight: Tensor,
    left_out: Pair | None,
    impl: str,
) -> Pair:
    """Output and log-sum-exp of near and far together.

    Args:
        near: those of the near part.
        phi_q, rotated_q: features of the queries, of denominator and numerator.
        state: of all tokens that are far, and of those that are left out.
        log_weight: [H].
        left_out: sums over tokens of the state that are not far, divided by its count.
        impl: as chosen; "reference" leaves out nothing.
    """
    if impl == "reference":
        with without_autocast(near[0].device):
            return reference.read(*near, phi_q, rotated_q, state, log_weight)
    o, lse = near
    if left_out is None:
        left_out = lse.new_empty(len(o), 0, *o.shape[2:]), lse.new_empty(len(o), 0, o.shape[2])
    weight = log_weight.to(lse.dtype) + state.count.to(lse.dtype).log()[:, None]  # [B, H]
    return ops.join(o, lse, phi_q, rotated_q, state.kv, state.k_mean, weight, *left_out, impl=impl)
