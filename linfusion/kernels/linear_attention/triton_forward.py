# mypy: ignore-errors
# The bodies are Triton's language; Python's types do not describe them.
"""Triton kernels of the forward pass: per-split states, their reduction, and the read.

Tensors are sequence first, heads last. Conventions held by every kernel here and in
`triton_backward.py`:

* One grid axis. `program_id(0)` becomes int64 at once, so no product of it can wrap at 2³¹.
* Every stride arrives divided by the constexpr `ALIGN` (a power of two that divides them all) and
  is multiplied back in the kernel. The compiler then knows that a head offset of, say, 40 elements
  is a multiple of 8 and keeps 16-byte loads; a run-time stride of 40 would cost 2-byte loads.
* Run-time integers are never specialised on, so no resolution compiles anything anew.
* Tiles are upcast on load. `DOT` is the type the operands of a matrix product are rounded to.

These kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 and interpreted on a CPU; they
have never run on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def phi(x, PHI: tl.constexpr):
    """The feature map, in the type of `x` (float32). NaN goes through, as in PyTorch."""
    if PHI == "elu1":
        y = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif PHI == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif PHI == "relu_eps":
        y = tl.where(x < 0, 0.0, x) + 1e-6
    else:
        y = x
    return y


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "splits",
        "tokens_per_split",
        "k_sb",
        "k_sn",
        "k_sh",
        "v_sb",
        "v_sn",
        "v_sh",
        "w_sb",
        "w_sh",
    ]
)
def linear_state_fwd(
    K,  # [B, N, H, D]
    V,  # [B, N, H, DV]
    W_KV,  # [B or B·H, N] float32, weight of a token in the state
    W_K,  # [B or B·H, N] float32, weight of a token in the sum of keys
    PARTIAL,  # [B, H, splits, D·DV + D] float32
    tokens,
    heads,
    splits,
    tokens_per_split,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    w_sb,
    w_sh,
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
    """One tile of Σ_j φ(k_j)ᵀ v_j and of Σ_j φ(k_j), over one split of the tokens."""
    E_TILES: tl.constexpr = (DV + BE - 1) // BE
    TILES: tl.constexpr = E_TILES * ((D + BD - 1) // BD)
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % TILES  # fastest: the tiles of one split read the same tokens through L2
    h = (pid // TILES) % heads  # then heads: neighbours in memory
    split = (pid // TILES // heads) % splits
    b = pid // TILES // heads // splits
    d = (tile // E_TILES).to(tl.int32) * BD + tl.arange(0, BD)  # [BD]
    e = (tile % E_TILES).to(tl.int32) * BE + tl.arange(0, BE)  # [BE]
    K += (b * k_sb + h * k_sh) * ALIGN
    V += (b * v_sb + h * v_sh) * ALIGN
    W_KV += b * w_sb + h * w_sh
    W_K += b * w_sb + h * w_sh

    kv = tl.zeros([BD, BE], tl.float32)
    k_sum = tl.zeros([BD], tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    for start in range(first, last, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)  # [BN]
        inside = n < last
        k = tl.load(
            K + n[:, None] * k_sn * ALIGN + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BN, BD]
        v = tl.load(
            V + n[:, None] * v_sn * ALIGN + e[None, :],
            mask=inside[:, None] & (e < DV)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BN, BE]
        # φ(0) = 1: tokens past the end are masked after φ. Columns d ≥ D need no mask, they are
        # never stored.
        k = tl.where(inside[:, None], phi(k, PHI), 0.0)
        if WEIGHTED:
            w_k = tl.load(W_K + n, mask=inside, other=0.0)[:, None]
            w_kv = tl.load(W_KV + n, mask=inside, other=0.0)[:, None]
            # What is masked may be anything, also NaN.
            k_sum += tl.sum(tl.where(w_k == 0, 0.0, k * w_k), 0)
            k = tl.where(w_kv == 0, 0.0, k * w_kv)
            v = tl.where(w_kv == 0, 0.0, v)
        else:
            k_sum += tl.sum(k, 0)
        kv = tl.dot(tl.trans(k.to(DOT)), v.to(DOT), kv, input_precision=PRECISION)

    PARTIAL += ((b * heads + h) * splits + split) * (D * DV + D)
    at = d[:, None] * DV + e[None, :]  # [BD, BE]
    tl.store(PARTIAL + at, kv, mask=(d < D)[:, None] & (e < DV)[None, :])
    tl.store(PARTIAL + D * DV + d, k_sum, mask=d < tl.where(tile % E_TILES == 0, D, 0))


@triton.jit(do_not_specialize=["heads", "splits", "tokens"])
def linear_state_reduce(
    PARTIAL,  # [B, H, splits, D·DV + D] float32
    COUNT,  # [B] float32
    KV,  # [B, H, D, DV] float32
    K_MEAN,  # [B, H, D] float32
    heads,
    splits,
    tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Add the splits in the order of their index, then scale once: 1/count, count or 1.

    With the scale "count", it is tokens that are counted: 1/tokens, and COUNT is written.
    """
    SIZE: tl.constexpr = D * DV + D
    CHUNKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    bh = pid // CHUNKS
    i = (pid % CHUNKS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    PARTIAL += bh * splits * SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(PARTIAL + i, mask=i < SIZE, other=0.0)
        PARTIAL += SIZE
    if SCALE == "count":
        count = tokens.to(tl.float32)
        total /= count
        tl.store(COUNT + bh // heads, count, mask=(bh % heads == 0) & (pid % CHUNKS == 0))
    elif SCALE != "one":
        count = tl.load(COUNT + bh // heads)
        if SCALE == "mean":
            total /= tl.where(count == 0, 1.0, count)  # every key masked out: zeros, not 0/0
        else:
            total *= count
    tl.store(KV + bh * (D * DV) + i, total, mask=i < D * DV)
    tl.store(K_MEAN + bh * D + (i - D * DV), total, mask=(i >= D * DV) & (i < SIZE))


@triton.jit
def one_over(z, count, eps, NORMALIZER: tl.constexpr):
    """1/z of a normaliser, for z and S that are means: 1/(z + ε), or c/(c·z + ε) for sums."""
    return 1.0 / (z + eps) if NORMALIZER == "mean" else count / (count * z + eps)


@triton.jit(
    do_not_specialize=["tokens", "heads", "q_sb", "q_sn", "q_sh", "o_sb", "o_sn", "o_sh", "eps"]
)
def linear_out_fwd(
    Q,  # [B, N, H, D]
    KV,  # [B, H, D, DV] float32
    K_MEAN,  # [B, H, D] float32
    COUNT,  # [B] float32
    OUT,  # [B, N, H, DV]
    tokens,
    heads,
    q_sb,
    q_sn,
    q_sh,
    o_sb,
    o_sn,
    o_sh,
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
    """o_i = φ(q_i)·S / (φ(q_i)·m + ε) for one block of queries of one head."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, BN)
    h = pid % heads
    b = pid // heads // blocks
    n = (pid // heads) % blocks * BN + tl.arange(0, BN)  # [BN]
    inside = (n < tokens)[:, None]
    Q += (b * q_sb + h * q_sh + n[:, None] * q_sn) * ALIGN
    OUT += (b * o_sb + h * o_sh + n[:, None] * o_sn) * ALIGN
    KV += (b * heads + h) * (D * DV)
    K_MEAN += (b * heads + h) * D
    count = tl.load(COUNT + b)

    for e_start in range(0, DV, BE):
        e = e_start + tl.arange(0, BE)  # [BE]
        o = tl.zeros([BN, BE], tl.float32)
        z = tl.zeros([BN], tl.float32)
        for d_start in range(0, D, BD):
            d = d_start + tl.arange(0, BD)  # [BD]
            q = tl.load(Q + d[None, :], mask=inside & (d < D)[None, :], other=0.0)  # [BN, BD]
            q = phi(q.to(tl.float32), PHI)
            # Columns d ≥ D hold φ(0) = 1, and meet zeros in both products.
            s = tl.load(
                KV + d[:, None] * DV + e[None, :],
                mask=(d < D)[:, None] & (e < DV)[None, :],
                other=0.0,
            )  # [BD, BE]
            if NORMALIZER != "none":
                z += tl.sum(q * tl.load(K_MEAN + d, mask=d < D, other=0.0)[None, :], 1)
            o = tl.dot(q.to(DOT), s.to(DOT), o, input_precision=PRECISION)
        if NORMALIZER == "none":
            o *= count
        else:
            o *= one_over(z, count, eps, NORMALIZER)[:, None]
        tl.store(OUT + e[None, :], o.to(OUT.dtype.element_ty), mask=inside & (e < DV)[None, :])
