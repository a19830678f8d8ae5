"""Hybrid attention in Triton: what launches the kernels of `triton_window` and `triton_join`.

Compiled (`make aot`) and compared with the reference in Triton's interpreter, never run on a GPU.
Features have up to 128 columns here, which `hybrid_attention` sees to.
"""

from __future__ import annotations

from functools import lru_cache
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
from linfusion.kernels.launch import Launch, Target, pieces, rows, target_of
from linfusion.kernels.window_attention.triton.launch import (
    Layouts,
    Plan,
    dots,
    layouts,
    start,
    step_of,
    strided,
    window_arguments,
)

__all__ = ["Launch", "Target", "join", "window_sum", "window_sum_backward"]

# Tokens of a program that joins; on AMD two warps share them in instructions of 32 rows.
JOINED, JOINED_ON_AMD = 32, 64
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
    num = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    den = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
    choices = (grid, radius, shape, scale, tiled)
    plan = _plan(target, "fwd", v.dtype, v.device, choices, layouts(q=phi_q, k=phi_k, v=v))
    args = {"Q": phi_q, "K": phi_k, "V": v, "NUM": num, "DEN": den}
    start(target, hybrid_sum_fwd, plan.programs, plan, args | plan.fixed)
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
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (phi_q, phi_k, v))
    choices = (grid, radius, shape, scale, tiled)
    given = {"K": phi_k, "V": v, "DNUM": dnum, "DDEN": dden}
    plan = _plan(target, "bwd_q", v.dtype, v.device, choices, layouts(k=phi_k, v=v))
    start(target, hybrid_sum_bwd_q, plan.programs, plan, given | {"DQ": dq} | plan.fixed)

    where = layouts(q=phi_q, k=phi_k, v=v)
    plan = _plan(target, "bwd_kv", v.dtype, v.device, choices, where)
    args = given | {"Q": phi_q, "DK": dk, "DV": dv}
    start(target, hybrid_sum_bwd_kv, plan.programs, plan, args | plan.fixed)
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
    joined, total = torch.empty_like(o), torch.empty_like(lse)
    args: dict[str, Any] = {"NEAR": o, "LSE": lse, "PHI": phi_q, "ROTATED": rotated_q, "KV": kv}
    args |= {"K_MEAN": k_mean, "WEIGHT": log_weight, "NUM": num, "DEN": den, "OUT": joined}
    args |= {"TOTAL": total, "EXCLUDED": num.shape[1] > 0, "SAME": same}
    plan = _join_plan(target, o.dtype, o.shape[3], layouts(p=phi_q, r=rotated_q))
    start(target, hybrid_join_fwd, plan.programs, plan, args | plan.fixed)
    return joined, total


@lru_cache(maxsize=256)
def _plan(
    target: Target,
    kernel: str,
    dtype: torch.dtype,
    device: torch.device,
    choices: tuple[tuple[int, ...], float, str, float, bool],
    where: Layouts,
) -> Plan:
    """The plan of a sum over windows, for the tensors of those layouts: values last."""
    grid, radius, shape, scale, tiled = choices
    features, (batch, _, heads, d) = where[0][1][3], where[-1][1]
    step = step_of(target, kernel, max(features, d), dtype)
    args: dict[str, Any] = {"heads": heads, "scale": float(scale), "F": features}
    align, strides = strided(where)
    args |= strides
    args["FA"], args["FB"] = pieces(features, step.columns)
    tiles, window = window_arguments(grid, radius, shape, tiled, device)
    args |= dots(d, step, align, target, dtype)
    return Plan(batch * heads * tiles * (64 // step.held), step, args | window, {})


@lru_cache(maxsize=256)
def _join_plan(target: Target, dtype: torch.dtype, d: int, where: Layouts) -> Plan:
    batch, tokens, heads, features = where[0][1]
    held = JOINED_ON_AMD if target.vendor == "hip" else JOINED
    step = step_of(target, "fwd", d, dtype)._replace(held=held, stages=1)
    align, strides = strided(where)
    args: dict[str, Any] = {"tokens": tokens, "heads": heads, "F": features, "BF": READ}
    args |= strides
    args |= dots(d, step, align, target, dtype)
    return Plan(batch * heads * triton.cdiv(tokens, held), step, args, {})
