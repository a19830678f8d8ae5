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

These kernels have been compiled ahead of time, interpreted and emulated on a CPU; they have never
run on a GPU.
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
