"""Windows, and what joins them with everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ptx.comparing import TOLERANCE, Comparison, Draw, compare, f32
from linfusion.kernels.launch import Target


def window(
    target: Target,
    dtype: torch.dtype,
    grid: tuple[int, ...],
    radius: float,
    heads: int,
    d: int,
    *,
    always: int = 0,
    tiled: bool = False,
    shape: str = "disc",
    cells: tuple[int, ...] = (),
    batch: int = 1,
    backward: bool = True,
) -> list[Comparison]:
    """Attention in a window; `always` keys are seen by all, `tiled` tokens come tile by tile, and
    keys that stand for `cells` follow the others that all see."""
    from linfusion.kernels.window_attention import TileOrder, reference, triton
    from linfusion.kernels.window_attention.cells import cell_grid
    from linfusion.kernels.window_attention.common import bounded

    always += math.prod(cell_grid(grid, cells)) if cells else 0
    draw, tokens = Draw(dtype), math.prod(grid)
    q, k, v, do, ka, va = (
        draw(batch, n, heads, d) for n in (tokens, tokens, tokens, tokens, always, always)
    )
    choices = (grid, bounded(radius, grid), shape, d**-0.5)
    into, out_of = _orders(TileOrder(grid) if tiled else None)
    x = (into(q), into(k), into(v), ka, va)
    o, lse = triton.attention(*x, *choices, tiled, cells, target=target)
    exact = [t.double().requires_grad_() for t in (q, k, v, ka, va)]
    want_o, want_lse = reference.attention(*exact, *choices, cells)
    tolerance = TOLERANCE[dtype]
    found = [
        compare("o", out_of(o), want_o, tolerance),
        compare("lse", out_of(lse), want_lse, max(tolerance / 10, 2e-6)),
    ]
    if backward:
        dlse = Draw(f32)(*lse.shape)
        gradients = triton.attention_backward(
            into(do), into(dlse), *x, o, lse, *choices, tiled, cells, target=target
        )
        wanted = torch.autograd.grad(
            [want_o, want_lse], exact, [do.double(), dlse.double()], allow_unused=True
        )
        for name, got, want in zip(
            ("dq", "dk", "dv", "dka", "dva"), gradients, wanted, strict=True
        ):
            if got.numel():
                got = got if name.endswith("a") else out_of(got)
                found.append(compare(name, got, want, 2 * tolerance))
    return found


def _orders(order: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From raster order into tile order and back; None leaves tokens where they are."""
    if order is None:
        return (lambda x: x), (lambda x: x)
    return order.permute, order.undo


def hybrid(
    target: Target,
    dtype: torch.dtype,
    grid: tuple[int, ...],
    radius: float,
    heads: int,
    d: int,
    features: int,
    *,
    tiled: bool = False,
) -> list[Comparison]:
    """Linear sums over windows, forward and backward, and the join that leaves them out."""
    from linfusion.kernels.hybrid_attention import reference, triton
    from linfusion.kernels.linear_attention import reference as linear_reference
    from linfusion.kernels.window_attention import TileOrder
    from linfusion.kernels.window_attention.common import bounded, coordinates
    from linfusion.kernels.window_attention.common import window as lies_in

    draw, plain, n = Draw(dtype), Draw(f32), math.prod(grid)
    into, out_of = _orders(TileOrder(grid) if tiled else None)
    phi_q, phi_k = (draw(1, n, heads, features).abs() for _ in range(2))
    v, near, lse = draw(1, n, heads, d), draw(1, n, heads, d), plain(1, n, heads)
    dnum, dden, weight = plain(1, n, heads, d), plain(1, n, heads), plain(heads)
    choices = (grid, bounded(radius, grid), "disc", 1 / n, tiled)
    x = (into(phi_q), into(phi_k), into(v))
    num, den = triton.window_sum(*x, *choices, target=target)
    gradients = triton.window_sum_backward(into(dnum), into(dden), *x, *choices, target=target)
    state = linear_reference.state_forward(phi_k.float(), v.float(), None, "identity")
    o, total = triton.join(
        into(near),
        into(lse),
        *(x[0], x[0]),
        *(state.kv, state.k_mean, (weight + math.log(n))[None]),
        *(num, den),
        target=target,
    )

    phi_q, phi_k, v = exact = [t.double().requires_grad_() for t in (phi_q, phi_k, v)]
    at = coordinates(grid, v.device)
    seen = lies_in([a[:, None] - a[None, :] for a in at], choices[1], "disc").double()
    w = torch.einsum("bnhf,bmhf,nm->bnhm", phi_q, phi_k, seen) / n
    want_num, want_den = torch.einsum("bnhm,bmhd->bnhd", w, v), w.sum(-1)
    wanted = torch.autograd.grad([want_num, want_den], exact, [dnum.double(), dden.double()])
    want_o, want_total = reference.joined(
        *(v, near.double(), lse.double(), phi_q, phi_k, phi_q, phi_k, weight.double()),
        *(grid, choices[1], "disc", True),
    )
    tolerance = TOLERANCE[dtype]
    named = zip(("dphi_q", "dphi_k", "dv"), gradients, wanted, strict=True)
    return [
        compare("num", out_of(num), want_num, tolerance),
        compare("den", out_of(den), want_den, tolerance),
        *(compare(name, out_of(got), want, 2 * tolerance) for name, got, want in named),
        compare("o", out_of(o), want_o, 2 * tolerance),
        compare("lse", out_of(total), want_total, tolerance),
    ]
