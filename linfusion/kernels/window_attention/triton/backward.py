# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernel of the gradients of queries. The conventions are those of `forward.py`.

With p_ij = exp(scale q_i·k_j - l_i) and δ_i = do_i·o_i - dl_i:

    ds_ij = p_ij (do_i·v_j - δ_i),  dq_i = scale Σ_j ds_ij k_j,
    dk_j = scale Σ_i ds_ij q_i,     dv_j = Σ_i p_ij do_i

`window_bwd_q` holds queries and walks over keys, and writes δ; the kernels of `backward_keys` hold
keys and walk over queries, by the same lists. Nothing is added to atomically: the bits do not
depend on the order in which programs run. Never run on a GPU.
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
def query_step(
    s, lse, do0, do1, k0, k1, v0, v1, delta, dq0, dq1, BB: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add what scores [BM, BK] give dq; `lse` and `s` in units of log 2."""
    p = tl.exp2(s - lse[:, None])
    dp = product(do0, do1, v0, v1, BB, PRECISION)
    ds = p * (dp - delta[:, None])
    return added(ds.to(k0.dtype), k0, k1, dq0, dq1, BB, PRECISION)


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
        "k_sb",
        "k_sn",
        "k_sh",
        "g_sb",
        "g_sn",
        "g_sh",
        "scale",
    ]
)
def window_bwd_q(
    Q,  # [B, N, H, D]
    K,  # [B, N, H, D]
    V,  # [B, N, H, D], strides of K
    KA,  # [B, always, H, D], contiguous
    VA,  # [B, always, H, D], contiguous
    OUT,  # [B, N, H, D], contiguous
    DO,  # [B, N, H, D]
    LSE,  # [B, N, H] float32
    DLSE,  # [B, N, H] float32
    DQ,  # [B, N, H, D], contiguous
    DELTA,  # [B, N, H] float32
    TABLE,  # [4·tiles + 2·entries] int32
    BITS,  # [masks, 64] int64
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
    COUNTED: tl.constexpr,
    CT: tl.constexpr,
    CY: tl.constexpr,
    CX: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dq and δ of BM queries of one tile and head."""
    PARTS: tl.constexpr = 64 // BM
    STEPS: tl.constexpr = 64 // BK
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h  # [BM]
    KA += (b * always * heads + h) * D
    VA += (b * always * heads + h) * D
    OUT += (b * (T * Y * X).to(tl.int64) * heads + h) * D
    Q += (b * q_sb + h * q_sh) * ALIGN
    DO += (b * g_sb + h * g_sh) * ALIGN
    q0, q1 = pieces_of(Q, n, inside, q_sn, D, BA, BB, ALIGN, DOT)  # [BM, BA], [BM, BB]
    do0, do1 = pieces_of(DO, n, inside, g_sn, D, BA, BB, ALIGN, tl.float32)
    o0, o1 = pieces_of(OUT, n, inside, heads * D, D, BA, BB, 1, tl.float32)
    delta = tl.sum(do0 * o0, 1)
    if BB:
        delta += tl.sum(do1 * o1, 1)
    delta -= tl.load(DLSE + row, mask=inside, other=0.0)  # [BM]
    tl.store(DELTA + row, delta, mask=inside)
    lse = tl.load(LSE + row, mask=inside, other=0.0) * LOG2_E
    do0, do1 = do0.to(DOT), do1.to(DOT)
    c = scale * LOG2_E

    dq0, dq1 = zeros_of(BM, BA, BB)
    for start in range(0, always, BK):
        g = start + tl.arange(0, BK)  # [BK]
        k0, k1 = pieces_of(KA, g.to(tl.int64), g < always, heads * D, D, BA, BB, 1, DOT)
        v0, v1 = pieces_of(VA, g.to(tl.int64), g < always, heads * D, D, BA, BB, 1, DOT)
        s = product(q0, q1, k0, k1, BB, PRECISION) * c  # [BM, BK]
        if COUNTED:
            at_z, at_y, at_x = places_of(t, i[:, None], T, Y, X, ST, SY, SX)
            cell = g[None, :] - text
            there = (cell >= 0) & (g < always)[None, :]
            s += counts_of(COUNTS, at_z, at_y, at_x, cell, there, T, Y, X, RT, RY, RX, CT, CY, CX)
        s = tl.where((g < always)[None, :], s, float("-inf"))
        dq0, dq1 = query_step(s, lse, do0, do1, k0, k1, v0, v1, delta, dq0, dq1, BB, PRECISION)

    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * k_sb + h * k_sh) * ALIGN
    first = tl.load(TABLE + 4 * t)
    masked = tl.load(TABLE + 4 * t + 1)
    last = tl.load(TABLE + 4 * t + 2)
    LISTS = TABLE + 4 * tiles
    for step in range(first * STEPS, masked * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k0, k1 = pieces_of(K, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        v0, v1 = pieces_of(V, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        s = product(q0, q1, k0, k1, BB, PRECISION) * c  # [BM, BK]
        dq0, dq1 = query_step(s, lse, do0, do1, k0, k1, v0, v1, delta, dq0, dq1, BB, PRECISION)
    for step in range(masked * STEPS, last * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k0, k1 = pieces_of(K, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        v0, v1 = pieces_of(V, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        s = product(q0, q1, k0, k1, BB, PRECISION) * c  # [BM, BK]
        seen = bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j) & there[None, :]
        s = tl.where(seen, s, float("-inf"))
        dq0, dq1 = query_step(s, lse, do0, do1, k0, k1, v0, v1, delta, dq0, dq1, BB, PRECISION)

    # Found again from a number that the compiler does not know, so that nothing of it takes
    # registers during the loops.
    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h
    store(DQ, row, dq0 * scale, dq1 * scale, inside, D, BA, BB)
