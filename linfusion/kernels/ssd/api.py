"""The scan as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels import library
from linfusion.kernels.library import without_autocast
from linfusion.kernels.ssd import ops, reference
from linfusion.kernels.ssd.common import accumulator, segments

Pair = tuple[Tensor, Tensor]

IMPLEMENTATIONS = ("reference", "blocked", "triton")
WIDEST = 128  # channels of a head and features of a state that the Triton kernels take


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
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
    chunk_size: int,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
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
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
    impl: str | None = None,
) -> Tensor | Pair:
    """The selective state-space scan of Mamba-2 (Dao & Gu 2024, Transformers are SSMs, eq. 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,  y_t = (h_t C_t + D x_t) · silu(z_t),
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
            from 16 to 256.
        D: of the skip connection, [H] or [H, P].
        z: gate, [B, L, H, P].
        dt_bias: added to dt, [H].
        dt_softplus: whether Δ is the softplus of dt + dt_bias, or that itself.
        dt_limit: smallest and largest Δ; the smallest is finite and at least 0.
        initial_states: before the first token that is scanned, [B, H, P, N].
        seq_idx: which of the sequences packed in a row a token is of, integers [B, L]. The state
            is reset where it changes; the initial state is that of index 0.
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
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, ("B", "L"))
    limit = _limit(dt_limit)
    _check_count(chunk_size)
    if initial_states is not None:
        _check_states(initial_states, "initial_states", x, B)
    if seq_idx is not None:
        _check_seq_idx(seq_idx, x)
    for value, name in (
        (dt_softplus, "dt_softplus"),
        (return_final_states, "return_final_states"),
        (reverse, "reverse"),
    ):
        _check_bool(value, name)
    dtype = accumulator(x, dt, A, B, C)
    impl = _implementation(impl, x, B, dtype)

    with without_autocast(x.device):
        step = _steps(dt, dt_bias, dt_softplus, limit, dtype)
        skip = None if D is None else _skip(D, x).expand(x.shape[0], *x.shape[2:])
        seg = None if seq_idx is None else segments(seq_idx, reverse)
        args = (x, step, step * A.to(dtype), B, C, skip, initial_states, seg)
        if impl == "reference":
            y, final = reference.scan(*args, reverse)
        else:
            y, final = ops.ssd_scan(*args, chunk_size, reverse, impl)
        y = y if z is None else _gated(y, z, dtype)
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
    z: Tensor | None = None,
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
        z: gate, [B, H, P].

    Returns:
        (y, h): y [B, H, P] in the dtype of x, and the state after the token [B, H, P, N], float32
        (float64 for float64 inputs).

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, ("B",))
    limit = _limit(dt_limit)
    _check_states(states, "states", x, B)
    _check_bool(dt_softplus, "dt_softplus")
    with without_autocast(x.device):
        dtype = accumulator(x, dt, A, B, C)
        step = _steps(dt, dt_bias, dt_softplus, limit, dtype)[..., None]  # [B, H, 1]
        of_group = x.shape[1] // B.shape[1]
        k, q = (t.to(dtype).repeat_interleave(of_group, 1) for t in (B, C))  # [B, H, N]
        keep = (step * A.to(dtype)[:, None]).exp()[..., None]
        x_ = x.to(dtype)
        h = keep * states.to(dtype) + (step * x_)[..., None] * k[:, :, None]
        y = (h @ q[..., None])[..., 0]
        if D is not None:
            y = y + _skip(D, x).to(dtype) * x_
        if z is not None:
            y = _gated(y, z, dtype)
        return y.to(x.dtype), h


