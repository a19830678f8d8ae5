"""The scan as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.library import without_autocast
from linfusion.kernels.ssd import ops, reference
from linfusion.kernels.ssd.arguments import (
    check_bool,
    check_count,
    check_inputs,
    check_states,
    checked_limit,
    implementation_for,
    skip_of,
    steps_of,
)
from linfusion.kernels.ssd.common import LONGEST, TRITON_CHUNKS, Choices

Pair = tuple[Tensor, Tensor]


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int | None = ...,
    D: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    reverse: bool = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int | None = ...,
    D: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[True],
    reverse: bool = ...,
    impl: str | None = ...,
) -> Pair: ...


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
    impl: str | None = None,
) -> Tensor | Pair:
    """The selective state-space scan of Mamba-2 (Dao & Gu 2024, Transformers are SSMs, eq. 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,  y_t = h_t C_t + D x_t,
    Δ = clamp(softplus(dt + dt_bias), dt_limit)

    Head h reads group h // (H / G) of B and C. States, decays and sums are float32 (float64 for
    float64 inputs). Tensors are taken in the dtypes they have, also under autocast.

    Args:
        x: tokens, [B, L, H, P], any strides.
        dt: steps before bias and softplus, [B, L, H].
        A: of each head, [H], at most 0 for a decay.
        B, C: keys and queries of the state, [B, L, G, N]; G divides H.
        chunk_size: tokens of a chunk, at least 1; L need not be a multiple. It changes time, memory
            and rounding, nothing else; "blocked" takes no chunk above 64, "triton" a power of two
            from 16 to 256. None is 64 in "blocked" and 256 in "triton", where every chunk is a
            state in memory and a step that waits for the one before.
        D: of the skip connection, [H] or [H, P].
        dt_bias: added to dt, [H].
        dt_softplus: whether Δ is the softplus of dt + dt_bias, or that itself.
        dt_limit: smallest and largest Δ; the smallest is finite and at least 0.
        initial_states: before the first token that is scanned, [B, H, P, N].
        return_final_states: also return the state after the last token that is scanned.
        reverse: scan from the last token to the first.
        impl: "reference" (the recurrence), "blocked" (chunks, any device) or "triton" (on a GPU; P
            and N up to 128, no float64). None takes "triton" where it runs, else "blocked". A named
            implementation is used or refused, never replaced by another.

    Returns:
        y [B, L, H, P] in the dtype of x, contiguous; with `return_final_states`, (y, h) with h
        [B, H, P, N] float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
        ImportError: impl="triton" without triton.
    """
    check_inputs(x, dt, A, B, C, D, dt_bias, ("B", "L"))
    limit = checked_limit(dt_limit)
    if chunk_size is not None:
        check_count(chunk_size)
    if initial_states is not None:
        check_states(initial_states, "initial_states", x, B)
    for value, name in (
        (dt_softplus, "dt_softplus"),
        (return_final_states, "return_final_states"),
        (reverse, "reverse"),
    ):
        check_bool(value, name)
    dtype = accumulator(x, dt, A, B, C)
    impl = implementation_for(impl, x, B, dtype)
    if chunk_size is None:
        chunk_size = TRITON_CHUNKS[1] if impl == "triton" else LONGEST

    with without_autocast(x.device):
        step = steps_of(dt, dt_bias, dt_softplus, limit, dtype)
        skip = None if D is None else skip_of(D, x).expand(x.shape[0], *x.shape[2:])
        args = (x, step, step * A.to(dtype), B, C, skip, initial_states)
        choices = Choices(chunk_size, reverse)
        if impl == "reference":
            y, final = reference.scan(*args, choices)
        else:
            y, final = ops.ssd_scan(*args, choices, impl)
    return (y, final) if return_final_states else y


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Pair:
    """One token of `ssd_scan`; the state that comes in is not written to.

    Args:
        x: the token, [B, H, P].
        dt: its step before bias and softplus, [B, H].
        A: of each head, [H].
        B, C: [B, G, N]; G divides H.
        states: before the token, [B, H, P, N].
        D, dt_bias, dt_softplus, dt_limit: as for `ssd_scan`.

    Returns:
        (y, h): y [B, H, P] in the dtype of x, and the state after the token [B, H, P, N], float32
        (float64 for float64 inputs).

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
    """
    check_inputs(x, dt, A, B, C, D, dt_bias, ("B",))
    limit = checked_limit(dt_limit)
    check_states(states, "states", x, B)
    check_bool(dt_softplus, "dt_softplus")
    with without_autocast(x.device):
        dtype = accumulator(x, dt, A, B, C)
        step = steps_of(dt, dt_bias, dt_softplus, limit, dtype)[..., None]  # [B, H, 1]
        of_group = x.shape[1] // B.shape[1]
        k, q = (t.to(dtype).repeat_interleave(of_group, 1) for t in (B, C))  # [B, H, N]
        keep = (step * A.to(dtype)[:, None]).exp()[..., None]
        x_ = x.to(dtype)
        h = keep * states.to(dtype) + (step * x_)[..., None] * k[:, :, None]
        y = (h @ q[..., None])[..., 0]
        if D is not None:
            y = y + skip_of(D, x).to(dtype) * x_
        return y.to(x.dtype), h
