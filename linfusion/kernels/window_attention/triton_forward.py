# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernel of the forward pass of window attention, and what the backward shares with it.

Tensors are sequence first, heads last. A program holds `BM` tokens of a tile of 64 and walks over
`BK` others at a time: first the tokens that everyone sees, then the tiles of its list
(`triton_lists`) that lie within its window as a whole, then those that need a mask. Where a token
lies in memory is arithmetic on its tile, in raster order and in tile order alike.

The conventions are those of the linear kernels: one grid axis, strides divided by the constexpr
`ALIGN`, no run-time integer specialised on, tiles upcast on load, and operands of a product rounded
to `DOT`. What says which token is int32, and int64 before it meets a stride: arithmetic on int64
scalars spills on AMD. Scores are in units of log 2.

These kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 and interpreted on a CPU; they
have never run on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def tokens_of(t, j, T, Y, X, ST: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
              TILED: tl.constexpr):  # fmt: skip
    """Where tokens j of tile t lie in the sequence, int64, and whether they lie in the grid."""
    x0 = t % tl.cdiv(X, SX) * SX
    y0 = t // tl.cdiv(X, SX) % tl.cdiv(Y, SY) * SY
    t0 = t // tl.cdiv(X, SX) // tl.cdiv(Y, SY) * ST
    jt = j // (SY * SX)
    jy = j // SX % SY
    jx = j % SX
    inside = (jt < T - t0) & (jy < Y - y0) & (jx < X - x0)
    if TILED:
        dt = tl.minimum(ST, T - t0)
        dy = tl.minimum(SY, Y - y0)
        dx = tl.minimum(SX, X - x0)
        n = t0 * Y * X + dt * (y0 * X + dy * x0) + (jt * dy + jy) * dx + jx
    else:
        n = ((t0 + jt) * Y + y0 + jy) * X + x0 + jx
    return n.to(tl.int64), inside


@triton.jit
def rows_of(P, n, inside, d, sn, D: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr):
    """Rows n of one head as [len(n), len(d)]; zeros outside."""
    at = P + n[:, None] * sn * ALIGN + d[None, :]
    x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return x.to(tl.float32).to(DOT)


@triton.jit
def bits_of(BITS, mask, i, j):
    """[len(i), len(j)]: whether tokens i of a tile see tokens j of the listed one."""
    words = tl.load(BITS + mask * 64 + i)  # [BM] int64
    return ((words[:, None] >> j[None, :].to(tl.int64)) & 1) != 0


@triton.jit
def softmax_step(s, v, m, z, acc, PRECISION: tl.constexpr):
    """Take scores [BM, BK] and values [BK, BD] into the running softmax."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen nothing yet must not become -inf - -inf.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(m - base)
    z = z * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return m_new, z, acc


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
        "scale",
    ]
)
def window_fwd(
    Q,  # [B, N, H, D]
    K,  # [B, N, H, D]
    V,  # [B, N, H, D], strides of K
    KA,  # [B, always, H, D], contiguous
    VA,  # [B, always, H, D], contiguous
    OUT,  # [B, N, H, D], contiguous
    LSE,  # [B, N, H] float32
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
    """Output and log-sum-exp of BM queries of one tile and head."""
    PARTS: tl.constexpr = 64 // BM  # programs that share a tile
    STEPS: tl.constexpr = 64 // BK  # steps through a listed tile
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)  # fastest: the heads of a token are neighbours in memory
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    d = tl.arange(0, BD)  # [BD]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    KA += (b * always * heads + h) * D
    VA += (b * always * heads + h) * D
    q = rows_of(Q + (b * q_sb + h * q_sh) * ALIGN, n, inside, d, q_sn, D, ALIGN, DOT)  # [BM, BD]
    c = scale * LOG2_E

    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, always, BK):
        g = start + tl.arange(0, BK)  # [BK]
        k = rows_of(KA, g.to(tl.int64), g < always, d, heads * D, D, 1, DOT)  # [BK, BD]
        v = rows_of(VA, g.to(tl.int64), g < always, d, heads * D, D, 1, DOT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c  # [BM, BK]
        s = tl.where((g < always)[None, :], s, float("-inf"))
        m, z, acc = softmax_step(s, v, m, z, acc, PRECISION)

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
        m, z, acc = softmax_step(s, v, m, z, acc, PRECISION)
    for step in range(masked * STEPS, last * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k = rows_of(K, at, there, d, k_sn, D, ALIGN, DOT)  # [BK, BD]
        v = rows_of(V, at, there, d, k_sn, D, ALIGN, DOT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * c  # [BM, BK]
        seen = bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j) & there[None, :]
        s = tl.where(seen, s, float("-inf"))
        m, z, acc = softmax_step(s, v, m, z, acc, PRECISION)

    # Found again from a number that the compiler does not know, so that nothing of it takes
    # registers during the loops.
    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    z = tl.where(inside, z, 1.0)  # a token that exists sees itself, others may see none
    o = (acc / z[:, None]).to(OUT.dtype.element_ty)
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h  # [BM]
    tl.store(OUT + row[:, None] * D + d[None, :], o, mask=inside[:, None] & (d < D)[None, :])
    tl.store(LSE + row, (m + tl.log2(z)) / LOG2_E, mask=inside)
