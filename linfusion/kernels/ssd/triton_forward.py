# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of the scan: sums of log-decays, states of chunks, their passing, the read.

The backward pass is the same scan from the last token to the first with keys and queries swapped,
so `ssd_states`, `ssd_pass` and `ssd_read` serve both: `BACKWARD` says which.

Places count tokens in the order of the scan; only `token_of` knows of `REVERSE`. Log-decays are in
units of log 2 and their sums of two float32, high and low: near 1, a decay is lost in float32
where the sum is in the thousands. A log-decay is at least `FORGET`, of which float32 keeps nothing,
so that sums stay finite. What a token must not see is set to -∞ before it is exponentiated: no
product meets an overflow.

The conventions are those of the linear kernels: one grid axis, strides divided by the constexpr
`ALIGN`, no run-time integer specialised on, tiles upcast on load, and operands of a product rounded
to `DOT`. Places are int32, and int64 before they meet a stride: arithmetic on int64 scalars spills
on AMD.

These kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 and interpreted on a CPU; they
have never run on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def token_of(i, length, REVERSE: tl.constexpr):
    """The token at place i, int64."""
    return (length - 1 - i if REVERSE else i).to(tl.int64)


@triton.jit
def rows_of(P, n, inside, d, sn, D: tl.constexpr, ALIGN: tl.constexpr):
    """Rows n of one head as [len(n), len(d)] float32; zeros outside."""
    at = P + n[:, None] * sn * ALIGN + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def state_of(STATES, p, n, P: tl.constexpr, N: tl.constexpr):
    """A state as [BP, BN] float32; zeros outside."""
    mask = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(STATES + p[:, None] * N + n[None, :], mask=mask, other=0.0)


