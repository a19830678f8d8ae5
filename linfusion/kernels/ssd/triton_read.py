# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""The Triton kernel that reads the states of a scan; conventions as in `triton_forward`."""

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
