"""Linear attention, also of tensors that lie in memory as users' may."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ptx.comparing import TOLERANCE, Comparison, Draw, compare
from linfusion.kernels.launch import Target


def linear(
    target: Target,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    heads: int,
    d: int,
    *,
    dv: int | None = None,
    phi: str = "elu1",
    normalizer: str = "mean",
    weighted: bool = False,
    packed: bool = False,
    batch: int = 1,
) -> list[Comparison]:
    """Linear attention, forward and backward; `packed`: q, k, v are parts of one tensor."""
    from linfusion.kernels.linear_attention import reference, triton
    from linfusion.kernels.linear_attention.common import Choices

    draw = Draw(dtype)
    if packed:
        parts = draw(batch, queries, 3 * heads * d).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (heads, d)) for x in parts)
    else:
        q, k = draw(batch, queries, heads, d), draw(batch, keys, heads, d)
        v = draw(batch, keys, heads, dv or d)
    weight = None
    if weighted:
        weight = draw.uniform(batch, keys) * (draw.uniform(batch, keys) > 0.3)
    do = draw(batch, queries, heads, dv or d)
    choices = Choices(phi, normalizer, 1e-4)
    state = triton.state_forward(k, v, weight, phi, target=target)
    o = triton.read_forward(q, state, choices, v.dtype, target=target)
    gradients = triton.attention_backward(do, q, k, v, weight, state, choices, target=target)

    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    exact = reference.state_forward(k, v, None if weight is None else weight.double(), phi)
    want = reference.read_forward(q, exact, choices, torch.float64)
    wanted = torch.autograd.grad(want, (q, k, v), do.double())
    tolerance = TOLERANCE[dtype]
    found = [
        compare("kv", state.kv, exact.kv, tolerance),
        compare("k_mean", state.k_mean, exact.k_mean, max(tolerance, 1e-5)),
        compare("o", o, want, tolerance),
    ]
    for name, x, y in zip(("dq", "dk", "dv"), gradients, wanted, strict=True):
        if keys > 1 or name == "dv":  # of one key, dq and dk are 0 but for rounding
            found.append(compare(name, x, y, tolerance))
    return found


def strided(
    target: Target, dtype: torch.dtype, lay: Callable[[Draw], list[Tensor]]
) -> list[Comparison]:
    """Linear attention, forward, of tensors that lie in memory as `lay` has them."""
    from linfusion.kernels.linear_attention import reference, triton
    from linfusion.kernels.linear_attention.common import Choices

    q, k, v = lay(Draw(dtype))
    choices, tolerance = Choices("elu1", "mean", 1e-4), TOLERANCE[dtype]
    state = triton.state_forward(k, v, None, "elu1", target=target)
    o = triton.read_forward(q, state, choices, dtype, target=target)
    exact = reference.state_forward(k.double(), v.double(), None, "elu1")
    want = reference.read_forward(q.double(), exact, choices, torch.float64)
    return [compare("kv", state.kv, exact.kv, tolerance), compare("o", o, want, tolerance)]


def two_bytes_off(draw: Draw) -> list[Tensor]:
    """No address is a multiple of anything."""
    parts = draw(1, 90, 2 * 40 * 3 + 1)[..., 1:].chunk(3, -1)
    return [x.unflatten(-1, (2, 40)) for x in parts]


def heads_first(draw: Draw) -> list[Tensor]:
    return [draw(1, 3, 70, 64).transpose(1, 2) for _ in range(3)]


def every_third_token(draw: Draw) -> list[Tensor]:
    return [draw(1, 210, 2, 64)[:, ::3] for _ in range(3)]


def features_apart(draw: Draw) -> list[Tensor]:
    return [draw(1, 60, 40, 2).transpose(2, 3) for _ in range(3)]


def expanded(draw: Draw) -> list[Tensor]:
    """One key for all tokens, one value for all heads."""
    k, v = draw(1, 1, 2, 64).expand(1, 40, 2, 64), draw(1, 40, 1, 64).expand(1, 40, 2, 64)
    return [draw(1, 50, 2, 64), k, v]
