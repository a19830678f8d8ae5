# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernel of the forward pass of window attention, and what the backward shares with it.

Tensors are sequence first, heads last. A program holds `BM` tokens of a tile of 64 and walks over
`BK` others at a time: first the tokens that everyone sees, then the tiles of its list (`lists`)
that lie within its window as a whole, then those that need a mask. Where a token lies in memory is
arithmetic on its tile, in raster order and in tile order alike.

Columns come in one piece or two, of `BA` and `BB`: in a product of 64 rows and 128 columns that
follows another, every warp of an mma.sync chip would hold all rows, and 80 columns need not be
128. With one piece `BB` is 0, and what would be the second is the first again, never used.

The conventions are those of the linear kernels: one grid axis, strides divided by the constexpr
`ALIGN`, no run-time integer specialised on, tiles upcast on load, and operands of a product rounded
to `DOT`. What says which token is int32, and int64 before it meets a stride: arithmetic on int64
scalars spills on AMD. Scores are in units of log 2.

A value that is not finite reaches every token of a tile that is read with a mask, as 0 times it is
NaN. To take it out of what is loaded would cost the asynchronous copies from global memory.

These kernels have been compiled (`make aot`) and interpreted on a CPU; they have never run on a
GPU.
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
def places_of(t, j, T, Y, X, ST: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
    """Where tokens j of tile t lie in the grid."""
    x = t % tl.cdiv(X, SX) * SX + j % SX
    y = t // tl.cdiv(X, SX) % tl.cdiv(Y, SY) * SY + j // SX % SY
    z = t // tl.cdiv(X, SX) // tl.cdiv(Y, SY) * ST + j // (SY * SX)
    return z, y, x


@triton.jit
def move_of(at, cell, size, R, SIDE: tl.constexpr):
    """A query's place from the first token of a cell, and whether the grid cuts the cell short."""
    move = tl.minimum(tl.maximum(at - cell * SIDE, -R - 1), R + SIDE) + R + 1
    return move, (cell == size // SIDE).to(tl.int32)


@triton.jit
def counts_of(
    COUNTS, z, y, x, g, there, T, Y, X, RT, RY, RX,
    CT: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
):  # fmt: skip
    """log2 of how many tokens a query at z, y, x does not see of cell g; 0 where not `there`.

    Queries and cells broadcast together. The table is `cells.counts`.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    dx, cut_x = move_of(x, g % tl.cdiv(X, CX), X, RX, CX)
    dy, cut_y = move_of(y, g // tl.cdiv(X, CX) % tl.cdiv(Y, CY), Y, RY, CY)
    dz, cut_z = move_of(z, g // tl.cdiv(X, CX) // tl.cdiv(Y, CY), T, RT, CT)
    at = ((cut_z * 2 + cut_y) * 2 + cut_x) * (2 * RT + CT + 2) + dz
    at = (at * (2 * RY + CY + 2) + dy) * (2 * RX + CX + 2) + dx
    return tl.load(COUNTS + at, mask=there, other=0.0) * LOG2_E


@triton.jit
def rows_of(P, n, inside, d, sn, D: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr):
    """Rows n of one head as [len(n), len(d)]; zeros outside."""
    at = P + n[:, None] * sn * ALIGN + d[None, :]
    x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return x.to(tl.float32).to(DOT)


@triton.jit
def pieces_of(
    P, n, inside, sn, D: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, ALIGN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Rows n of one head as [len(n), BA] and [len(n), BB]."""
    a = rows_of(P, n, inside, tl.arange(0, BA), sn, D, ALIGN, DOT)
    b = a
    if BB:
        b = rows_of(P, n, inside, BA + tl.arange(0, BB), sn, D, ALIGN, DOT)
    return a, b


@triton.jit
def zeros_of(ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr):
    a = tl.zeros([ROWS, BA], tl.float32)
    b = a
    if BB:
        b = tl.zeros([ROWS, BB], tl.float32)
    return a, b


@triton.jit
def product(a0, a1, b0, b1, BB: tl.constexpr, PRECISION: tl.constexpr):
    """A Bᵀ, both in pieces of columns."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if BB:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def added(p, b0, b1, acc0, acc1, BB: tl.constexpr, PRECISION: tl.constexpr):
    """acc + P B, with B and acc in pieces of columns."""
    acc0 = tl.dot(p, b0, acc0, input_precision=PRECISION)
    if BB:
        acc1 = tl.dot(p, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def store(
    P, row, x0, x1, inside, D: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr
):  # fmt: skip
    """Put rows of one head, in pieces of columns, into a contiguous tensor."""
    d = tl.arange(0, BA)
    at = P + row[:, None] * D + d[None, :]
    tl.store(at, x0.to(P.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    if BB:
        e = BA + tl.arange(0, BB)
        at = P + row[:, None] * D + e[None, :]
        tl.store(at, x1.to(P.dtype.element_ty), mask=inside[:, None] & (e < D)[None, :])


@triton.jit
def bits_of(BITS, mask, i, j):
    """[len(i), len(j)]: whether tokens i of a tile see tokens j of the listed one."""
    words = tl.load(BITS + mask * 64 + i)  # [BM] int64
    return ((words[:, None] >> j[None, :].to(tl.int64)) & 1) != 0


@triton.jit
def softmax_step(s, v0, v1, m, z, acc0, acc1, BB: tl.constexpr, PRECISION: tl.constexpr):
    """Take scores [BM, BK] and values [BK, BA], [BK, BB] into the running softmax."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen nothing yet must not become -inf - -inf.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(m - base)
    z = z * keep + tl.sum(p, 1)
    acc0 = acc0 * keep[:, None]
    if BB:
        acc1 = acc1 * keep[:, None]
    acc0, acc1 = added(p.to(v0.dtype), v0, v1, acc0, acc1, BB, PRECISION)
    return m_new, z, acc0, acc1


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
    """Output and log-sum-exp of BM queries of one tile and head.

    Of `always` keys that everyone sees the first `text` are tokens; with COUNTED the others stand
    for cells of CT × CY × CX tokens.
    """
    PARTS: tl.constexpr = 64 // BM  # programs that share a tile
    STEPS: tl.constexpr = 64 // BK  # steps through a listed tile
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)  # fastest: the heads of a token are neighbours in memory
    b = (pid // heads // PARTS // tiles).to(tl.int64)
    t = pid // heads // PARTS % tiles
    i = pid // heads % PARTS * BM + tl.arange(0, BM)  # [BM]
    n, inside = tokens_of(t, i, T, Y, X, ST, SY, SX, TILED)
    KA += (b * always * heads + h) * D
    VA += (b * always * heads + h) * D
    Q += (b * q_sb + h * q_sh) * ALIGN
    q0, q1 = pieces_of(Q, n, inside, q_sn, D, BA, BB, ALIGN, DOT)  # [BM, BA], [BM, BB]
    c = scale * LOG2_E

    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    acc0, acc1 = zeros_of(BM, BA, BB)
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
        m, z, acc0, acc1 = softmax_step(s, v0, v1, m, z, acc0, acc1, BB, PRECISION)

    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * k_sb + h * k_sh) * ALIGN
    first = tl.load(TABLE + 4 * t)
    masked = tl.load(TABLE + 4 * t + 1)
    last = tl.load(TABLE + 4 * t + 2)
    LISTS = TABLE + 4 * tiles
    for step in range(first * STEPS, masked * STEPS):  # from a radius of 10 on
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k0, k1 = pieces_of(K, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        v0, v1 = pieces_of(V, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        s = product(q0, q1, k0, k1, BB, PRECISION) * c  # [BM, BK]
        m, z, acc0, acc1 = softmax_step(s, v0, v1, m, z, acc0, acc1, BB, PRECISION)
    for step in range(masked * STEPS, last * STEPS):
        j = step % STEPS * BK + tl.arange(0, BK)  # [BK]
        u = tl.load(LISTS + step // STEPS * 2)
        at, there = tokens_of(u, j, T, Y, X, ST, SY, SX, TILED)
        k0, k1 = pieces_of(K, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        v0, v1 = pieces_of(V, at, there, k_sn, D, BA, BB, ALIGN, DOT)
        s = product(q0, q1, k0, k1, BB, PRECISION) * c  # [BM, BK]
        seen = bits_of(BITS, tl.load(LISTS + step // STEPS * 2 + 1), i, j) & there[None, :]
        s = tl.where(seen, s, float("-inf"))
        m, z, acc0, acc1 = softmax_step(s, v0, v1, m, z, acc0, acc1, BB, PRECISION)

    # Found again from a number that the compiler does not know, so that nothing of it takes
    # registers during the loops.
    n, inside = tokens_of(tl.load(TABLE + 4 * t + 3), i, T, Y, X, ST, SY, SX, TILED)
    z = tl.where(inside, z, 1.0)  # a token that exists sees itself, others may see none
    row = (b * (T * Y * X).to(tl.int64) + n) * heads + h  # [BM]
    acc0 = acc0 / z[:, None]
    if BB:
        acc1 = acc1 / z[:, None]
    store(OUT, row, acc0, acc1, inside, D, BA, BB)
    tl.store(LSE + row, (m + tl.log2(z)) / LOG2_E, mask=inside)
