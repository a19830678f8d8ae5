# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of the backward pass. The conventions are those of `triton_forward.py`.

With g_i = dO_i Sᵀ, z_i = φ(q_i)·m + ε (ε/c if ε is on the sums) and δ_i = −φ(q_i)·g_i / z_i²:

    dφ(q_i) = g_i / z_i + δ_i m        dS = Σ_i φ(q_i)ᵀ dO_i / z_i        dm = Σ_i δ_i φ(q_i)
    dφ(k_j) = w_j (v_j dSᵀ + dm) / c   dv_j = w_j φ(k_j) dS / c           c = Σ_j w_j

so neither the output nor z is saved or read. Without a normaliser z = 1, δ = 0 and S is c times
the mean. Never run on a GPU.
"""

import triton
import triton.language as tl

from linfusion.kernels.linear_attention.triton_forward import one_over, phi


@triton.jit
def phi_slope(y, PHI: tl.constexpr):
    """φ'(x) from y = φ(x): elu + 1 has the slope min(y, 1), so no second exponential."""
    if PHI == "elu1":
        slope = tl.minimum(y, 1.0)
    elif PHI == "relu":
        slope = tl.where(y > 0, 1.0, 0.0)
    elif PHI == "relu_eps":
        slope = tl.where(y > 1e-6, 1.0, 0.0)
    else:
        slope = tl.full(y.shape, 1.0, tl.float32)
    return slope


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "splits",
        "tokens_per_split",
        "q_sb",
        "q_sn",
        "q_sh",
        "g_sb",
        "g_sn",
        "g_sh",
        "dq_sb",
        "dq_sn",
        "dq_sh",
        "eps",
    ]
)
def linear_bwd_q(
    Q,  # [B, N, H, D]
    DO,  # [B, N, H, DV]
    KV,  # [B, H, D, DV] float32
    K_MEAN,  # [B, H, D] float32
    COUNT,  # [B] float32
    DQ,  # [B, N, H, D]
    PARTIAL,  # [B, H, splits, D·DV + D] float32: dS and dm of this split
    tokens,
    heads,
    splits,
    tokens_per_split,
    q_sb,
    q_sn,
    q_sh,
    g_sb,
    g_sn,
    g_sh,
    dq_sb,
    dq_sn,
    dq_sh,
    eps,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PHI: tl.constexpr,
    NORMALIZER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dq and this split's part of dS, dm in one pass over q and dO; D ≤ BD and DV ≤ BE."""
    pid = tl.program_id(0).to(tl.int64)
    h = pid % heads
    split = (pid // heads) % splits
    b = pid // heads // splits
    d = tl.arange(0, BD)  # [BD]
    e = tl.arange(0, BE)  # [BE]
    Q += (b * q_sb + h * q_sh) * ALIGN
    DO += (b * g_sb + h * g_sh) * ALIGN
    DQ += (b * dq_sb + h * dq_sh) * ALIGN
    inside_state = (d < D)[:, None] & (e < DV)[None, :]
    at = d[:, None] * DV + e[None, :]  # [BD, BE]
    s = tl.load(KV + (b * heads + h) * (D * DV) + at, mask=inside_state, other=0.0).to(DOT)
    count = tl.load(COUNT + b)
    m = tl.load(K_MEAN + (b * heads + h) * D + d, mask=d < D, other=0.0)  # [BD]

    ds = tl.zeros([BD, BE], tl.float32)
    dm = tl.zeros([BD], tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    for start in range(first, last, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)  # [BN]
        inside = n < last
        q_mask = inside[:, None] & (d < D)[None, :]
        q = tl.load(Q + n[:, None] * q_sn * ALIGN + d[None, :], mask=q_mask, other=0.0)
        do = tl.load(
            DO + n[:, None] * g_sn * ALIGN + e[None, :],
            mask=inside[:, None] & (e < DV)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BN, BE]
        q = tl.where(inside[:, None], phi(q.to(tl.float32), PHI), 0.0)  # [BN, BD]
        do = do.to(DOT)
        g = tl.dot(do, tl.trans(s), input_precision=PRECISION)  # [BN, BD]
        if NORMALIZER == "none":
            dq = g * count
            q_over_z = q
        else:
            z = tl.where(inside, tl.sum(q * m[None, :], 1), 1.0)  # [BN]
            inv = one_over(z, count, eps, NORMALIZER)
            # (x / z) / z: on a row of zeros 1/z may be c/ε = 1e21, whose square is infinite.
            delta = -(tl.sum(q * g, 1) * inv) * inv
            dq = g * inv[:, None] + delta[:, None] * m[None, :]
            dm += tl.sum(q * delta[:, None], 0)
            q_over_z = q * inv[:, None]
        dq *= phi_slope(q, PHI)
        tl.store(
            DQ + n[:, None] * dq_sn * ALIGN + d[None, :],
            dq.to(DQ.dtype.element_ty),
            mask=q_mask,
        )
        ds = tl.dot(tl.trans(q_over_z.to(DOT)), do, ds, input_precision=PRECISION)

    PARTIAL += ((b * heads + h) * splits + split) * (D * DV + D)
    tl.store(PARTIAL + at, ds, mask=inside_state)
    tl.store(PARTIAL + D * DV + d, dm, mask=d < D)


@triton.jit
def grad_of_features(
    DO, KV, d, inside, D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dO Sᵀ, summed over the tiles of DV. `DO` points at rows [BN, 1]."""
    g = tl.zeros([BN, BD], tl.float32)
    for e_start in range(0, DV, BE):
        e = e_start + tl.arange(0, BE)  # [BE]
        do = tl.load(DO + e[None, :], mask=inside & (e < DV)[None, :], other=0.0)  # [BN, BE]
        s = tl.load(
            KV + d[:, None] * DV + e[None, :],
            mask=(d < D)[:, None] & (e < DV)[None, :],
            other=0.0,
        )  # [BD, BE]
        g = tl.dot(do.to(tl.float32).to(DOT), tl.trans(s.to(DOT)), g, input_precision=PRECISION)
    return g


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "q_sb",
        "q_sn",
        "q_sh",
        "g_sb",
        "g_sn",
        "g_sh",
        "dq_sb",
        "dq_sn",
        "dq_sh",
        "eps",
    ]
)
def linear_bwd_q_rows(
    Q,  # [B, N, H, D]
    DO,  # [B, N, H, DV]
    KV,  # [B, H, D, DV] float32
    K_MEAN,  # [B, H, D] float32
    COUNT,  # [B] float32
    DQ,  # [B, N, H, D]
    INV,  # [B, H, N] float32: 1/z
    DELTA,  # [B, H, N] float32
    tokens,
    heads,
    q_sb,
    q_sn,
    q_sh,
    g_sb,
    g_sn,
    g_sh,
    dq_sb,
    dq_sn,
    dq_sh,
    eps,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PHI: tl.constexpr,
    NORMALIZER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dq, 1/z and δ for one block of queries; `linear_state_fwd` then weighs dS and dm by them.

    The split form of `linear_bwd_q`, for heads whose dS would not fit beside dq in registers.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, BN)
    h = pid % heads
    b = pid // heads // blocks
    n = (pid // heads) % blocks * BN + tl.arange(0, BN)  # [BN]
    inside = (n < tokens)[:, None]
    Q += (b * q_sb + h * q_sh + n[:, None] * q_sn) * ALIGN
    DO += (b * g_sb + h * g_sh + n[:, None] * g_sn) * ALIGN
    DQ += (b * dq_sb + h * dq_sh + n[:, None] * dq_sn) * ALIGN
    KV += (b * heads + h) * (D * DV)
    K_MEAN += (b * heads + h) * D
    count = tl.load(COUNT + b)

    inv = tl.full([BN], 1.0, tl.float32)
    delta = tl.zeros([BN], tl.float32)
    if NORMALIZER != "none" and D > BD:
        # z and φ(q)·g need every column of q before the first column of dq can be written.
        z = tl.zeros([BN], tl.float32)
        dot = tl.zeros([BN], tl.float32)
        for d_start in range(0, D, BD):
            d = d_start + tl.arange(0, BD)  # [BD]
            q = tl.load(Q + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
            q = phi(q.to(tl.float32), PHI)  # [BN, BD]
            g = grad_of_features(DO, KV, d, inside, D, DV, BN, BD, BE, DOT, PRECISION)
            z += tl.sum(q * tl.load(K_MEAN + d, mask=d < D, other=0.0)[None, :], 1)
            dot += tl.sum(q * g, 1)
        inv = one_over(z, count, eps, NORMALIZER)
        delta = -(dot * inv) * inv
    for d_start in range(0, D, BD):
        d = d_start + tl.arange(0, BD)  # [BD]
        mask = inside & (d < D)[None, :]
        q = phi(tl.load(Q + d[None, :], mask=mask, other=0.0).to(tl.float32), PHI)  # [BN, BD]
        g = grad_of_features(DO, KV, d, inside, D, DV, BN, BD, BE, DOT, PRECISION)
        if NORMALIZER == "none":
            dq = g * count
        else:
            m = tl.load(K_MEAN + d, mask=d < D, other=0.0)  # [BD]
            if D <= BD:
                inv = one_over(tl.sum(q * m[None, :], 1), count, eps, NORMALIZER)
                delta = -(tl.sum(q * g, 1) * inv) * inv
            dq = g * inv[:, None] + delta[:, None] * m[None, :]
        dq *= phi_slope(q, PHI)
        tl.store(DQ + d[None, :], dq.to(DQ.dtype.element_ty), mask=mask)
    row = (b * heads + h) * tokens + n
    tl.store(INV + row, inv, mask=n < tokens)
    tl.store(DELTA + row, delta, mask=n < tokens)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "k_sb",
        "k_sn",
        "k_sh",
        "v_sb",
        "v_sn",
        "v_sh",
        "dk_sb",
        "dk_sn",
        "dk_sh",
        "dv_sb",
        "dv_sn",
        "dv_sh",
        "w_sb",
    ]
)
def linear_bwd_kv(
    K,  # [B, M, H, D]
    V,  # [B, M, H, DV]
    W,  # [B, M] float32
    DKV,  # [B, H, D, DV] float32: gradient of the mean state
    DK_MEAN,  # [B, H, D] float32
    COUNT,  # [B] float32
    DK,  # [B, M, H, D]
    DV_OUT,  # [B, M, H, DV]
    tokens,
    heads,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    dk_sb,
    dk_sn,
    dk_sh,
    dv_sb,
    dv_sn,
    dv_sh,
    w_sb,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PHI: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dk and dv for one block of keys of one head."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, BN)
    h = pid % heads
    b = pid // heads // blocks
    n = (pid // heads) % blocks * BN + tl.arange(0, BN)  # [BN]
    inside = (n < tokens)[:, None]
    K += (b * k_sb + h * k_sh + n[:, None] * k_sn) * ALIGN
    V += (b * v_sb + h * v_sh + n[:, None] * v_sn) * ALIGN
    DK += (b * dk_sb + h * dk_sh + n[:, None] * dk_sn) * ALIGN
    DV_OUT += (b * dv_sb + h * dv_sh + n[:, None] * dv_sn) * ALIGN
    DKV += (b * heads + h) * (D * DV)
    DK_MEAN += (b * heads + h) * D
    count = tl.load(COUNT + b)
    # Applied to dS before it is rounded: dS grows with the number of queries, dS/c does not.
    scale = 1.0 / tl.where(count == 0, 1.0, count)
    w = tl.full([BN], 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(W + b * w_sb + n, mask=n < tokens, other=0.0)

    for d_start in range(0, D, BD):
        d = d_start + tl.arange(0, BD)  # [BD]
        k_mask = inside & (d < D)[None, :]
        dk = tl.zeros([BN, BD], tl.float32)
        for e_start in range(0, DV, BE):
            e = e_start + tl.arange(0, BE)  # [BE]
            v = tl.load(V + e[None, :], mask=inside & (e < DV)[None, :], other=0.0)  # [BN, BE]
            ds = tl.load(
                DKV + d[:, None] * DV + e[None, :],
                mask=(d < D)[:, None] & (e < DV)[None, :],
                other=0.0,
            )  # [BD, BE]
            ds = tl.trans((ds * scale).to(DOT))
            dk = tl.dot(v.to(tl.float32).to(DOT), ds, dk, input_precision=PRECISION)
        k = phi(tl.load(K + d[None, :], mask=k_mask, other=0.0).to(tl.float32), PHI)  # [BN, BD]
        dm = tl.load(DK_MEAN + d, mask=d < D, other=0.0)  # [BD]
        dk = (dk + (dm * scale)[None, :]) * w[:, None] * phi_slope(k, PHI)
        if WEIGHTED:
            dk = tl.where(w[:, None] == 0, 0.0, dk)
        tl.store(DK + d[None, :], dk.to(DK.dtype.element_ty), mask=k_mask)

    for e_start in range(0, DV, BE):
        e = e_start + tl.arange(0, BE)  # [BE]
        dv = tl.zeros([BN, BE], tl.float32)
        for d_start in range(0, D, BD):
            d = d_start + tl.arange(0, BD)  # [BD]
            k = tl.load(K + d[None, :], mask=inside & (d < D)[None, :], other=0.0)  # [BN, BD]
            k = phi(k.to(tl.float32), PHI)
            ds = tl.load(
                DKV + d[:, None] * DV + e[None, :],
                mask=(d < D)[:, None] & (e < DV)[None, :],
                other=0.0,
            )  # [BD, BE]
            dv = tl.dot(k.to(DOT), (ds * scale).to(DOT), dv, input_precision=PRECISION)
        dv *= w[:, None]
        if WEIGHTED:
            dv = tl.where(w[:, None] == 0, 0.0, dv)
        tl.store(
            DV_OUT + e[None, :],
            dv.to(DV_OUT.dtype.element_ty),
            mask=inside & (e < DV)[None, :],
        )
