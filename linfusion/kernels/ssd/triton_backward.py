# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of the backward pass that have no counterpart forward: dB, dC and da.

With u = dt x, h the state before a chunk, D the gradient of the state after it, and

    m_ij = (dy_i·u_j) exp(s_i - s_j) for j ≤ i,

    dc_i = exp(s_i) hᵀ dy_i + Σ_j m_ij b_j,  db_j = exp(s_Q - s_j) Dᵀ u_j + Σ_i m_ij c_i,
    da_k = Σ_{j<k≤i} m_ij c_i·b_j + Σ_{i≥k} exp(s_i) dy_i·(h c_i)
           + Σ_{j<k} exp(s_Q - s_j) u_j·(D b_j) + exp(s_Q) Σ D h

The two gradients of keys are one kernel, `BACKWARD` for db. It adds up the heads of a group in
their order; nothing is added to atomically. The pairs in da_k are added up by where k lies: in the
tile of i and j (by `ssd_bwd_within`), in that of i alone (by dc), in that of j alone (by db), or in
a tile between (by dc, a number for each i and tile). No sum is a difference of larger ones, so that
small gradients stay exact beside large ones. The conventions are those of `triton_forward.py`.
Never run on a GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.ssd.triton_forward import (
    decays_of,
    product_of,
    rows_of,
    state_of,
    to_the_edge,
    token_of,
)