@triton.jit
def product_of(
    Q, K, i, j, inside, there, sq, sk,
    D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows i of Q times rows j of K, BD columns at a time; [len(i), len(j)].

    Float32 is several products one after the other, whose rows are laid out 16 to a warp; four
    warps over fewer than 64 rows would repeat them. Transposed, they share the columns.
    """
    FLIP: tl.constexpr = i.shape[0] < 64
    if FLIP:
        w = tl.zeros([j.shape[0], i.shape[0]], tl.float32)
    else:
        w = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)  # [BD]
        q = rows_of(Q, i, inside, d, sq, D, ALIGN).to(DOT)  # [len(i), BD]
        k = rows_of(K, j, there, d, sk, D, ALIGN).to(DOT)  # [len(j), BD]
        if FLIP:
            w = tl.dot(k, tl.trans(q), w, input_precision=PRECISION)
        else:
            w = tl.dot(q, tl.trans(k), w, input_precision=PRECISION)
    if FLIP:
        w = tl.trans(w)
    return w


@triton.jit
def decays_of(S, i, j, length, BACKWARD: tl.constexpr):
    """What is left of tokens j at tokens i, of which `BACKWARD` takes the transpose; [BM, BK]."""
    high = tl.load(S + i, mask=i < length, other=0.0)[:, None]
    high -= tl.load(S + j, mask=j < length, other=0.0)[None, :]
    low = tl.load(S + length + i, mask=i < length, other=0.0)[:, None]
    low -= tl.load(S + length + j, mask=j < length, other=0.0)[None, :]
    if BACKWARD:
        seen = (i[:, None] <= j[None, :]) & (j < length)[None, :]
        s = -(high + low)
    else:
        seen = (i[:, None] >= j[None, :]) & (i < length)[:, None]
        s = high + low
    return tl.exp2(tl.where(seen, s, float("-inf")))


@triton.jit
def to_the_edge(S, i, last, length, BACKWARD: tl.constexpr):
    """What is left of the state before the chunk at places i, or of tokens i after the chunk."""
    high = tl.load(S + i, mask=i < length, other=0.0)
    low = tl.load(S + length + i, mask=i < length, other=0.0)
    if BACKWARD:
        high = tl.load(S + last) - high
        low = tl.load(S + length + last) - low
    return tl.exp2(tl.where(i < length, high + low, float("-inf")))


@triton.jit(do_not_specialize=["length", "heads"])
def ssd_cumsum(
    A,  # [B, L, H] float32, contiguous
    S,  # [B, H, 2, L] float32: sums up to and with each place of its chunk, high and low
    length,
    heads,
    CHUNK: tl.constexpr,
    BH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Sums of the log-decays of one chunk and BH heads."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    FORGET: tl.constexpr = -256.0
    pid = tl.program_id(0)
    h = pid % tl.cdiv(heads, BH) * BH + tl.arange(0, BH)  # [BH]
    pid = pid // tl.cdiv(heads, BH)
    b = (pid // tl.cdiv(length, CHUNK)).to(tl.int64)
    i = pid % tl.cdiv(length, CHUNK) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    mask = (i < length)[:, None] & (h < heads)[None, :]
    n = b * length + token_of(i, length, REVERSE)  # [CHUNK]
    a = tl.load(A + n[:, None] * heads + h[None, :], mask=mask, other=0.0) * LOG2_E
    a = tl.where(a < FORGET, FORGET, a)  # NaN stays
    s = tl.cumsum(a.to(tl.float64), 0)  # [CHUNK, BH]
    high = s.to(tl.float32)
    at = S + (b * heads + h)[None, :] * 2 * length + i[:, None]
    tl.store(at, high, mask=mask)
    tl.store(at + length, (s - high.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "groups",
        "k_sb",
        "k_sn",
        "k_sh",
        "v_sb",
        "v_sn",
        "v_sh",
    ]
)
def ssd_states(
    K,  # [B, L, G, N]
    V,  # [B, L, H, P]
    DT,  # [B, L, H] float32, contiguous
    S,  # [B, H, 2, L] float32
    STATES,  # [B, chunks, H, P, N] float32, contiguous
    length,
    heads,
    groups,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What a chunk adds to the state after it, Σ_j exp(s_Q - s_j) dt_j x_j b_jᵀ, with K = b, V = x;
    backward what it adds to the gradient of the state before it, Σ_i exp(s_i) dy_i c_iᵀ. Gradients
    have no `STEPS`."""
    P_TILES: tl.constexpr = (P + BP - 1) // BP
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    p = pid % P_TILES * BP + tl.arange(0, BP)  # [BP]
    n = pid // P_TILES % N_TILES * BN + tl.arange(0, BN)  # [BN]
    pid = pid // (P_TILES * N_TILES)
    h = (pid % heads).to(tl.int64)
    first = pid // heads % tl.cdiv(length, CHUNK) * CHUNK
    b = (pid // heads // tl.cdiv(length, CHUNK)).to(tl.int64)
    last = tl.minimum(first + CHUNK, length) - 1
    S += (b * heads + h) * 2 * length
    DT += b * length * heads + h
    K += (b * k_sb + h // (heads // groups) * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    state = tl.zeros([BP, BN], tl.float32)
    for start in range(first, last + 1, BK):
        i = start + tl.arange(0, BK)  # [BK]
        inside = i < length
        at = token_of(i, length, REVERSE)
        w = to_the_edge(S, i, last, length, not BACKWARD)
        if STEPS:
            w *= tl.load(DT + at * heads, mask=inside, other=0.0)
        k = rows_of(K, at, inside, n, k_sn, N, ALIGN)  # [BK, BN]
        v = rows_of(V, at, inside, p, v_sn, P, ALIGN) * w[:, None]  # [BK, BP]
        state = tl.dot(tl.trans(v.to(DOT)), k.to(DOT), state, input_precision=PRECISION)
    STATES += pid.to(tl.int64) * (P * N)
    mask = (p < P)[:, None] & (n < N)[None, :]
    tl.store(STATES + p[:, None] * N + n[None, :], state, mask=mask)


@triton.jit(do_not_specialize=["length", "heads"])
def ssd_pass(
    S,  # [B, H, 2, L] float32
    STATES,  # [B, chunks, H, P·N] float32, contiguous
    FIRST,  # [B, H, P·N], contiguous
    LAST,  # [B, H, P·N] float32, contiguous
    length,
    heads,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STARTED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Turn what each chunk adds into the state before it, h ← exp(s_Q) h + Σ, in place; backward
    into the gradient of the state after it, from the last chunk to the first."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    i = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    bh = (pid // BLOCKS).to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    S += bh * 2 * length
    before = bh // heads * chunks + (chunks - 1 if BACKWARD else 0)  # int64
    STATES += (before * heads + bh % heads) * SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if STARTED:
        state = tl.load(FIRST + bh * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step if BACKWARD else step
        last = tl.minimum((chunk + 1) * CHUNK, length) - 1
        keep = tl.exp2(tl.load(S + last) + tl.load(S + length + last))
        added = tl.load(STATES + i, mask=i < SIZE, other=0.0)
        tl.store(STATES + i, state, mask=i < SIZE)
        state = keep * state + added
        STATES += -heads * SIZE if BACKWARD else heads * SIZE
    tl.store(LAST + bh * SIZE + i, state, mask=i < SIZE)


@triton.jit
def from_the_state(
    Q, STATES, i, inside, p, sq,
    P: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Channels p of a state read by rows i of Q, BD features at a time; [len(i), len(p)]."""
    o = tl.zeros([i.shape[0], p.shape[0]], tl.float32)
    for start in range(0, N, BD):
        n = start + tl.arange(0, BD)  # [BD]
        q = rows_of(Q, i, inside, n, sq, N, ALIGN).to(DOT)  # [len(i), BD]
        state = state_of(STATES, p, n, P, N).to(DOT)  # [len(p), BD]
        o = tl.dot(q, tl.trans(state), o, input_precision=PRECISION)
    return o


@triton.jit
def from_tokens(
    o, w, V, j, other, there, start, p, sv,
    P: tl.constexpr, ALIGN: tl.constexpr, BACKWARD: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o [BM, len(p)] and channels p of tokens j, each times its weight w [BM, BK]."""
    v = rows_of(V, other, there, p, sv, P, ALIGN)  # [BK, len(p)]
    if not BACKWARD:
        # Products with 0 would carry what is not finite to the tokens before it.
        v = tl.where((tl.abs(v) < float("inf")) | (j < start)[:, None], v, 0.0)
    return tl.dot(w, v.to(DOT), o, input_precision=PRECISION)


@triton.jit
def read_end(
    o, X, V, DT, SKIP, OUT, DSKIP, i, token, inside, p, length, heads, sx, sv,
    P: tl.constexpr, SKIPS: tl.constexpr, BACKWARD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store channels p of y or dx, and the share of dskip; returns what they give ddt, [BM]."""
    x = rows_of(X, token, inside, p, sx, P, ALIGN)  # [BM, len(p)]
    ddt = tl.sum(o * x, 1)
    if BACKWARD:
        o *= tl.load(DT + token * heads, mask=inside, other=0.0)[:, None]
    else:
        lost = tl.min(tl.where(tl.abs(x) < float("inf"), length, i[:, None]), 0)  # [len(p)]
        o = tl.where(i[:, None] >= lost[None, :], float("nan"), o)
    if SKIPS:
        skip = tl.load(SKIP + p, mask=p < P, other=0.0)
        if BACKWARD:
            dy = rows_of(V, token, inside, p, sv, P, ALIGN)  # [BM, len(p)]
            tl.store(DSKIP + p, tl.sum(dy * x, 0), mask=p < P)
            o += skip[None, :] * dy
        else:
            o += skip[None, :] * x
    mask = inside[:, None] & (p < P)[None, :]
    tl.store(OUT + token[:, None] * heads * P + p[None, :], o.to(OUT.dtype.element_ty), mask=mask)
    return ddt


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "groups",
        "q_sb",
        "q_sn",
        "q_sh",
        "k_sb",
        "k_sn",
        "k_sh",
        "v_sb",
        "v_sn",
        "v_sh",
        "x_sb",
        "x_sn",
        "x_sh",
    ]
)
def ssd_read(
    Q,  # [B, L, G, N]
    K,  # [B, L, G, N]
    V,  # [B, L, H, P]
    X,  # [B, L, H, P]
    DT,  # [B, L, H] float32, contiguous
    S,  # [B, H, 2, L] float32
    STATES,  # [B, chunks, H, P, N] float32, contiguous
    SKIP,  # [B, H, P] float32, contiguous
    OUT,  # [B, L, H, P], contiguous
    DDT,  # [B, L, H] float32, contiguous
    DSKIP,  # [B, tiles, H, P] float32, contiguous
    length,
    heads,
    groups,
    q_sb,
    q_sn,
    q_sh,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    x_sb,
    x_sn,
    x_sh,
    P: tl.constexpr,
    N: tl.constexpr,
    PA: tl.constexpr,
    PB: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    HOLDS: tl.constexpr,
    SKIPS: tl.constexpr,
    REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y of BM tokens of one head, with Q = c, K = b, V = x and the states before the chunks;
    backward dx, ddt and a share of dskip, with Q = b, K = c, V = dy and the gradients of the states
    after them. Channels come in pieces `PA` and `PB`; q is held in registers if it `HOLDS`, else
    read again, BD features at a time, by every step."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // tl.cdiv(length, BM)).to(tl.int64)
    start = pid // heads % tl.cdiv(length, BM) * BM
    first = start // CHUNK * CHUNK
    last = tl.minimum(first + CHUNK, length) - 1
    i = start + tl.arange(0, BM)  # [BM]
    p = tl.arange(0, PA)  # [PA]
    inside = i < length
    token = token_of(i, length, REVERSE)
    g = h // (heads // groups)
    S += (b * heads + h) * 2 * length
    DT += b * length * heads + h
    Q += (b * q_sb + g * q_sh) * ALIGN
    K += (b * k_sb + g * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    X += (b * x_sb + h * x_sh) * ALIGN
    STATES += ((b * tl.cdiv(length, CHUNK) + start // CHUNK) * heads + h) * (P * N)

    scale = to_the_edge(S, i, last, length, BACKWARD)[:, None]
    o = from_the_state(Q, STATES, token, inside, p, q_sn, P, N, BD, ALIGN, DOT, PRECISION)
    o *= scale  # [BM, PA]
    if PB:
        p_b = PA + tl.arange(0, PB)  # [PB]
        o_b = from_the_state(Q, STATES, token, inside, p_b, q_sn, P, N, BD, ALIGN, DOT, PRECISION)
        o_b *= scale  # [BM, PB]
    if HOLDS:
        n = tl.arange(0, BN)  # [BN]
        q = rows_of(Q, token, inside, n, q_sn, N, ALIGN).to(DOT)  # [BM, BN]
    begin = start if BACKWARD else first
    end = last + 1 if BACKWARD else tl.minimum(start + BM, length)
    for at in range(begin, end, BK):
        j = at + tl.arange(0, BK)  # [BK]
        there = j < length
        other = token_of(j, length, REVERSE)
        if HOLDS:
            k = rows_of(K, other, there, n, k_sn, N, ALIGN).to(DOT)  # [BK, BN]
            w = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BK]
        else:
            w = product_of(
                Q, K, token, other, inside, there, q_sn, k_sn, N, BD, ALIGN, DOT, PRECISION
            )  # fmt: skip
        w *= decays_of(S, i, j, length, BACKWARD)
        if not BACKWARD:
            w *= tl.load(DT + other * heads, mask=there, other=0.0)[None, :]
            w = tl.where(i[:, None] >= j[None, :], w, 0.0)  # also where k is not finite
        w = w.to(DOT)
        o = from_tokens(
            o, w, V, j, other, there, start, p, v_sn, P, ALIGN, BACKWARD, DOT, PRECISION
        )  # fmt: skip
        if PB:
            o_b = from_tokens(
                o_b, w, V, j, other, there, start, p_b, v_sn, P, ALIGN, BACKWARD, DOT, PRECISION
            )  # fmt: skip

    SKIP += (b * heads + h) * P
    OUT += (b * length * heads + h) * P
    DSKIP += pid.to(tl.int64) * P
    ddt = read_end(
        o, X, V, DT, SKIP, OUT, DSKIP, i, token, inside, p, length, heads, x_sn, v_sn,
        P, SKIPS, BACKWARD, ALIGN,
    )  # fmt: skip
    if PB:
        ddt += read_end(
            o_b, X, V, DT, SKIP, OUT, DSKIP, i, token, inside, p_b, length, heads, x_sn, v_sn,
            P, SKIPS, BACKWARD, ALIGN,
        )  # fmt: skip
    if BACKWARD:
        tl.store(DDT + (b * length + token) * heads + h, ddt, mask=inside)
