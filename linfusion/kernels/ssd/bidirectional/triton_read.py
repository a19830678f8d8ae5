# mypy: ignore-errors
# The body is Triton's language; Python's types do not describe it.
"""The Triton kernel that reads the states and pairs of both directions of the scan.

The backward direction is the transpose of a scan from the first token to the last whose log-decays
come one token later: exp(r_i - r_j) between tokens i < j, with r the sum from the last token on, is
exp(s_j - s_i), with s the sum from the first token on of the log-decays of the tokens before. So
the kernels of the scan that go backward through the chunks find its states, and chunks begin at the
same tokens for both directions. The conventions are those of `triton_forward.py`. Never run on a
GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.ssd.triton_forward import rows_of, state_of, to_the_edge


@triton.jit
def difference_of(S, i, j, length):
    """s_i - s_j in units of log 2, of two sums of two float32 each; [BM, BK]."""
    high = tl.load(S + i, mask=i < length, other=0.0)[:, None]
    high -= tl.load(S + j, mask=j < length, other=0.0)[None, :]
    low = tl.load(S + length + i, mask=i < length, other=0.0)[:, None]
    low -= tl.load(S + length + j, mask=j < length, other=0.0)[None, :]
    return high + low


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
    ]
)
def ssd_read_both(
    Q,  # [B, L, G, N]
    K,  # [B, L, G, N]
    V,  # [B, L, H, P]
    DT,  # [B, L, H] float32, contiguous
    DT_B,  # [B, L, H] float32, contiguous: of the backward direction, as all with _B
    S,  # [B, H, 2, L] float32
    S_B,  # [B, H, 2, L] float32: of log-decays one token later
    STATES,  # [B, chunks, H, P, N] float32, contiguous: before each chunk
    STATES_B,  # [B, chunks, H, P, N] float32, contiguous: after each chunk
    SKIP,  # [B, H, P], contiguous
    OUT,  # [B, L, H, P], contiguous
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
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    SKIPS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y of BM tokens of one head, with Q = c, K = b, V = x: what the states on both sides give, and
    all tokens of the chunk, up to i forward and from i on backward."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // tl.cdiv(length, BM)).to(tl.int64)
    start = pid // heads % tl.cdiv(length, BM) * BM
    first = start // CHUNK * CHUNK
    last = tl.minimum(first + CHUNK, length) - 1
    i = start + tl.arange(0, BM)  # [BM]
    p = tl.arange(0, BP)  # [BP]
    n = tl.arange(0, BN)  # [BN]
    inside = i < length
    token = i.to(tl.int64)
    g = h // (heads // groups)
    S += (b * heads + h) * 2 * length
    S_B += (b * heads + h) * 2 * length
    DT += b * length * heads + h
    DT_B += b * length * heads + h
    Q += (b * q_sb + g * q_sh) * ALIGN
    K += (b * k_sb + g * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    STATES += ((b * tl.cdiv(length, CHUNK) + start // CHUNK) * heads + h) * (P * N)
    STATES_B += ((b * tl.cdiv(length, CHUNK) + start // CHUNK) * heads + h) * (P * N)

    q = rows_of(Q, token, inside, n, q_sn, N, ALIGN).to(DOT)  # [BM, BN]
    state = state_of(STATES, p, n, P, N).to(DOT)  # [BP, BN]
    o = tl.dot(q, tl.trans(state), input_precision=PRECISION)  # [BM, BP]
    o *= to_the_edge(S, i, last, length, False)[:, None]
    state = state_of(STATES_B, p, n, P, N).to(DOT)  # [BP, BN]
    other = tl.dot(q, tl.trans(state), input_precision=PRECISION)  # [BM, BP]
    o += other * to_the_edge(S_B, i, last, length, True)[:, None]
    for at in range(first, last + 1, BK):
        j = at + tl.arange(0, BK)  # [BK]
        there = j < length
        token_j = j.to(tl.int64)
        k = rows_of(K, token_j, there, n, k_sn, N, ALIGN).to(DOT)  # [BK, BN]
        v = rows_of(V, token_j, there, p, v_sn, P, ALIGN).to(DOT)  # [BK, BP]
        w = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BK]
        seen = i[:, None] >= j[None, :]
        s = tl.where(seen, difference_of(S, i, j, length), -difference_of(S_B, i, j, length))
        w *= tl.exp2(tl.where(inside[:, None] & there[None, :], s, float("-inf")))
        forward = tl.load(DT + token_j * heads, mask=there, other=0.0)  # [BK]
        backward = tl.load(DT_B + token_j * heads, mask=there, other=0.0)  # [BK]
        steps = tl.where(seen, forward[None, :], 0.0)
        w *= steps + tl.where(i[:, None] <= j[None, :], backward[None, :], 0.0)
        o = tl.dot(w.to(DOT), v, o, input_precision=PRECISION)

    if SKIPS:
        x = rows_of(V, token, inside, p, v_sn, P, ALIGN)  # [BM, BP]
        skip = tl.load(SKIP + (b * heads + h) * P + p, mask=p < P, other=0.0).to(tl.float32)
        o += skip[None, :] * x
    OUT += (b * length * heads + h) * P
    mask = inside[:, None] & (p < P)[None, :]
    tl.store(OUT + token[:, None] * heads * P + p[None, :], o.to(OUT.dtype.element_ty), mask=mask)