@triton.jit
def edge_of(
    Q, U, STATES, token, inside, scale, n, q_sn, u_sn,
    P: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What the state gives columns n of dq, [BM, len(n)], and its products with q, [BM]."""
    edge = tl.zeros([token.shape[0], n.shape[0]], tl.float32)
    for at in range(0, P, BD):
        p = at + tl.arange(0, BD)  # [BD]
        u = rows_of(U, token, inside, p, u_sn, P, ALIGN).to(DOT)  # [BM, BD]
        state = state_of(STATES, p, n, P, N).to(DOT)  # [BD, len(n)]
        edge = tl.dot(u, state, edge, input_precision=PRECISION)
    edge *= scale[:, None]
    return edge, tl.sum(edge * rows_of(Q, token, inside, n, q_sn, N, ALIGN), 1)


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "groups",
        "splits",
        "q_sb",
        "q_sn",
        "q_sh",
        "k_sb",
        "k_sn",
        "k_sh",
        "u_sb",
        "u_sn",
        "u_sh",
        "v_sb",
        "v_sn",
        "v_sh",
    ]
)
def ssd_bwd_keys(
    Q,  # [B, L, G, N]
    K,  # [B, L, G, N]
    U,  # [B, L, H, P]
    V,  # [B, L, H, P]
    DT,  # [B, L, H] float32, contiguous
    S,  # [B, H, 2, L] float32
    STATES,  # [B, chunks, H, P, N] float32, contiguous
    DQ,  # [B, L, G, splits, N], contiguous
    PAIRS,  # [B, H, L] float32
    EDGES,  # [B, H, L] float32
    BETWEEN,  # [B, tiles, H, CHUNK / BM, BM] float32
    length,
    heads,
    groups,
    splits,
    q_sb,
    q_sn,
    q_sh,
    k_sb,
    k_sn,
    k_sh,
    u_sb,
    u_sn,
    u_sh,
    v_sb,
    v_sn,
    v_sh,
    P: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    NA: tl.constexpr,
    NB: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    HOISTS: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dc of BM tokens and some heads of a group, with Q = c, K = b, U = dy, V = x and the states
    before the chunks; backward db, with Q = b, K = c, U = x, V = dy and the gradients of the states
    after them. Of each token and head also what the pairs with other tiles and the state give the
    gradients of log-decays. Features come in pieces `NA` and `NB`."""
    pid = tl.program_id(0)
    split = pid % splits
    g = pid // splits % groups
    tile = pid // splits // groups
    b = (tile // tl.cdiv(length, BM)).to(tl.int64)
    start = tile % tl.cdiv(length, BM) * BM
    first = start // CHUNK * CHUNK
    last = tl.minimum(first + CHUNK, length) - 1
    i = start + tl.arange(0, BM)  # [BM]
    n = tl.arange(0, NA)  # [NA]
    inside = i < length
    token = token_of(i, length, REVERSE)
    Q += (b * q_sb + g.to(tl.int64) * q_sh) * ALIGN
    K += (b * k_sb + g.to(tl.int64) * k_sh) * ALIGN
    U += b * u_sb * ALIGN
    V += b * v_sb * ALIGN
    DT += b * length * heads
    S += b * heads * 2 * length
    PAIRS += b * heads * length
    EDGES += b * heads * length
    STATES += (b * tl.cdiv(length, CHUNK) + start // CHUNK) * heads * (P * N)
    begin = start if BACKWARD else first
    end = last + 1 if BACKWARD else tl.minimum(start + BM, length)
    BETWEEN += (b * tl.cdiv(length, BM) + start // BM) * heads * CHUNK

    dq = tl.zeros([BM, NA], tl.float32)
    if NB:
        n_b = NA + tl.arange(0, NB)  # [NB]
        dq_b = tl.zeros([BM, NB], tl.float32)
    of_group = heads // groups
    share = tl.cdiv(of_group, splits)
    # Unless it `HOISTS`, what a loop does not change is computed again in it: held, it spills on
    # sm_120; computed again, its scalars spill on gfx942.
    end_of_split = tl.minimum((split + 1) * share, of_group)
    for r in tl.range(split * share, end_of_split, disable_licm=not HOISTS):
        h = (g * of_group + r).to(tl.int64)
        S_h = S + h * 2 * length
        DT_h = DT + h
        U_h = U + h * u_sh * ALIGN
        V_h = V + h * v_sh * ALIGN
        STATES_h = STATES + h * (P * N)
        scale = to_the_edge(S_h, i, last, length, BACKWARD)  # [BM]
        if BACKWARD:
            scale *= tl.load(DT_h + token * heads, mask=inside, other=0.0)
        edge, edges = edge_of(
            Q, U_h, STATES_h, token, inside, scale, n, q_sn, u_sn, P, N, BD, DOT, PRECISION, ALIGN
        )  # fmt: skip
        dq += edge
        if NB:
            edge, more = edge_of(
                Q, U_h, STATES_h, token, inside, scale, n_b, q_sn, u_sn, P, N, BD, DOT, PRECISION,
                ALIGN,
            )  # fmt: skip
            dq_b += edge
            edges += more
        tl.store(EDGES + h * length + i, edges, mask=inside)
        pairs = tl.zeros([BM], tl.float32)
        for at in tl.range(begin, end, BK, disable_licm=not HOISTS):
            j = at + tl.arange(0, BK)  # [BK]
            there = j < length
            other = token_of(j, length, REVERSE)
            m = product_of(
                U_h, V_h, token, other, inside, there, u_sn, v_sn, P, BD, ALIGN, DOT, PRECISION
            )  # fmt: skip
            m *= decays_of(S_h, i, j, length, BACKWARD)
            if BACKWARD:
                m *= tl.load(DT_h + token * heads, mask=inside, other=0.0)[:, None]
            else:
                m *= tl.load(DT_h + other * heads, mask=there, other=0.0)[None, :]
            k = rows_of(K, other, there, n, k_sn, N, ALIGN).to(DOT)  # [BK, NA]
            dq = tl.dot(m.to(DOT), k, dq, input_precision=PRECISION)
            if NB:
                k = rows_of(K, other, there, n_b, k_sn, N, ALIGN).to(DOT)  # [BK, NB]
                dq_b = tl.dot(m.to(DOT), k, dq_b, input_precision=PRECISION)
            m *= product_of(
                Q, K, token, other, inside, there, q_sn, k_sn, N, BD, ALIGN, DOT, PRECISION
            )  # fmt: skip
            apart = at >= start + BM if BACKWARD else at < start
            if apart:
                pairs += tl.sum(m, 1)
                if not BACKWARD:  # the last step through a tile writes the sums that count
                    tl.store(BETWEEN + h * CHUNK + (at - first) // BM * BM + i - start, pairs)
        tl.store(PAIRS + h * length + i, pairs, mask=inside)

    row = ((b * length + token) * groups + g) * splits + split  # [BM]
    at = DQ + row[:, None] * N
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(at + n[None, :], dq.to(DQ.dtype.element_ty), mask=mask)
    if NB:
        mask = inside[:, None] & (n_b < N)[None, :]
        tl.store(at + n_b[None, :], dq_b.to(DQ.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "groups",
        "b_sb",
        "b_sn",
        "b_sh",
        "c_sb",
        "c_sn",
        "c_sh",
        "x_sb",
        "x_sn",
        "x_sh",
        "g_sb",
        "g_sn",
        "g_sh",
    ]
)
def ssd_bwd_within(
    B,  # [B, L, G, N]
    C,  # [B, L, G, N]
    X,  # [B, L, H, P]
    DY,  # [B, L, H, P]
    DT,  # [B, L, H] float32, contiguous
    S,  # [B, H, 2, L] float32
    WITHIN,  # [B, H, L] float32
    length,
    heads,
    groups,
    b_sb,
    b_sn,
    b_sh,
    c_sb,
    c_sn,
    c_sh,
    x_sb,
    x_sn,
    x_sh,
    g_sb,
    g_sn,
    g_sh,
    P: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Σ m_ij c_i·b_j over j < k ≤ i for each k of a tile of BM tokens, i and j in the tile."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    g = h // (heads // groups)
    b = (pid // heads // tl.cdiv(length, BM)).to(tl.int64)
    start = pid // heads % tl.cdiv(length, BM) * BM
    i = start + tl.arange(0, BM)  # [BM]
    inside = i < length
    n = token_of(i, length, REVERSE)
    S += (b * heads + h) * 2 * length
    DT += b * length * heads + h
    B += (b * b_sb + g * b_sh) * ALIGN
    C += (b * c_sb + g * c_sh) * ALIGN
    X += (b * x_sb + h * x_sh) * ALIGN
    DY += (b * g_sb + h * g_sh) * ALIGN
    within = tl.zeros([BM], tl.float32)
    for at in range(start, tl.minimum(start + BM, length), BK):
        j = at + tl.arange(0, BK)  # [BK]
        there = j < length
        o = token_of(j, length, REVERSE)
        m = product_of(DY, X, n, o, inside, there, g_sn, x_sn, P, BD, ALIGN, DOT, PRECISION)
        m *= product_of(C, B, n, o, inside, there, c_sn, b_sn, N, BD, ALIGN, DOT, PRECISION)
        m *= decays_of(S, i, j, length, False)  # [BM, BK]
        m *= tl.load(DT + o * heads, mask=there, other=0.0)[None, :]
        # A token reads itself without any decay.
        m = tl.where(i[:, None] > j[None, :], m, 0.0)
        m = tl.cumsum(m, 0, reverse=True)  # over i from k on
        within += tl.sum(tl.where(i[:, None] > j[None, :], m, 0.0), 1)
    tl.store(WITHIN + (b * heads + h) * length + i, within, mask=inside)


@triton.jit(do_not_specialize=["length", "heads"])
def ssd_bwd_decays(
    S,  # [B, H, 2, L] float32
    STATES,  # [B, chunks, H, P·N] float32, contiguous
    DSTATES,  # [B, chunks, H, P·N] float32, contiguous
    WITHIN,  # [B, H, L] float32: Σ m_ij c_i·b_j over j < k ≤ i in the tile of k
    READ,  # [B, H, L] float32: Σ m_ij c_i·b_j over j in earlier tiles
    WRITTEN,  # [B, H, L] float32: Σ m_ij c_i·b_j over i in later tiles
    BETWEEN,  # [B, tiles, H, TILES, BM] float32: Σ m_ij c_i·b_j over j up to the end of a tile
    INTO,  # [B, H, L] float32: exp(s_i) dy_i·(h c_i)
    OUT_OF,  # [B, H, L] float32: exp(s_Q - s_j) u_j·(D b_j)
    DA,  # [B, L, H] float32, contiguous
    length,
    heads,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """da of one chunk and head, whose pairs were added up by tiles of BM tokens."""
    TILES: tl.constexpr = CHUNK // BM
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // tl.cdiv(length, CHUNK)).to(tl.int64)
    first = pid // heads % tl.cdiv(length, CHUNK) * CHUNK
    last = tl.minimum(first + CHUNK, length) - 1
    STATES += pid.to(tl.int64) * SIZE
    DSTATES += pid.to(tl.int64) * SIZE
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)  # [BLOCK]
        state = tl.load(STATES + at, mask=at < SIZE, other=0.0)
        dot += state * tl.load(DSTATES + at, mask=at < SIZE, other=0.0)
    S += (b * heads + h) * 2 * length
    through = tl.exp2(tl.load(S + last) + tl.load(S + length + last)) * tl.sum(dot, 0)

    i = first + tl.arange(0, CHUNK)  # [CHUNK]
    inside = i < length
    at = (b * heads + h) * length + i
    da = through + tl.load(WITHIN + at, mask=inside, other=0.0)
    da += tl.cumsum(tl.load(INTO + at, mask=inside, other=0.0), 0, reverse=True)
    da += tl.cumsum(tl.load(OUT_OF + at - 1, mask=inside & (i > first), other=0.0), 0)
    read = tl.load(READ + at, mask=inside, other=0.0)
    read = tl.cumsum(tl.reshape(read, [TILES, BM]), 1, reverse=True)
    written = tl.load(WRITTEN + at - 1, mask=inside & (i % BM > 0), other=0.0)
    written = tl.cumsum(tl.reshape(written, [TILES, BM]), 1)

    k = tl.arange(0, TILES)[:, None]  # a tile between
    at = (k - 1) * BM + tl.arange(0, BM)[None, :]  # [TILES, BM]
    between = tl.zeros([TILES, BM], tl.float32)
    BETWEEN += ((b * tl.cdiv(length, BM) + first // BM) * heads + h) * CHUNK
    for tile in range(1, tl.cdiv(last + 1 - first, BM)):  # of i
        BETWEEN += heads * CHUNK
        between += tl.load(BETWEEN + at, mask=(k > 0) & (k < tile), other=0.0)
    da += tl.reshape(read + written + tl.sum(between, 1)[:, None], [CHUNK])
    tl.store(DA + (b * length + token_of(i, length, REVERSE)) * heads + h, da, mask=inside)
