# The bodies of kernels are Triton's language; Python's types do not describe them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Triton kernels of short depthwise convolutions along tokens, in one or two directions.

The conventions are those of `linfusion.kernels.elementwise.triton`. A program holds `BT` tokens of
`BC` channels; what its taps read again comes from the cache, so that tokens are read once for both
directions. The results of the backward direction are stored where `reference.directional_conv` has
them: with the leading tokens behind the others, so that neither is ever turned around.

Interpreted on a CPU and compiled ahead of time; never run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import Launch, Target, cdiv, target_of

# Of a program of 4 warps: a weight is read two channels a thread at a time. Gradients of weights,
# which hold sums of every tap, take half the tokens.
_CHANNELS, _TOKENS = 256, 16  # AMD's warps are twice as wide: 512 and 8


@triton.jit
def read_at(X, n, length, there, x_sn, c):
    """Rows n of X, 0 where they are none of its own."""
    mask = ((n >= 0) & (n < length))[:, None] & there
    return tl.load(X + n[:, None] * x_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def wrapped(n, first, length):
    """The token at place n of the backward direction's order, -1 for none."""
    token = n + first
    token = tl.where(token >= length, token - length, token)
    return tl.where(n < length, token, -1)


@triton.jit
def tap(W, j, c, C: tl.constexpr):
    """Weight j of channels c, of [taps, C]."""
    return tl.load(W + j * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["length", "blocks", "first", "x_sb", "x_sn"])
def conv_fwd(
    X,  # [B, L, C]
    W,  # [taps, C]
    BIAS,  # [C]
    W_B,  # [taps, C]
    BIAS_B,  # [C]
    OUT,  # [B, L, C], contiguous
    OUT_B,  # [B, L, C], contiguous
    length,
    blocks,
    first,
    x_sb,
    x_sn,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Both directions of BT tokens."""
    pid = tl.program_id(0).to(tl.int64)
    c = pid % tl.cdiv(C, BC) * BC + tl.arange(0, BC)  # [BC]
    tile = pid // tl.cdiv(C, BC)
    b = tile // blocks
    t = tile % blocks * BT + tl.arange(0, BT)  # [BT]
    there = (c < C)[None, :]
    X += b * x_sb * ALIGN
    if FORWARD:
        y = tl.zeros([BT, BC], tl.float32)
        y += tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(TAPS):
            y += tap(W, j, c, C) * read_at(X, t - TAPS + 1 + j, length, there, x_sn * ALIGN, c)
        if SILU:
            y *= tl.sigmoid(y)
        at = (b * length + t)[:, None] * C + c[None, :]
        tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=(t < length)[:, None] & there)
    if BACKWARD:
        p = tl.where(t >= first, t - first, t - first + length)
        y = tl.zeros([BT, BC], tl.float32)
        y += tl.load(BIAS_B + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(TAPS):
            n = wrapped(p + TAPS - 1 - j, first, length)
            y += tap(W_B, j, c, C) * read_at(X, n, length, there, x_sn * ALIGN, c)
        if SILU:
            y *= tl.sigmoid(y)
        at = (b * length + p)[:, None] * C + c[None, :]
        tl.store(OUT_B + at, y.to(OUT_B.dtype.element_ty), mask=(t < length)[:, None] & there)


@triton.jit
def before_silu(
    X,
    DY,
    G,
    W,
    BIAS,
    at,
    p,
    first,
    length,
    inside,
    there,
    x_sn,
    c,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BACK: tl.constexpr,
    SILU: tl.constexpr,
):
    """Gradients of what SiLU took, written to G, and what they add to those of the weights."""
    g = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = tl.zeros([BT, BC], tl.float32)
        y += tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(TAPS):
            n = wrapped(p + TAPS - 1 - j, first, length) if BACK else p - TAPS + 1 + j
            y += tap(W, j, c, C) * read_at(X, n, length, there, x_sn, c)
        s = tl.sigmoid(y)
        g *= s * (1 + y * (1 - s))
        tl.store(G + at, g.to(G.dtype.element_ty), mask=inside)
    added = tl.zeros([BJ, BC], tl.float32)
    which = tl.arange(0, BJ)[:, None]
    for j in tl.static_range(TAPS):
        n = wrapped(p + TAPS - 1 - j, first, length) if BACK else p - TAPS + 1 + j
        seen = tl.sum(g * read_at(X, n, length, there, x_sn, c), 0)[None, :]
        added += tl.where(which == j, seen, 0.0)
    return tl.where(which == TAPS, tl.sum(g, 0)[None, :], added)


@triton.jit(do_not_specialize=["length", "blocks", "first", "tiles", "share", "x_sb", "x_sn"])
def conv_bwd_weights(
    X,  # [B, L, C]
    DY,  # [B, L, C], contiguous
    DY_B,  # [B, L, C], contiguous
    W,  # [taps, C]
    BIAS,  # [C]
    W_B,  # [taps, C]
    BIAS_B,  # [C]
    G,  # [B, L, C], contiguous: gradients before SiLU
    G_B,  # [B, L, C], contiguous
    PARTIAL,  # [programs, 2, BJ, C] float32: weights and, after them, the bias of each direction
    length,
    blocks,
    first,
    tiles,
    share,
    x_sb,
    x_sn,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of the weights from `share` tiles of tokens, and of what SiLU took."""
    pid = tl.program_id(0).to(tl.int64)
    c = pid % tl.cdiv(C, BC) * BC + tl.arange(0, BC)  # [BC]
    own = pid // tl.cdiv(C, BC)
    there = (c < C)[None, :]
    dw = tl.zeros([BJ, BC], tl.float32)
    dw_b = tl.zeros([BJ, BC], tl.float32)
    for i in range(share):
        tile = own * share + i
        b = tile // blocks
        t = tile % blocks * BT + tl.arange(0, BT)  # [BT]
        inside = ((t < length) & (tile < tiles))[:, None] & there
        here = X + b * x_sb * ALIGN
        t = tl.where(tile < tiles, t, length + TAPS + first)  # past every token
        if FORWARD:
            at = (b * length + t)[:, None] * C + c[None, :]
            dw += before_silu(
                here, DY, G, W, BIAS, at, t, first, length, inside, there, x_sn * ALIGN, c,
                C, TAPS, BJ, BT, BC, False, SILU,
            )  # fmt: skip
        if BACKWARD:
            p = tl.where(t >= first, t - first, t - first + length)
            at = (b * length + p)[:, None] * C + c[None, :]
            dw_b += before_silu(
                here, DY_B, G_B, W_B, BIAS_B, at, p, first, length, inside, there, x_sn * ALIGN, c,
                C, TAPS, BJ, BT, BC, True, SILU,
            )  # fmt: skip
    rows = tl.arange(0, BJ)[:, None] * C + c[None, :]
    PARTIAL += own * 2 * BJ * C
    if FORWARD:
        tl.store(PARTIAL + rows, dw, mask=there)
    if BACKWARD:
        tl.store(PARTIAL + BJ * C + rows, dw_b, mask=there)


@triton.jit(do_not_specialize=["length", "blocks", "first"])
def conv_bwd_x(
    G,  # [B, L, C], contiguous
    G_B,  # [B, L, C], contiguous
    W,  # [taps, C]
    W_B,  # [taps, C]
    DX,  # [B, L, C], contiguous
    length,
    blocks,
    first,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Each direction's gradients through its taps the other way, both added."""
    pid = tl.program_id(0).to(tl.int64)
    c = pid % tl.cdiv(C, BC) * BC + tl.arange(0, BC)  # [BC]
    tile = pid // tl.cdiv(C, BC)
    b = tile // blocks
    t = tile % blocks * BT + tl.arange(0, BT)  # [BT]
    there = (c < C)[None, :]
    dx = tl.zeros([BT, BC], tl.float32)
    if FORWARD:
        here = G + b * length * C
        for j in tl.static_range(TAPS):
            dx += tap(W, j, c, C) * read_at(here, t + TAPS - 1 - j, length, there, C, c)
    if BACKWARD:
        here = G_B + b * length * C
        p = tl.where(t >= first, t - first, t - first + length)
        for j in tl.static_range(TAPS):
            dx += tap(W_B, j, c, C) * read_at(here, p - TAPS + 1 + j, length, there, C, c)
    at = (b * length + t)[:, None] * C + c[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=(t < length)[:, None] & there)


def directional_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    first: int,
    silu: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.directional_conv`; a direction that there is not is empty."""
    target = target or target_of(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    args, tiles = _arguments(x, (weight, bias, weight_b, bias_b), first, target)
    args |= {"X": x, "SILU": silu} | _strides(x)
    out, out_b = _for_each(x, weight, weight_b)
    args |= {"OUT": out, "OUT_B": out_b}
    _launch(target, conv_fwd, tiles, args)
    return out, out_b


def directional_conv_backward(
    dy: Tensor,
    dy_b: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    first: int,
    silu: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias of each direction; of what there is not, empty."""
    target = target or target_of(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    dy, dy_b = dy.contiguous(), dy_b.contiguous()
    weights = (weight, bias, weight_b, bias_b)
    own, tiles = _arguments(x, weights, first, target, 2)
    taps, channels = own["TAPS"], x.shape[2]
    g, g_b = _for_each(x, weight, weight_b) if silu else (dy, dy_b)

    programs = min(tiles, cdiv(2 * target.multiprocessors, cdiv(channels, own["BC"])))
    share = cdiv(tiles, programs)
    programs = cdiv(tiles, share)
    rows = 1 << taps.bit_length()  # of the taps and the bias
    partial = torch.empty(programs, 2, rows, channels, dtype=torch.float32, device=x.device)
    args = own | {"X": x, "DY": dy, "DY_B": dy_b, "G": g, "G_B": g_b, "PARTIAL": partial}
    args |= {"SILU": silu, "BJ": rows, "tiles": tiles, "share": share} | _strides(x)
    _launch(target, conv_bwd_weights, programs, args)

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args, tiles = _arguments(x, weights, first, target)
    args |= {"G": g, "G_B": g_b, "DX": dx}
    for name in ("BIAS", "BIAS_B"):
        del args[name]
    _launch(target, conv_bwd_x, tiles, args)

    grads = []
    for way, (w, b) in enumerate(((weight, bias), (weight_b, bias_b))):
        total = partial[:, way].sum(0)  # [rows, C]; of a direction there is not, unwritten
        grads += [
            x.new_empty(0) if w is None else total[:taps].t().to(w.dtype).contiguous(),
            x.new_empty(0) if b is None else total[taps].to(b.dtype, copy=True),
        ]
    dw, db, dw_b, db_b = grads
    return dx, dw, db, dw_b, db_b


def _arguments(
    x: Tensor, weights: Sequence[Tensor | None], first: int, target: Target, parts: int = 1
) -> tuple[dict[str, Any], int]:
    """Of every kernel, and how many tiles of tokens there are, of one of the `parts` of a tile."""
    wide = 2 if target.vendor == "hip" else 1
    held = _TOKENS // (wide * parts)
    batch, length, channels = x.shape
    blocks = cdiv(length, held)
    taps = next(w.shape[1] for w in weights[::2] if w is not None)
    args = {
        name: x if w is None else w.t().contiguous()
        for name, w in zip(("W", "BIAS", "W_B", "BIAS_B"), weights, strict=True)
    }
    zeros = None
    for of, name in (("W", "BIAS"), ("W_B", "BIAS_B")):
        if args[of] is not x and args[name] is x:
            zeros = torch.zeros_like(args[of][0]) if zeros is None else zeros
            args[name] = zeros
    sizes: dict[str, Any] = {"length": length, "blocks": blocks, "first": first, "C": channels}
    sizes |= {"TAPS": taps, "BT": held, "BC": _CHANNELS * wide}
    sizes |= {"FORWARD": weights[0] is not None, "BACKWARD": weights[2] is not None}
    return args | sizes, batch * blocks


def _strides(x: Tensor) -> dict[str, int]:
    """A power of two up to 16 that divides the strides, and these divided by it."""
    found = [0 if size == 1 else s for size, s in zip(x.shape[:2], x.stride(), strict=False)]
    align = math.gcd(16, *found)
    return {"ALIGN": align, "x_sb": found[0] // align, "x_sn": found[1] // align}


def _for_each(x: Tensor, weight: Tensor | None, weight_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the results of each direction that there is."""
    out, out_b = (x.new_empty(0 if w is None else x.shape) for w in (weight, weight_b))
    return out, out_b


def _launch(target: Target, kernel: Any, tiles: int, args: dict[str, Any]) -> None:
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    target.launch(Launch(kernel, tiles * cdiv(args["C"], args["BC"]), args, options))
