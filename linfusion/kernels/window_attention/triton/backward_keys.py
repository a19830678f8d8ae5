# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of the gradients of keys and values. Conventions and equations: `backward`.

`window_bwd_kv` holds keys of the grid and walks over the queries that see them; `window_bwd_all`
holds keys that everyone sees and walks over all queries. Never run on a GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.window_attention.triton.forward import (
    added,
    bits_of,
    counts_of,
    pieces_of,
    places_of,
    product,
    store,
    tokens_of,
    zeros_of,
)


@triton.jit
def key_step(
    s, q0, q1, do0, do1, v0, v1, lse, delta, dk0, dk1, dv0, dv1, BB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what scores [BM, BK] of keys against queries give dk and dv."""
    p = tl.exp2(s - lse[None, :])
    dv0, dv1 = added(p.to(do0.dtype), do0, do1, dv0, dv1, BB, PRECISION)
    dp = product(v0, v1, do0, do1, BB, PRECISION)  # [BM, BK]
    ds = p * (dp - delta[None, :])
    dk0, dk1 = added(ds.to(q0.dtype), q0, q1, dk0, dk1, BB, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def queries_of(
    Q, DO, LSE, DELTA, n, there, base, heads, q_sn, g_sn, D: tl.constexpr, BA: tl.constexpr,
    BB: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Queries n, the gradients of their outputs, l in units of log 2, and δ."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    q0, q1 = pieces_of(Q, n, there, q_sn, D, BA, BB, ALIGN, DOT)  # [BK, BA], [BK, BB]
    do0, do1 = pieces_of(DO, n, there, g_sn, D, BA, BB, ALIGN, DOT)
    # A query that is not there has p = exp(0 - inf) = 0.
    lse = tl.load(LSE + base + n * heads, mask=there, other=float("inf")) * LOG2_E
    delta = tl.load(DELTA + base + n * heads, mask=there, other=0.0)
    return q0, q1, do0, do1, lse, delta


@triton.jit(
    do_not_specialize=[
        "tiles",
        "heads",
        "T",
        "Y",
        "X",
        "q_sb",
        "q_sn",
        "q_sh",
        "k_sb",
        "k_sn",
        "k_sh",
        "g_sb",
        "g_sn",
        "g_sh",
        "scale",
    ]
)
def window_bwd_kv(
    Q,  # [B, N, H, D]
    K,  # [B, N, H, D]
    V,  # [B, N, H, D], strides of K
    DO,  # [B, N, H, D]
    LSE,  # [B, N, H] float32
    DELTA,  # [B, N, H] float32
    DK,  # [B, N, H, D], contiguous
    DV,  # [B, N, H, D], contiguous
    TABLE,  # [4·tiles + 2·entries] int32
    BITS,  # [masks, 64] int64
    tiles,
    heads,
    T,
    Y,
    X,
    q_sb,
    q_sn,
    q_sh,
    k_sb,
    k_sn,
    k_sh,
    g_sb,
    g_sn,
    g_sh,
    scale,
    D: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ST: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    TILED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dk and dv of BM keys of one tile and head."""
    PARTS: tl.constexpr = 64 // BM
    STEPS: tl.constexpr = 64 // BK
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    base = b * (T * Y * X).to(tl.int64) * heads + h
    Q += (b * q_sb + h * q_sh) * ALIGN
    DO += (b * g_sb + h * g_sh) * ALIGN
    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * k_sb + h * k_sh) * ALIGN
    k0, k1 = pieces_of(K, n, inside, k_sn, D, BA, BB, ALIGN, DOT)  # [BM, BA], [BM, BB]
    v0, v1 = pieces_of(V, n, inside, k_sn, D, BA, BB, ALIGN, DOT)
    c = scale * LOG2_E

    dk0, dk1 = zeros_of(BM, BA, BB)
    dv0, dv1 = zeros_of(BM, BA, BB)
    first = tl.load(TABLE + 4 * t)
    masked = tl.load(TABLE + 4 * t + 1)
    last = tl.load(TABLE + 4 * t + 2)
    LISTS = TABLE + 4 * tiles
    for step in range(first * STEPS, masked * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        q0, q1, do0, do1, lse, delta = queries_of(
            Q, DO, LSE, DELTA, at, there, base, heads, q_sn, g_sn, D, BA, BB, ALIGN, DOT
        )
        s = product(k0, k1, q0, q1, BB, PRECISION) * c  # [BM, BK]
        dk0, dk1, dv0, dv1 = key_step(
            s, q0, q1, do0, do1, v0, v1, lse, delta, dk0, dk1, dv0, dv1, BB, PRECISION
        )
    for step in range(masked * STEPS, last * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        q0, q1, do0, do1, lse, delta = queries_of(
            Q, DO, LSE, DELTA, at, there, base, heads, q_sn, g_sn, D, BA, BB, ALIGN, DOT
        )
        s = product(k0, k1, q0, q1, BB, PRECISION) * c  # [BM, BK]
        s = tl.where(bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j), s, float("-inf"))
        dk0, dk1, dv0, dv1 = key_step(
            s, q0, q1, do0, do1, v0, v1, lse, delta, dk0, dk1, dv0, dv1, BB, PRECISION
        )

    # Found again from a number that the compiler does not know, so that nothing of it takes
    # registers during the loops.
    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    store(DK, base + n * heads, dk0 * scale, dk1 * scale, inside, D, BA, BB)
    store(DV, base + n * heads, dv0, dv1, inside, D, BA, BB)


@triton.jit(
    do_not_specialize=[
        "tiles",
        "heads",
        "always",
        "text",
        "T",
        "Y",
        "X",
        "RT",
        "RY",
        "RX",
        "q_sb",
        "q_sn",
        "q_sh",
        "g_sb",
        "g_sn",
        "g_sh",
        "scale",
    ]
)
def window_bwd_all(
    Q,  # [B, N, H, D]
    K,  # [B, always, H, D], contiguous
    V,  # [B, always, H, D], contiguous
    DO,  # [B, N, H, D]
    LSE,  # [B, N, H] float32
    DELTA,  # [B, N, H] float32
    DK,  # [B, always, H, D], contiguous
    DV,  # [B, always, H, D], contiguous
    COUNTS,  # with COUNTED, log of tokens (`cells.counts`)
    tiles,
    heads,
    always,
    text,
    T,
    Y,
    X,
    RT,
    RY,
    RX,
    q_sb,
    q_sn,
    q_sh,
    g_sb,
    g_sn,
    g_sh,
    scale,
    D: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ST: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    TILED: tl.constexpr,
    COUNTED: tl.constexpr,
    CT: tl.constexpr,
    CY: tl.constexpr,
    CX: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dk and dv of BM keys that everyone sees, of one head."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // tl.cdiv(always, BM)).to(tl.int64)
    n = (pid // heads % tl.cdiv(always, BM) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    base = b * (T * Y * X).to(tl.int64) * heads + h
    Q += (b * q_sb + h * q_sh) * ALIGN
    DO += (b * g_sb + h * g_sh) * ALIGN
    inside = n < always
    K += (b * always * heads + h) * D
    V += (b * always * heads + h) * D
    k0, k1 = pieces_of(K, n, inside, heads * D, D, BA, BB, 1, DOT)  # [BM, BA], [BM, BB]
    v0, v1 = pieces_of(V, n, inside, heads * D, D, BA, BB, 1, DOT)
    c = scale * LOG2_E

    dk0, dk1 = zeros_of(BM, BA, BB)
    dv0, dv1 = zeros_of(BM, BA, BB)
    STEPS: tl.constexpr = 64 // BK
    # Where a query lies in the grid matters to cells alone, and is known tile by tile.
    steps = tiles * STEPS if COUNTED else tl.cdiv(T * Y * X, BK)
    for step in range(steps):
        if COUNTED:
            j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
            at, there = tokens_of(step // STEPS, j, T, Y, X, ST, SY, SX, TILED)
        else:
            at = (step * BK + tl.arange(0, BK)).to(tl.int64)  # [BK]
            there = at < T * Y * X
        q0, q1, do0, do1, lse, delta = queries_of(
            Q, DO, LSE, DELTA, at, there, base, heads, q_sn, g_sn, D, BA, BB, ALIGN, DOT
        )
        s = product(k0, k1, q0, q1, BB, PRECISION) * c  # [BM, BK]
        if COUNTED:
            at_z, at_y, at_x = places_of(step // STEPS, j[None, :], T, Y, X, ST, SY, SX)
            cell = n.to(tl.int32)[:, None] - text
            counted = (cell >= 0) & inside[:, None]
            s += counts_of(COUNTS, at_z, at_y, at_x, cell, counted, T, Y, X, RT, RY, RX, CT, CY, CX)
        dk0, dk1, dv0, dv1 = key_step(
            s, q0, q1, do0, do1, v0, v1, lse, delta, dk0, dk1, dv0, dv1, BB, PRECISION
        )

    row = (b * always + n) * heads + h
    store(DK, row, dk0 * scale, dk1 * scale, inside, D, BA, BB)
    store(DV, row, dv0, dv1, inside, D, BA, BB)