def _steps(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    limit: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    return step.clamp(*limit)


def _skip(D: Tensor, x: Tensor) -> Tensor:
    """[H, P]."""
    return D if D.dim() == 2 else D[:, None].expand(x.shape[-2:])


def _gated(y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    return (y.to(dtype) * F.silu(z.to(dtype))).to(y.dtype)


def _check_tensor(t: Tensor, name: str, axes: str, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: expected a tensor {axes}, got {type(t).__name__}")
    if not t.is_floating_point():
        raise ValueError(
            f"{name}: expected a real floating dtype (float16, bfloat16, float32, float64), "
            f"got {t.dtype}"
        )
    if t.dim() != axes.count(",") + 1:
        count = axes.count(",") + 1
        noun = "axis" if count == 1 else "axes"
        raise ValueError(f"{name}: expected {count} {noun} {axes}, got shape {tuple(t.shape)}")
    if t.numel() == 0:
        raise ValueError(
            f"{name}: expected every axis of {axes} to be at least 1, got shape {tuple(t.shape)}"
        )
    if isinstance(x, Tensor) and t.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {t.device}")


def _check_shape(t: Tensor, name: str, axes: str, x: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(t, name, axes, x)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected {axes} = {shape}, got {tuple(t.shape)}")


def _check_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    leading: tuple[str, ...],
) -> None:
    def axes(*names: str) -> str:
        return f"[{', '.join((*leading, *names))}]"

    _check_tensor(x, "x", axes("H", "P"), x)
    tokens, (heads, channels) = tuple(x.shape[:-2]), x.shape[-2:]
    _check_shape(dt, "dt", axes("H"), x, (*tokens, heads))
    _check_shape(A, "A", "[H]", x, (heads,))
    _check_tensor(B, "B", axes("G", "N"), x)
    groups, features = B.shape[-2:]
    _check_shape(B, "B", axes("G", "N"), x, (*tokens, groups, features))
    if heads % groups:
        raise ValueError(f"B: expected a number of groups that divides {heads} heads, got {groups}")
    _check_shape(C, "C", axes("G", "N"), x, (*tokens, groups, features))
    if isinstance(D, Tensor) and D.dim() == 2:
        _check_shape(D, "D", "[H, P]", x, (heads, channels))
    elif D is not None:
        _check_shape(D, "D", "[H]", x, (heads,))
    if z is not None:
        _check_shape(z, "z", axes("H", "P"), x, (*tokens, heads, channels))
    if dt_bias is not None:
        _check_shape(dt_bias, "dt_bias", "[H]", x, (heads,))


def _check_states(states: Tensor, name: str, x: Tensor, B: Tensor) -> None:
    shape = (x.shape[0], *x.shape[-2:], B.shape[-1])
    _check_shape(states, name, "[B, H, P, N]", x, shape)


def _check_seq_idx(seq_idx: Tensor, x: Tensor) -> None:
    if not isinstance(seq_idx, Tensor):
        raise ValueError(
            f"seq_idx: expected an integer tensor [B, L], got {type(seq_idx).__name__}"
        )
    whole = (torch.int8, torch.int16, torch.int32, torch.int64)
    if seq_idx.dtype not in whole:
        raise ValueError(f"seq_idx: expected a signed integer dtype, got {seq_idx.dtype}")
    if tuple(seq_idx.shape) != tuple(x.shape[:2]):
        raise ValueError(
            f"seq_idx: expected [B, L] = {tuple(x.shape[:2])}, got {tuple(seq_idx.shape)}"
        )
    if seq_idx.device != x.device:
        raise ValueError(f"seq_idx: expected the device of x, {x.device}, got {seq_idx.device}")


def _check_count(chunk_size: int) -> None:
    if not isinstance(chunk_size, (int, torch.SymInt)) or isinstance(chunk_size, bool):
        raise ValueError(f"chunk_size: expected an integer of at least 1, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer of at least 1, got {chunk_size}")


def _check_bool(value: bool, name: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _limit(limit: tuple[float, float]) -> tuple[float, float]:
    pair = tuple(limit) if isinstance(limit, (tuple, list)) else ()
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in pair)
    # NaN fails every comparison.
    if len(pair) != 2 or not numbers or not 0 <= pair[0] <= pair[1] or math.isinf(pair[0]):
        raise ValueError(
            "dt_limit: expected (smallest, largest), 0 <= smallest <= largest, the smallest "
            f"finite, got {limit!r}"
        )
    return float(pair[0]), float(pair[1])


def _implementation(impl: str | None, x: Tensor, B: Tensor, dtype: torch.dtype) -> str:
    channels, features = x.shape[3], B.shape[3]
    fits = max(channels, features) <= WIDEST
    double = dtype == torch.float64
    if impl is None:
        on_gpu = x.device.type == "cuda"  # ROCm calls itself cuda too
        return "triton" if on_gpu and library.HAS_TRITON and fits and not double else "blocked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if double:
            raise ValueError(
                "impl: 'triton' takes float16, bfloat16 and float32, got float64; 'blocked' and "
                "'reference' take it"
            )
        if not fits:
            raise ValueError(
                f"impl: 'triton' takes channels and features up to {WIDEST}, got {channels} and "
                f"{features}; 'blocked' and 'reference' take any"
            )
        library.check_triton(x.device)
    return impl
