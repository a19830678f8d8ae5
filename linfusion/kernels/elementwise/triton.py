# The bodies of kernels are Triton's language; Python's types do not describe them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Triton kernels that read what surrounds a product once and write it once.

The conventions are those of linear attention's kernels: one grid axis, rows of any stride (divided
by the constexpr `ALIGN` that divides them all), int64 on every offset, no run-time integer
specialised on, float32 inside. A program holds `BR` rows of all channels. Backward passes compute
the statistics again, and leave sums over tokens in one row a program, added up in order.

Interpreted on a CPU and compiled ahead of time; never run on a GPU.
"""

from __future__ import annotations

import math
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

_HELD = 4096  # elements that a program holds, in 4 warps 32 a thread


@triton.jit(do_not_specialize=["rows", "x_sn", "eps", "slope"])
def norm_leaky_relu_fwd(
    X,  # [rows, C]
    WEIGHT,  # [C]
    BIAS,  # [C]
    OUT,  # [rows, C], contiguous
    rows,
    x_sn,
    eps,
    slope,
    C: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """lrelu(LN(x)) of BR rows."""
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    c = tl.arange(0, BC)  # [BC]
    mask = (n < rows)[:, None] & (c < C)[None, :]
    x = tl.load(X + n[:, None] * x_sn * ALIGN + c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C  # [BR]
    x = tl.where((c < C)[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y = x * rstd[:, None] * w + tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y = tl.where(y > 0, y, y * slope)
    tl.store(OUT + n[:, None] * C + c[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "share", "x_sn", "g_sn", "eps", "slope"])
def norm_leaky_relu_bwd(
    X,  # [rows, C]
    DY,  # [rows, C]
    WEIGHT,  # [C]
    BIAS,  # [C]
    DX,  # [rows, C], contiguous
    PARTIAL,  # [programs, 2, C] float32: dweight and dbias of `share` rows
    rows,
    share,
    x_sn,
    g_sn,
    eps,
    slope,
    C: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of `share` rows, BR at a time."""
    pid = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)  # [BC]
    there = (c < C)[None, :]
    w = tl.load(WEIGHT + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    b = tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BC], tl.float32)
    db = tl.zeros([BC], tl.float32)
    for start in range(0, share, BR):
        n = pid * share + start + tl.arange(0, BR)  # [BR]
        mask = (n < rows)[:, None] & there
        x = tl.load(X + n[:, None] * x_sn * ALIGN + c[None, :], mask=mask, other=0.0)
        dy = tl.load(DY + n[:, None] * g_sn * ALIGN + c[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        dy = dy.to(tl.float32)
        mean = tl.sum(x, 1) / C
        x = tl.where(there, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
        x *= rstd[:, None]
        dy *= tl.where(x * w + b > 0, 1.0, slope)
        dw += tl.sum(dy * x, 0)
        db += tl.sum(dy, 0)
        dy *= w
        inner = tl.sum(dy, 1) / C
        along = tl.sum(dy * x, 1) / C
        dx = (dy - inner[:, None] - x * along[:, None]) * rstd[:, None]
        tl.store(DX + n[:, None] * C + c[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    PARTIAL += pid * 2 * C
    tl.store(PARTIAL + c, dw, mask=c < C)
    tl.store(PARTIAL + C + c, db, mask=c < C)


@triton.jit
def turned(x, BR: tl.constexpr, BD: tl.constexpr):
    """(-x_1, x_0, -x_3, x_2, ...) of each row."""
    real, imaginary = tl.split(tl.reshape(x, [BR, BD // 2, 2]))
    return tl.reshape(tl.join(-imaginary, real), [BR, BD])


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "x_sb", "x_sn", "x_sh", "eps"])
def rotary_rms_norm_fwd(
    X,  # [B, N, H, D]
    WEIGHT,  # [D]
    COS,  # [N, D], contiguous
    SIN,  # [N, D], contiguous
    OUT,  # [B, N, H, D], contiguous
    rows,
    tokens,
    heads,
    x_sb,
    x_sn,
    x_sh,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The norm and rotation of BR rows, each a head of a token."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    d = tl.arange(0, BD)  # [BD]
    mask = (r < rows)[:, None] & (d < D)[None, :]
    n = r // heads % tokens
    at = r // heads // tokens * x_sb + n * x_sn + r % heads * x_sh
    x = tl.load(X + at[:, None] * ALIGN + d[None, :], mask=mask, other=0.0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    y = x * rms[:, None] * tl.load(WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    table = n[:, None] * D + d[None, :]  # [BR, BD]
    cos = tl.load(COS + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + table, mask=mask, other=0.0).to(tl.float32)
    y = y * cos + turned(y, BR, BD) * sin
    tl.store(OUT + r[:, None] * D + d[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "rows",
        "share",
        "tokens",
        "heads",
        "x_sb",
        "x_sn",
        "x_sh",
        "g_sb",
        "g_sn",
        "g_sh",
        "eps",
    ]
)
def rotary_rms_norm_bwd(
    X,  # [B, N, H, D]
    DY,  # [B, N, H, D]
    WEIGHT,  # [D]
    COS,  # [N, D], contiguous
    SIN,  # [N, D], contiguous
    DX,  # [B, N, H, D], contiguous
    PARTIAL,  # [programs, D] float32: dweight of `share` rows
    rows,
    share,
    tokens,
    heads,
    x_sb,
    x_sn,
    x_sh,
    g_sb,
    g_sn,
    g_sh,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of `share` rows, BR at a time; the rotation of a gradient is by the other angle."""
    pid = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)  # [BD]
    w = tl.load(WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BD], tl.float32)
    for start in range(0, share, BR):
        r = pid * share + start + tl.arange(0, BR)  # [BR]
        mask = (r < rows)[:, None] & (d < D)[None, :]
        n = r // heads % tokens
        b = r // heads // tokens
        at = (b * x_sb + n * x_sn + r % heads * x_sh) * ALIGN
        x = tl.load(X + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        at = (b * g_sb + n * g_sn + r % heads * g_sh) * ALIGN
        dy = tl.load(DY + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        table = n[:, None] * D + d[None, :]  # [BR, BD]
        cos = tl.load(COS + table, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(SIN + table, mask=mask, other=0.0).to(tl.float32)
        dy = dy * cos - turned(dy * sin, BR, BD)
        rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        x *= rms[:, None]
        dw += tl.sum(dy * x, 0)
        dy *= w
        dx = (dy - x * (tl.sum(dy * x, 1) / D)[:, None]) * rms[:, None]
        tl.store(DX + r[:, None] * D + d[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(PARTIAL + pid * D + d, dw, mask=d < D)


def norm_leaky_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    *,
    target: Target | None = None,
) -> Tensor:
    """As `reference.norm_leaky_relu`."""
    x = _rows(x)
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args, held = _of_rows(channels)
    align, (x_sn,) = _row_strides(x)
    args |= {"X": x, "WEIGHT": weight.contiguous(), "BIAS": bias.contiguous(), "OUT": out}
    args |= {"rows": rows, "x_sn": x_sn, "eps": eps, "slope": slope, "ALIGN": align}
    _launch(target or target_of(x), norm_leaky_relu_fwd, cdiv(rows, held), args)
    return out


def norm_leaky_relu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    target = target or target_of(x)
    x, dy = _rows(x), _rows(dy)
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args, held = _of_rows(channels)
    programs, share = _shared(rows, held, target)
    partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    align, (x_sn, g_sn) = _row_strides(x, dy)
    args |= {"X": x, "DY": dy, "WEIGHT": weight.contiguous(), "BIAS": bias.contiguous()}
    args |= {"DX": dx, "PARTIAL": partial, "rows": rows, "share": share, "ALIGN": align}
    args |= {"x_sn": x_sn, "g_sn": g_sn, "eps": eps, "slope": slope}
    _launch(target, norm_leaky_relu_bwd, programs, args)
    dweight, dbias = (part.sum(0) for part in partial.unbind(1))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def rotary_rms_norm(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    target: Target | None = None,
) -> Tensor:
    """As `reference.rotary_rms_norm`."""
    target = target or target_of(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args, held = _of_heads(dim)
    args |= _tables(x, weight, cos, sin) | {"OUT": out, "eps": eps} | stride_arguments(x=x)
    _launch(target, rotary_rms_norm_fwd, cdiv(batch * tokens * heads, held), args)
    return out


def rotary_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    target = target or target_of(x)
    x, dy = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dy))
    dim = x.shape[3]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args, held = _of_heads(dim)
    programs, share = _shared(math.prod(x.shape[:3]), held, target)
    partial = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    args |= _tables(x, weight, cos, sin) | {"DY": dy, "DX": dx, "PARTIAL": partial}
    args |= {"share": share, "eps": eps} | stride_arguments(x=x, g=dy)
    _launch(target, rotary_rms_norm_bwd, programs, args)
    return dx, partial.sum(0).to(weight.dtype)


def _tables(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Any]:
    batch, tokens, heads, _ = x.shape
    return {
        "X": x,
        "WEIGHT": weight.contiguous(),
        "COS": cos.contiguous(),
        "SIN": sin.contiguous(),
        "rows": batch * tokens * heads,
        "tokens": tokens,
        "heads": heads,
    }


def _rows(x: Tensor) -> Tensor:
    """x with contiguous channels and rows that are evenly spaced."""
    even = x.stride(-1) == 1 or x.shape[-1] == 1
    for axis in range(x.dim() - 2):
        even &= x.shape[axis] == 1 or x.stride(axis) == x.shape[axis + 1] * x.stride(axis + 1)
    return x if even else x.contiguous()


def _row_strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """A power of two up to 16 that divides every stride of rows, and these divided by it."""
    strides = [t.stride(-2) if t.dim() > 1 else t.shape[-1] for t in tensors]
    align = math.gcd(16, *strides)
    return align, [s // align for s in strides]


def _of_rows(channels: int) -> tuple[dict[str, Any], int]:
    block = power_of_2(channels)
    held = max(1, _HELD // block)
    return {"C": channels, "BC": block, "BR": held}, held


def _of_heads(dim: int) -> tuple[dict[str, Any], int]:
    block = power_of_2(dim)
    held = max(1, _HELD // block)
    return {"D": dim, "BD": block, "BR": held}, held


def _shared(rows: int, held: int, target: Target) -> tuple[int, int]:
    """Programs that share the rows, two for each multiprocessor, and how many rows each has."""
    blocks = cdiv(rows, held)
    share = cdiv(blocks, min(blocks, 2 * target.multiprocessors)) * held
    return cdiv(rows, share), share


def _launch(target: Target, kernel: Any, programs: int, args: dict[str, Any]) -> None:
    held = args.get("BC", args.get("BD", 0)) * args["BR"]
    options = {"num_warps": 4 if held <= _HELD else 8, "num_stages": 1, "enable_fp_fusion": True}
    target.launch(Launch(kernel, programs, args, options))
