# The bodies of kernels are Triton's language; Python's types do not describe them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Triton kernels that add, gate and norm groups of channels in one pass.

The conventions are those of `linfusion.kernels.elementwise.triton`; a row is a group of channels of
a token. Interpreted on a CPU and compiled ahead of time; never run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import (
    Launch,
    Target,
    cdiv,
    power_of_2,
    stride_arguments,
    target_of,
)

_HELD = 4096  # elements that a program holds, in 4 warps 32 a thread; backward passes half


@triton.jit
def summed(X, OTHER, at, at_other, mask, scale, SUM: tl.constexpr):
    """What is normed before its gate."""
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if SUM:
        x += tl.load(OTHER + at_other, mask=mask, other=0.0).to(tl.float32)
    return x * scale


@triton.jit(
    do_not_specialize=[
        "rows", "tokens", "groups", "scale", "eps",
        "x_sb", "x_sn", "x_sh", "o_sb", "o_sn", "o_sh", "z_sb", "z_sn", "z_sh",
    ]
)  # fmt: skip
def gated_rms_norm_fwd(
    X,  # [B, L, G, D]
    OTHER,  # [B, L, G, D]
    Z,  # [B, L, G, D]
    WEIGHT,  # [G, D] contiguous, or [D] of all where SHARED
    OUT,  # [B, L, G, D], contiguous
    rows,
    tokens,
    groups,
    scale,
    eps,
    x_sb,
    x_sn,
    x_sh,
    o_sb,
    o_sn,
    o_sh,
    z_sb,
    z_sn,
    z_sh,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SUM: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    GATE_LAST: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """BR rows, each a group of a token."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    d = tl.arange(0, BD)  # [BD]
    mask = (r < rows)[:, None] & (d < D)[None, :]
    b, n, g = r // groups // tokens, r // groups % tokens, r % groups
    at = (b * x_sb + n * x_sn + g * x_sh)[:, None] * ALIGN + d[None, :]
    at_other = (b * o_sb + n * o_sn + g * o_sh)[:, None] * ALIGN + d[None, :]
    y = summed(X, OTHER, at, at_other, mask, scale, SUM)
    if GATE:
        at = (b * z_sb + n * z_sn + g * z_sh)[:, None] * ALIGN + d[None, :]
        z = tl.load(Z + at, mask=mask, other=0.0).to(tl.float32)
        gate = z * tl.sigmoid(z)
        if not GATE_LAST:
            y *= gate
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
        if SHARED:
            w = tl.load(WEIGHT + d, mask=d < D, other=0.0)[None, :]
        else:
            w = tl.load(WEIGHT + g[:, None] * D + d[None, :], mask=mask, other=0.0)
        y *= w.to(tl.float32)
    if GATE and GATE_LAST:
        y *= gate
    tl.store(OUT + r[:, None] * D + d[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "rows", "share", "tokens", "groups", "scale", "eps",
        "x_sb", "x_sn", "x_sh", "o_sb", "o_sn", "o_sh", "z_sb", "z_sn", "z_sh",
        "g_sb", "g_sn", "g_sh",
    ]
)  # fmt: skip
def gated_rms_norm_bwd(
    X,  # [B, L, G, D]
    OTHER,  # [B, L, G, D]
    Z,  # [B, L, G, D]
    WEIGHT,  # [G, D] contiguous, or [D] of all where SHARED
    DY,  # [B, L, G, D]
    DX,  # [B, L, G, D], contiguous; of OTHER as well
    DZ,  # [B, L, G, D], contiguous
    PARTIAL,  # [programs, G, D] float32: dweight of `share` tokens
    rows,
    share,
    tokens,
    groups,
    scale,
    eps,
    x_sb,
    x_sn,
    x_sh,
    o_sb,
    o_sn,
    o_sh,
    z_sb,
    z_sn,
    z_sh,
    g_sb,
    g_sn,
    g_sh,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SUM: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    GATE_LAST: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of one group of `share` tokens, BR at a time."""
    pid = tl.program_id(0).to(tl.int64)
    g = pid % groups
    own = pid // groups
    d = tl.arange(0, BD)  # [BD]
    if NORM:
        if not SHARED:
            WEIGHT += g * D
        w = tl.load(WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BD], tl.float32)
    for start in range(0, share, BR):
        t = own * share + start + tl.arange(0, BR)  # [BR], of all batches
        mask = (t < rows)[:, None] & (d < D)[None, :]
        b, n = t // tokens, t % tokens
        at = (b * x_sb + n * x_sn + g * x_sh)[:, None] * ALIGN + d[None, :]
        at_other = (b * o_sb + n * o_sn + g * o_sh)[:, None] * ALIGN + d[None, :]
        y = summed(X, OTHER, at, at_other, mask, scale, SUM)
        at = (b * g_sb + n * g_sn + g * g_sh)[:, None] * ALIGN + d[None, :]
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        at = (t * groups + g)[:, None] * D + d[None, :]  # of what is contiguous
        if GATE:
            at_z = (b * z_sb + n * z_sn + g * z_sh)[:, None] * ALIGN + d[None, :]
            z = tl.load(Z + at_z, mask=mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            gate = z * s
            slope = s * (1 + z * (1 - s))
        if NORM:
            v = y
            if GATE and not GATE_LAST:
                v *= gate
            rms = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
            h = v * rms
            if GATE and GATE_LAST:
                dz = dy * h * w * slope
                dy *= gate
            dw += tl.sum(dy * h, 0)
            dy *= w
            dy = (dy - h * (tl.sum(dy * h, 1) / D)[:, None]) * rms
        if GATE:
            if not (NORM and GATE_LAST):
                dz = dy * y * slope
                dy *= gate
            tl.store(DZ + at, dz.to(DZ.dtype.element_ty), mask=mask)
        tl.store(DX + at, (dy * scale).to(DX.dtype.element_ty), mask=mask)
    if NORM:
        tl.store(PARTIAL + (own * groups + g) * D + d, dw, mask=d < D)


def gated_rms_norm(
    x: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    gate_last: bool,
    *,
    target: Target | None = None,
) -> Tensor:
    """As `reference.gated_rms_norm`."""
    target = target or target_of(x)
    batch, tokens, groups, _ = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args = _arguments(x, other, z, weight, eps, scale, gate_last)
    rows = batch * tokens * groups
    args |= {"OUT": out, "rows": rows}
    _launch(target, gated_rms_norm_fwd, cdiv(rows, args["BR"]), args, _HELD)
    return out


def gated_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    gate_last: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and the other), z and weight; of what there is not, empty."""
    target = target or target_of(x)
    batch, tokens, groups, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = x.new_empty(0) if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    args = _arguments(x, other, z, weight, eps, scale, gate_last, dy)
    rows, held = batch * tokens, args["BR"]
    blocks = cdiv(rows, held)
    share = cdiv(blocks, min(blocks, cdiv(2 * target.multiprocessors, groups))) * held
    programs = cdiv(rows, share)
    size = 0 if weight is None else (programs, groups, dim)
    partial = torch.empty(size, dtype=torch.float32, device=x.device)
    args |= {"DX": dx, "DZ": dz, "PARTIAL": partial, "rows": rows, "share": share}
    _launch(target, gated_rms_norm_bwd, programs * groups, args, _HELD // 2)
    return dx, dz, partial if weight is None else partial.sum(0).to(weight.dtype)


def _arguments(
    x: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    gate_last: bool,
    dy: Tensor | None = None,
) -> dict[str, Any]:
    tensors = {"x": x, "o": x if other is None else other, "z": x if z is None else z}
    tensors |= {} if dy is None else {"g": dy}
    read = {name: t if t.stride(-1) == 1 else t.contiguous() for name, t in tensors.items()}
    args: dict[str, Any] = {"X": read["x"], "OTHER": read["o"], "Z": read["z"]}
    args |= {} if dy is None else {"DY": read["g"]}
    shared = weight is not None and (weight.shape[0] == 1 or weight.stride(0) == 0)
    if weight is not None:
        weight = (weight[0] if shared else weight).contiguous()
    dim, held = x.shape[3], _HELD if dy is None else _HELD // 2
    block = power_of_2(dim)
    args |= {"WEIGHT": x if weight is None else weight, "eps": eps, "scale": scale}
    args |= {"tokens": x.shape[1], "groups": x.shape[2]} | stride_arguments(**read)
    args |= {"D": dim, "BD": block, "BR": max(1, held // block)}
    args |= {"SUM": other is not None, "GATE": z is not None, "NORM": weight is not None}
    return args | {"GATE_LAST": gate_last, "SHARED": shared}


def _launch(target: Target, kernel: Any, programs: int, args: dict[str, Any], held: int) -> None:
    warps = min(8, 4 * cdiv(args["BD"] * args["BR"], held))
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    target.launch(Launch(kernel, programs, args, options))
