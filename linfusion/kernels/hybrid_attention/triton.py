"""Hybrid attention in Triton: what launches the kernels of `triton_window` and `triton_join`.

Compiled (`make aot`) and compared with the reference in Triton's interpreter, never run on a GPU.
Features have up to 128 columns here, which `hybrid_attention` sees to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from linfusion.kernels.hybrid_attention.triton_join import hybrid_join_fwd
from linfusion.kernels.hybrid_attention.triton_window import (
    hybrid_sum_bwd_kv,
    hybrid_sum_bwd_q,
    hybrid_sum_fwd,
)
from linfusion.kernels.launch import Launch, Target, named, rows, strides_of, target_of
from linfusion.kernels.window_attention.triton.configs import Step, pieces
from linfusion.kernels.window_attention.triton.launch import (
    dots,
    start,
    step_of,
    window_arguments,
)

__all__ = ["Launch", "Target", "join", "window_sum", "window_sum_backward"]

JOINED = 64  # tokens of a program that joins
READ = 32  # features that it takes at a time


def window_sum(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """As of `blocked`, float32."""
    target = target or target_of(v)
    phi_q, phi_k, v = rows(phi_q), rows(phi_k), rows(v)
    batch, _, heads, _ = v.shape
    num = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    den = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
    step = step_of(target, "fwd", max(phi_q.shape[3], v.shape[3]), v)
    args = {"Q": phi_q, "K": phi_k, "V": v, "NUM": num, "DEN": den}
    args |= _sizes(("q", phi_q), ("k", phi_k), ("v", v), step=step, target=target, scale=scale)
    tiles, window = window_arguments(grid, radius, shape, tiled, v)
    start(target, hybrid_sum_fwd, batch * heads * tiles * (64 // step.held), step, args | window)
    return num, den


def window_sum_backward(
    dnum: Tensor,
    dden: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As of `blocked`."""
    target = target or target_of(v)
    phi_q, phi_k, v = rows(phi_q), rows(phi_k), rows(v)
    dnum, dden = dnum.contiguous(), dden.contiguous()
    batch, _, heads, _ = v.shape
    width = max(phi_q.shape[3], v.shape[3])
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (phi_q, phi_k, v))
    tiles, window = window_arguments(grid, radius, shape, tiled, v)
    given = {"K": phi_k, "V": v, "DNUM": dnum, "DDEN": dden}

    step = step_of(target, "bwd_q", width, v)
    args = given | {"DQ": dq}
    args |= _sizes(("k", phi_k), ("v", v), step=step, target=target, scale=scale)
    start(target, hybrid_sum_bwd_q, batch * heads * tiles * (64 // step.held), step, args | window)

    step = step_of(target, "bwd_kv", width, v)
    args = given | {"Q": phi_q, "DK": dk, "DV": dv}
    args |= _sizes(("q", phi_q), ("k", phi_k), ("v", v), step=step, target=target, scale=scale)
    start(target, hybrid_sum_bwd_kv, batch * heads * tiles * (64 // step.held), step, args | window)
    return dq, dk, dv


def join(
    o: Tensor,
    lse: Tensor,
    phi_q: Tensor,
    rotated_q: Tensor,
    kv: Tensor,
    k_mean: Tensor,
    log_weight: Tensor,
    num: Tensor,
    den: Tensor,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """As of `blocked`, in one launch."""
    target = target or target_of(o)
    same = rotated_q.data_ptr() == phi_q.data_ptr() and rotated_q.stride() == phi_q.stride()
    phi_q = rows(phi_q)
    rotated_q = phi_q if same else rows(rotated_q)
    o, lse, kv, k_mean, log_weight, num, den = (
        x.contiguous() for x in (o, lse, kv, k_mean, log_weight, num, den)
    )
    batch, tokens, heads, d = o.shape
    joined, total = torch.empty_like(o), torch.empty_like(lse)
    align, strides = strides_of(phi_q, rotated_q)
    step = step_of(target, "fwd", d, o)._replace(held=JOINED, stages=1)
    args: dict[str, Any] = {"NEAR": o, "LSE": lse, "PHI": phi_q, "ROTATED": rotated_q, "KV": kv}
    args |= {"K_MEAN": k_mean, "WEIGHT": log_weight, "NUM": num, "DEN": den, "OUT": joined}
    args |= {"TOTAL": total, "tokens": tokens, "heads": heads, "F": phi_q.shape[3], "BF": READ}
    for name, stride in zip(("p", "r"), strides, strict=True):
        args |= named(name, stride)
    args |= dots(d, step, align, target, o)
    args |= {"EXCLUDED": num.shape[1] > 0, "SAME": same}
    start(target, hybrid_join_fwd, batch * heads * triton.cdiv(tokens, JOINED), step, args)
    return joined, total


def _sizes(
    *tensors: tuple[str, Tensor], step: Step, target: Target, scale: float
) -> dict[str, Any]:
    """Strides by name, columns in pieces, and what the products are taken in."""
    align, strides = strides_of(*(x for _, x in tensors))
    sides = {name: x.shape[3] for name, x in tensors}
    args: dict[str, Any] = {"heads": tensors[0][1].shape[2], "scale": float(scale)}
    for (name, _), stride in zip(tensors, strides, strict=True):
        args |= named(name, stride)
    args |= dots(sides["v"], step, align, target, dict(tensors)["v"])
    first, second = pieces(sides["k"], step.columns)
    return args | {"F": sides["k"], "FA": first, "FB": second}
