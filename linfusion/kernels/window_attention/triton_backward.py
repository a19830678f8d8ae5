# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of the backward pass. The conventions are those of `triton_forward.py`.

With p_ij = exp(scale q_i·k_j - l_i) and δ_i = do_i·o_i - dl_i:

    ds_ij = p_ij (do_i·v_j - δ_i),  dq_i = scale Σ_j ds_ij k_j,
    dk_j = scale Σ_i ds_ij q_i,     dv_j = Σ_i p_ij do_i

`window_bwd_q` holds queries and walks over keys, and writes δ; `window_bwd_kv` holds keys of the
grid and walks, by the same lists, over the queries that see them; `window_bwd_all` holds keys that
everyone sees and walks over all queries. Nothing is added to atomically: the bits do not depend on
the order in which programs run. Never run on a GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.window_attention.triton_forward import bits_of, rows_of, tokens_of


@triton.jit
def query_step(s, lse, do, k, v, delta, dq, PRECISION: tl.constexpr):
    """Add what scores [BM, BK] give dq; `lse` and `s` in units of log 2."""
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "tiles",
        "heads",
        "always",
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
    tiles,
    heads,
    always,
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
    BD: tl.constexpr,
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
    """dq and δ of BM queries of one tile and head."""
    PARTS: tl.constexpr = 64 // BM
    STEPS: tl.constexpr = 64 // BK
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    d = tl.arange(0, BD)  # [BD]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h  # [BM]
    KA += (b * always * heads + h) * D
    VA += (b * always * heads + h) * D
    OUT += (b * (T * Y * X).to(tl.int64) * heads + h) * D
    q = rows_of(Q + (b * q_sb + h * q_sh) * ALIGN, n, inside, d, q_sn, D, ALIGN, DOT)  # [BM, BD]
    do = rows_of(DO + (b * g_sb + h * g_sh) * ALIGN, n, inside, d, g_sn, D, ALIGN, tl.float32)
    o = rows_of(OUT, n, inside, d, heads * D, D, 1, tl.float32)
    delta = tl.sum(do * o, 1) - tl.load(DLSE + row, mask=inside, other=0.0)  # [BM]
    tl.store(DELTA + row, delta, mask=inside)
    lse = tl.load(LSE + row, mask=inside, other=0.0) * LOG2_E
    do = do.to(DOT)
    c = scale * LOG2_E

    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, always, BK):
        g = start + tl.arange(0, BK)  # [BK]
        k = rows_of(KA, g.to(tl.int64), g < always, d, heads * D, D, 1, DOT)  # [BK, BD]
        v = rows_of(VA, g.to(tl.int64), g < always, d, heads * D, D, 1, DOT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c  # [BM, BK]
        s = tl.where((g < always)[None, :], s, float("-inf"))
        dq = query_step(s, lse, do, k, v, delta, dq, PRECISION)

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
        k = rows_of(K, at, there, d, k_sn, D, ALIGN, DOT)  # [BK, BD]
        v = rows_of(V, at, there, d, k_sn, D, ALIGN, DOT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c  # [BM, BK]
        dq = query_step(s, lse, do, k, v, delta, dq, PRECISION)
    for step in range(masked * STEPS, last * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k = rows_of(K, at, there, d, k_sn, D, ALIGN, DOT)  # [BK, BD]
        v = rows_of(V, at, there, d, k_sn, D, ALIGN, DOT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c  # [BM, BK]
        seen = bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j) & there[None, :]
        s = tl.where(seen, s, float("-inf"))
        dq = query_step(s, lse, do, k, v, delta, dq, PRECISION)

    # Found again from a number that the compiler does not know, so that nothing of it takes
    # registers during the loops.
    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h
    dq = (dq * scale).to(DQ.dtype.element_ty)
    tl.store(DQ + row[:, None] * D + d[None, :], dq, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def key_step(s, q, do, v, lse, delta, dk, dv, PRECISION: tl.constexpr):
    """Add what scores [BM, BK] of keys against queries give dk and dv."""
    p = tl.exp2(s - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BM, BK]
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def queries_of(
    Q, DO, LSE, DELTA, n, there, d, base, heads, q_sn, g_sn,
    D: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Queries n, the gradients of their outputs, l in units of log 2, and δ."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    q = rows_of(Q, n, there, d, q_sn, D, ALIGN, DOT)  # [BK, BD]
    do = rows_of(DO, n, there, d, g_sn, D, ALIGN, DOT)
    # A query that is not there has p = exp(0 - inf) = 0.
    lse = tl.load(LSE + base + n * heads, mask=there, other=float("inf")) * LOG2_E
    delta = tl.load(DELTA + base + n * heads, mask=there, other=0.0)
    return q, do, lse, delta


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
    BD: tl.constexpr,
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
    d = tl.arange(0, BD)  # [BD]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    base = b * (T * Y * X).to(tl.int64) * heads + h
    Q += (b * q_sb + h * q_sh) * ALIGN
    DO += (b * g_sb + h * g_sh) * ALIGN
    k = rows_of(K + (b * k_sb + h * k_sh) * ALIGN, n, inside, d, k_sn, D, ALIGN, DOT)  # [BM, BD]
    v = rows_of(V + (b * k_sb + h * k_sh) * ALIGN, n, inside, d, k_sn, D, ALIGN, DOT)
    c = scale * LOG2_E

    dk = tl.zeros([BM, BD], tl.float32)
    dv = tl.zeros([BM, BD], tl.float32)
    first = tl.load(TABLE + 4 * t)
    masked = tl.load(TABLE + 4 * t + 1)
    last = tl.load(TABLE + 4 * t + 2)
    LISTS = TABLE + 4 * tiles
    for step in range(first * STEPS, masked * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        q, do, lse, delta = queries_of(
            Q, DO, LSE, DELTA, at, there, d, base, heads, q_sn, g_sn, D, ALIGN, DOT
        )
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * c  # [BM, BK]
        dk, dv = key_step(s, q, do, v, lse, delta, dk, dv, PRECISION)
    for step in range(masked * STEPS, last * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        q, do, lse, delta = queries_of(
            Q, DO, LSE, DELTA, at, there, d, base, heads, q_sn, g_sn, D, ALIGN, DOT
        )
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * c  # [BM, BK]
        s = tl.where(bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j), s, float("-inf"))
        dk, dv = key_step(s, q, do, v, lse, delta, dk, dv, PRECISION)

    # Found again from a number that the compiler does not know, so that nothing of it takes
    # registers during the loops.
    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    at = (base + n * heads)[:, None] * D + d[None, :]
    store = inside[:, None] & (d < D)[None, :]
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=store)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=store)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "always",
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
    DK,  # [B, always, H, D], contiguous, contiguous
    DV,  # [B, always, H, D], contiguous, strides of DK
    tokens,
    heads,
    always,
    q_sb,
    q_sn,
    q_sh,
    g_sb,
    g_sn,
    g_sh,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
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
    d = tl.arange(0, BD)  # [BD]
    base = b * tokens.to(tl.int64) * heads + h
    Q += (b * q_sb + h * q_sh) * ALIGN
    DO += (b * g_sb + h * g_sh) * ALIGN
    inside = n < always
    K += (b * always * heads + h) * D
    V += (b * always * heads + h) * D
    k = rows_of(K, n, inside, d, heads * D, D, 1, DOT)  # [BM, BD]
    v = rows_of(V, n, inside, d, heads * D, D, 1, DOT)
    c = scale * LOG2_E

    dk = tl.zeros([BM, BD], tl.float32)
    dv = tl.zeros([BM, BD], tl.float32)
    for start in range(0, tokens, BK):
        g = (start + tl.arange(0, BK)).to(tl.int64)  # [BK]
        q, do, lse, delta = queries_of(
            Q, DO, LSE, DELTA, g, g < tokens, d, base, heads, q_sn, g_sn, D, ALIGN, DOT
        )
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * c  # [BM, BK]
        dk, dv = key_step(s, q, do, v, lse, delta, dk, dv, PRECISION)

    at = ((b * always + n) * heads + h)[:, None] * D + d[None, :]
    store = inside[:, None] & (d < D)[None, :]
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=store)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=store)
