# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of linear sums over windows, w_ij = φ(q_i)·φ(k_j), and of their gradients.

They walk as those of window attention do (`window_attention.triton.forward`), whose conventions
they have; features come in pieces `FA` and `FB`, values in pieces `BA` and `BB`. There is no
softmax, so nothing is carried from step to step but sums. Never run on a GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.window_attention.triton.forward import (
    added,
    bits_of,
    pieces_of,
    product,
    store,
    tokens_of,
    zeros_of,
)


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
        "v_sb",
        "v_sn",
        "v_sh",
        "scale",
    ]
)
def hybrid_sum_fwd(
    Q,  # [B, N, H, F]
    K,  # [B, N, H, F]
    V,  # [B, N, H, D]
    NUM,  # [B, N, H, D] float32, contiguous
    DEN,  # [B, N, H] float32
    TABLE,
    BITS,
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
    v_sb,
    v_sn,
    v_sh,
    scale,
    F: tl.constexpr,
    D: tl.constexpr,
    FA: tl.constexpr,
    FB: tl.constexpr,
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
    """scale Σ_j w_ij v_j and scale Σ_j w_ij of BM queries of one tile and head."""
    PARTS: tl.constexpr = 64 // BM
    STEPS: tl.constexpr = 64 // BK
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    Q += (b * q_sb + h * q_sh) * ALIGN
    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    q0, q1 = pieces_of(Q, n, inside, q_sn, F, FA, FB, ALIGN, DOT)  # [BM, FA], [BM, FB]

    z = tl.zeros([BM], tl.float32)
    acc0, acc1 = zeros_of(BM, BA, BB)
    LISTS = TABLE + 4 * tiles
    for step in range(tl.load(TABLE + 4 * t) * STEPS, tl.load(TABLE + 4 * t + 2) * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k0, k1 = pieces_of(K, at, there, k_sn, F, FA, FB, ALIGN, DOT)
        v0, v1 = pieces_of(V, at, there, v_sn, D, BA, BB, ALIGN, DOT)
        w = product(q0, q1, k0, k1, FB, PRECISION)  # [BM, BK]
        w = tl.where(bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j), w, 0.0)
        z += tl.sum(w, 1)
        acc0, acc1 = added(w.to(DOT), v0, v1, acc0, acc1, BB, PRECISION)

    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h
    store(NUM, row, acc0 * scale, acc1 * scale, inside, D, BA, BB)
    tl.store(DEN + row, z * scale, mask=inside)


@triton.jit(
    do_not_specialize=[
        "tiles",
        "heads",
        "T",
        "Y",
        "X",
        "k_sb",
        "k_sn",
        "k_sh",
        "v_sb",
        "v_sn",
        "v_sh",
        "scale",
    ]
)
def hybrid_sum_bwd_q(
    K,  # [B, N, H, F]
    V,  # [B, N, H, D]
    DNUM,  # [B, N, H, D] float32, contiguous
    DDEN,  # [B, N, H] float32
    DQ,  # [B, N, H, F], contiguous
    TABLE,
    BITS,
    tiles,
    heads,
    T,
    Y,
    X,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    scale,
    F: tl.constexpr,
    D: tl.constexpr,
    FA: tl.constexpr,
    FB: tl.constexpr,
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
    """scale Σ_j dw_ij φ(k_j) with dw_ij = dnum_i·v_j + dden_i, of BM queries."""
    PARTS: tl.constexpr = 64 // BM
    STEPS: tl.constexpr = 64 // BK
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    base = b * (T * Y * X).to(tl.int64) * heads + h
    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    do0, do1 = pieces_of(DNUM + base * D, n, inside, heads * D, D, BA, BB, 1, DOT)
    dz = tl.load(DDEN + base + n * heads, mask=inside, other=0.0)

    acc0, acc1 = zeros_of(BM, FA, FB)
    LISTS = TABLE + 4 * tiles
    for step in range(tl.load(TABLE + 4 * t) * STEPS, tl.load(TABLE + 4 * t + 2) * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k0, k1 = pieces_of(K, at, there, k_sn, F, FA, FB, ALIGN, DOT)
        v0, v1 = pieces_of(V, at, there, v_sn, D, BA, BB, ALIGN, DOT)
        dw = product(do0, do1, v0, v1, BB, PRECISION) + dz[:, None]  # [BM, BK]
        dw = tl.where(bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j), dw, 0.0)
        acc0, acc1 = added(dw.to(DOT), k0, k1, acc0, acc1, FB, PRECISION)

    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    store(DQ, base + n * heads, acc0 * scale, acc1 * scale, inside, F, FA, FB)


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
        "v_sb",
        "v_sn",
        "v_sh",
        "scale",
    ]
)
def hybrid_sum_bwd_kv(
    Q,  # [B, N, H, F]
    K,  # [B, N, H, F]
    V,  # [B, N, H, D]
    DNUM,  # [B, N, H, D] float32, contiguous
    DDEN,  # [B, N, H] float32
    DK,  # [B, N, H, F], contiguous
    DV,  # [B, N, H, D], contiguous
    TABLE,
    BITS,
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
    v_sb,
    v_sn,
    v_sh,
    scale,
    F: tl.constexpr,
    D: tl.constexpr,
    FA: tl.constexpr,
    FB: tl.constexpr,
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
    """scale Σ_i dw_ij φ(q_i) and scale Σ_i w_ij dnum_i of BM keys."""
    PARTS: tl.constexpr = 64 // BM
    STEPS: tl.constexpr = 64 // BK
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    base = b * (T * Y * X).to(tl.int64) * heads + h
    Q += (b * q_sb + h * q_sh) * ALIGN
    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    k0, k1 = pieces_of(K, n, inside, k_sn, F, FA, FB, ALIGN, DOT)  # [BM, FA], [BM, FB]
    v0, v1 = pieces_of(V, n, inside, v_sn, D, BA, BB, ALIGN, DOT)  # [BM, BA], [BM, BB]

    dk0, dk1 = zeros_of(BM, FA, FB)
    dv0, dv1 = zeros_of(BM, BA, BB)
    LISTS = TABLE + 4 * tiles
    for step in range(tl.load(TABLE + 4 * t) * STEPS, tl.load(TABLE + 4 * t + 2) * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        seen = bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j)
        q0, q1 = pieces_of(Q, at, there, q_sn, F, FA, FB, ALIGN, DOT)
        do0, do1 = pieces_of(DNUM + base * D, at, there, heads * D, D, BA, BB, 1, DOT)
        dz = tl.load(DDEN + base + at * heads, mask=there, other=0.0)
        w = tl.where(seen, product(k0, k1, q0, q1, FB, PRECISION), 0.0)  # [BM, BK]
        dv0, dv1 = added(w.to(DOT), do0, do1, dv0, dv1, BB, PRECISION)
        dw = product(v0, v1, do0, do1, BB, PRECISION) + dz[None, :]
        dw = tl.where(seen, dw, 0.0)
        dk0, dk1 = added(dw.to(DOT), q0, q1, dk0, dk1, FB, PRECISION)

    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    store(DK, base + n * heads, dk0 * scale, dk1 * scale, inside, F, FA, FB)
    store(DV, base + n * heads, dv0 * scale, dv1 * scale, inside, D, BA, BB)
