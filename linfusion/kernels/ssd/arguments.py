"""What the scans take: every argument is checked, and a raw step becomes the one that is used."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels import library

IMPLEMENTATIONS = ("reference", "blocked", "triton")
WIDEST = 128  # channels of a head and features of a state that the Triton kernels take


def steps_of(
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


def skip_of(D: Tensor, x: Tensor) -> Tensor:
    """[H, P]."""
    return D if D.dim() == 2 else D[:, None].expand(x.shape[-2:])


def gated(y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    return (y.to(dtype) * F.silu(z.to(dtype))).to(y.dtype)


def check_tensor(t: Tensor, name: str, axes: str, x: Tensor) -> None:
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


def check_shape(t: Tensor, name: str, axes: str, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(t, name, axes, x)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected {axes} = {shape}, got {tuple(t.shape)}")


def check_inputs(
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

    check_tensor(x, "x", axes("H", "P"), x)
    tokens, (heads, channels) = tuple(x.shape[:-2]), x.shape[-2:]
    check_shape(dt, "dt", axes("H"), x, (*tokens, heads))
    check_shape(A, "A", "[H]", x, (heads,))
    check_tensor(B, "B", axes("G", "N"), x)
    groups, features = B.shape[-2:]
    check_shape(B, "B", axes("G", "N"), x, (*tokens, groups, features))
    if heads % groups:
        raise ValueError(f"B: expected a number of groups that divides {heads} heads, got {groups}")
    check_shape(C, "C", axes("G", "N"), x, (*tokens, groups, features))
    if isinstance(D, Tensor) and D.dim() == 2:
        check_shape(D, "D", "[H, P]", x, (heads, channels))
    elif D is not None:
        check_shape(D, "D", "[H]", x, (heads,))
    if z is not None:
        check_shape(z, "z", axes("H", "P"), x, (*tokens, heads, channels))
    if dt_bias is not None:
        check_shape(dt_bias, "dt_bias", "[H]", x, (heads,))


def check_states(states: Tensor, name: str, x: Tensor, B: Tensor) -> None:
    shape = (x.shape[0], *x.shape[-2:], B.shape[-1])
    check_shape(states, name, "[B, H, P, N]", x, shape)


def check_seq_idx(seq_idx: Tensor, x: Tensor) -> None:
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


def check_count(chunk_size: int) -> None:
    if not isinstance(chunk_size, (int, torch.SymInt)) or isinstance(chunk_size, bool):
        raise ValueError(f"chunk_size: expected an integer of at least 1, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer of at least 1, got {chunk_size}")


def check_bool(value: bool, name: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def checked_limit(limit: tuple[float, float]) -> tuple[float, float]:
    pair = tuple(limit) if isinstance(limit, (tuple, list)) else ()
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in pair)
    # NaN fails every comparison.
    if len(pair) != 2 or not numbers or not 0 <= pair[0] <= pair[1] or math.isinf(pair[0]):
        raise ValueError(
            "dt_limit: expected (smallest, largest), 0 <= smallest <= largest, the smallest "
            f"finite, got {limit!r}"
        )
    return float(pair[0]), float(pair[1])


def implementation_for(impl: str | None, x: Tensor, B: Tensor, dtype: torch.dtype) -> str:
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
