"""What the scans take: every argument is checked, and a raw step becomes the one that is used."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels.common import check_device, check_tensor, implementation

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


def check_shape(t: Tensor, name: str, axes: str, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(t, name, axes)
    check_device(t, name, x, "x")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected {axes} = {shape}, got {tuple(t.shape)}")


def check_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    leading: tuple[str, ...],
) -> None:
    def axes(*names: str) -> str:
        return f"[{', '.join((*leading, *names))}]"

    check_tensor(x, "x", axes("H", "P"))
    tokens, (heads, channels) = tuple(x.shape[:-2]), x.shape[-2:]
    check_shape(dt, "dt", axes("H"), x, (*tokens, heads))
    check_shape(A, "A", "[H]", x, (heads,))
    check_tensor(B, "B", axes("G", "N"))
    groups, features = B.shape[-2:]
    check_shape(B, "B", axes("G", "N"), x, (*tokens, groups, features))
    if heads % groups:
        raise ValueError(f"B: expected a number of groups that divides {heads} heads, got {groups}")
    check_shape(C, "C", axes("G", "N"), x, (*tokens, groups, features))
    if isinstance(D, Tensor) and D.dim() == 2:
        check_shape(D, "D", "[H, P]", x, (heads, channels))
    elif D is not None:
        check_shape(D, "D", "[H]", x, (heads,))
    if dt_bias is not None:
        check_shape(dt_bias, "dt_bias", "[H]", x, (heads,))


def check_states(states: Tensor, name: str, x: Tensor, B: Tensor) -> None:
    shape = (x.shape[0], *x.shape[-2:], B.shape[-1])
    check_shape(states, name, "[B, H, P, N]", x, shape)


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

    def unfit() -> str | None:
        if max(channels, features) <= WIDEST:
            return None
        return f"'triton' takes channels and features up to {WIDEST}, got {channels} and {features}"

    return implementation(impl, x, dtype, unfit)
