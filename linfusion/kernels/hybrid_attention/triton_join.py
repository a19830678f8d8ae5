# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernel that joins near and far: it reads the state and normalises once.

Conventions are those of window attention's kernels. Never run on a GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.window_attention.triton.forward import added, pieces_of, store, zeros_of


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "p_sb",
        "p_sn",
        "p_sh",
        "r_sb",
        "r_sn",
        "r_sh",
    ]
)
def hybrid_join_fwd(
    NEAR,  # [B, N, H, D], contiguous
    LSE,  # [B, N, H] float32
    PHI,  # [B, N, H, F], of the denominator
    ROTATED,  # [B, N, H, F], of the numerator
    KV,  # [B, H, F, D] float32, contiguous
    K_MEAN,  # [B, H, F] float32
    WEIGHT,  # [B, H] float32, log of the weight of the far part
    NUM,  # with EXCLUDED, [B, N, H, D] float32, contiguous
    DEN,  # with EXCLUDED, [B, N, H] float32
    OUT,  # [B, N, H, D], contiguous
    TOTAL,  # [B, N, H] float32
    tokens,
    heads,
    p_sb,
    p_sn,
    p_sh,
    r_sb,
    r_sn,
    r_sh,
    F: tl.constexpr,
    D: tl.constexpr,
    BF: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BM: tl.constexpr,
    EXCLUDED: tl.constexpr,
    SAME: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """BM tokens of one head; with SAME numerator and denominator have the same features."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    b = (pid // heads // tl.cdiv(tokens, BM)).to(tl.int64)
    n = (pid // heads % tl.cdiv(tokens, BM) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    inside = n < tokens
    row = (b * tokens + n) * heads + h
    PHI += (b * p_sb + h * p_sh) * ALIGN
    ROTATED += (b * r_sb + h * r_sh) * ALIGN
    KV += (b * heads + h) * F * D
    K_MEAN += (b * heads + h) * F

    z = tl.zeros([BM], tl.float32)
    acc0, acc1 = zeros_of(BM, BA, BB)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)  # [BF]
        some = inside[:, None] & (f < F)[None, :]
        r = tl.load(ROTATED + n[:, None] * r_sn * ALIGN + f[None, :], mask=some, other=0.0)
        s0, s1 = pieces_of(KV, f.to(tl.int64), f < F, D, D, BA, BB, 1, DOT)  # [BF, BA], [BF, BB]
        acc0, acc1 = added(r.to(tl.float32).to(DOT), s0, s1, acc0, acc1, BB, PRECISION)
        p = r
        if not SAME:
            p = tl.load(PHI + n[:, None] * p_sn * ALIGN + f[None, :], mask=some, other=0.0)
        k_mean = tl.load(K_MEAN + f, mask=f < F, other=0.0)
        z += tl.sum(p.to(tl.float32) * k_mean[None, :], 1)

    o0, o1 = pieces_of(NEAR + h * D, b * tokens + n, inside, heads * D, D, BA, BB, 1, tl.float32)
    if EXCLUDED:
        z -= tl.load(DEN + row, mask=inside, other=0.0)
        x0, x1 = pieces_of(NUM + h * D, b * tokens + n, inside, heads * D, D, BA, BB, 1, tl.float32)
        acc0 -= x0
        if BB:
            acc1 -= x1
    lse = tl.load(LSE + row, mask=inside, other=0.0)
    g = tl.load(WEIGHT + b * heads + h)
    far = z > 0
    top = tl.maximum(lse, g + tl.log(tl.where(far, z, 1.17549435e-38)))
    near = tl.exp(lse - top)
    weight = tl.where(far, tl.exp(g - top), 0.0)
    # Where nothing is far the weight may have been infinite, and what it multiplies is a rounding.
    acc0 = tl.where(far[:, None], acc0, 0.0)
    both = near + weight * tl.where(far, z, 0.0)
    near, weight = near / both, weight / both
    out0 = near[:, None] * o0 + weight[:, None] * acc0
    out1 = out0
    if BB:
        out1 = near[:, None] * o1 + weight[:, None] * tl.where(far[:, None], acc1, 0.0)
    store(OUT, row, out0, out1, inside, D, BA, BB)
    tl.store(TOTAL + row, top + tl.log(both), mask=inside)
