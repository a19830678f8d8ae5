"""Linear attention in Triton: what launches the kernels of `triton_forward` and `triton_backward`.

The kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 (`make aot`,
`docs/kernels-aot.md`) and compared with the reference in Triton's interpreter. They have never run
on a GPU.

Tensors are [B, N, H, D] with any strides for batch, token and head; a last axis that is not
contiguous is copied once. Loads are 16 bytes wide when every stride is a multiple of 16 bytes, as
it is for D in 40, 64, 80, 128, 160.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import (
    DOT,
    Launch,
    Target,
    cdiv,
    rows,
    stride_arguments,
    target_of,
)
from linfusion.kernels.linear_attention.common import Choices, LinearState
from linfusion.kernels.linear_attention.triton_backward import (
    linear_bwd_kv,
    linear_bwd_q,
    linear_bwd_q_rows,
)
from linfusion.kernels.linear_attention.triton_configs import (
    Tile,
    fuses_backward,
    num_splits,
    tile_for,
)
from linfusion.kernels.linear_attention.triton_forward import (
    linear_out_fwd,
    linear_state_fwd,
    linear_state_reduce,
)

__all__ = [
    "Launch",
    "Target",
    "attention_backward",
    "read_backward",
    "read_forward",
    "state_backward",
    "state_forward",
]

_REDUCE_BLOCK = 1024


def state_forward(
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    feature_map: str,
    *,
    splits: int | None = None,
    target: Target | None = None,
) -> LinearState:
    """The state of the keys and values: means over the tokens of φ(k)ᵀ v and of φ(k).

    Bitwise reproducible for a given shape, GPU and `splits`.

    Args:
        k: [B, M, H, D], float32, float16 or bfloat16.
        v: [B, M, H, Dv].
        key_weight: weight of each key, [B, M] or [1, M], applied after the feature map, or None.
        feature_map: "elu1", "relu", "relu_eps" or "identity".
        splits: programs that share the tokens of one head; None decides from the shape.

    """
    target = target or target_of(k)
    batch, tokens = k.shape[:2]
    if key_weight is None:
        count = torch.empty(batch, dtype=torch.float32, device=k.device)  # of tokens: written below
        return LinearState(*_state(k, v, None, count, "count", feature_map, splits, target), count)
    weight = _key_weight(key_weight, batch, tokens)
    count = weight.sum(1)
    weights = (weight, weight, tokens, 0)
    return LinearState(*_state(k, v, weights, count, "mean", feature_map, splits, target), count)


def read_forward(
    q: Tensor,
    state: LinearState,
    choices: Choices,
    out_dtype: torch.dtype,
    *,
    target: Target | None = None,
) -> Tensor:
    """The output of each query: φ(q)·S / (φ(q)·m + ε).

    Args:
        q: [B, N, H, D].
        state: what `state_forward` returns.
        choices: with the normaliser "sum", S, m are sums and ε is on their scale; with "none", the
            output is φ(q)·S with S a sum.
        out_dtype: of the result.

    Returns:
        [B, N, H, Dv], contiguous.
    """
    target = target or target_of(q)
    q, (kv, k_mean, count) = rows(q), _contiguous(state)
    batch, tokens, heads, d = q.shape
    dv = kv.shape[-1]
    o = torch.empty(batch, tokens, heads, dv, dtype=out_dtype, device=q.device)
    tile = _tile(target, "out", d, dv, q)
    _launch(
        target,
        linear_out_fwd,
        batch * heads * cdiv(tokens, tile.tokens),
        tile,
        {"Q": q, "KV": kv, "K_MEAN": k_mean, "COUNT": count, "OUT": o}
        | {"tokens": tokens, "heads": heads, "eps": float(choices.eps)}
        | stride_arguments(q=q, o=o)
        | _constants(d, dv, tile, choices.feature_map, target.vendor, q.dtype)
        | {"NORMALIZER": choices.normalizer},
    )
    return o


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    state: LinearState,
    choices: Choices,
    *,
    splits: int | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `read_forward(q, state_forward(k, v))` (equations: `triton_backward`).

    Args:
        do: gradient of the output, [B, N, H, Dv].

    Returns:
        dq, dk and dv, in the dtypes of q, k and v.
    """
    dq, dkv, dk_mean = read_backward(do, q, state, choices, splits=splits, target=target)
    dk, dv = state_backward(
        dkv, dk_mean, k, v, key_weight, state.count, choices.feature_map, target=target
    )
    return dq, dk, dv


def read_backward(
    do: Tensor,
    q: Tensor,
    state: LinearState,
    choices: Choices,
    *,
    splits: int | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `read_forward` with respect to q, kv and k_mean.

    One pass over q and do where `fuses_backward` allows it (heads of up to 64 columns), else two.
    """
    target = target or target_of(q)
    do, q = rows(do), rows(q)
    kv, k_mean, count = _contiguous(state)
    feature_map, normalizer, eps = choices
    batch, tokens, heads, d = q.shape
    dv = do.shape[-1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    itemsize = max(q.element_size(), do.element_size())
    fused = fuses_backward(target.vendor, d, dv, itemsize, target.arch)
    tile = _tile(target, "bwd_q" if fused else "bwd_q_rows", d, dv, q, do)
    args = (
        {"Q": q, "DO": do, "KV": kv, "K_MEAN": k_mean, "COUNT": count, "DQ": dq}
        | {"tokens": tokens, "heads": heads, "eps": float(eps)}
        | stride_arguments(q=q, g=do, dq=dq)
        | _constants(d, dv, tile, feature_map, target.vendor, q.dtype, do.dtype)
        | {"NORMALIZER": normalizer}
    )
    # The partial sums are gradients of S, which is c times the mean where nothing normalises.
    scale = "sum" if normalizer == "none" else "one"
    if not fused:
        inv = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
        delta = torch.empty_like(inv)
        programs = batch * heads * cdiv(tokens, tile.tokens)
        args |= {"INV": inv, "DELTA": delta}
        _launch(target, linear_bwd_q_rows, programs, tile, args)
        weights = (inv, delta, heads * tokens, tokens)
        return dq, *_state(q, do, weights, count, scale, feature_map, splits, target)
    splits, share = _split(target, splits, tokens, d, batch * heads, tile)
    partial = torch.empty(batch, heads, splits, d * dv + d, dtype=torch.float32, device=q.device)
    args |= {"PARTIAL": partial, "splits": splits, "tokens_per_split": share}
    _launch(target, linear_bwd_q, batch * heads * splits, tile, args)
    return dq, *_reduce(partial, tokens, count, d, dv, scale, target)


def state_backward(
    dkv: Tensor,
    dk_mean: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    count: Tensor,
    feature_map: str,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `state_forward` with respect to k and v, from those of kv and k_mean."""
    target = target or target_of(k)
    k, v, count = rows(k), rows(v), count.contiguous()
    dkv, dk_mean = dkv.contiguous(), dk_mean.contiguous()
    batch, tokens, heads, d = k.shape
    dv = v.shape[-1]
    weight = None if key_weight is None else _key_weight(key_weight, batch, tokens)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv_out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = _tile(target, "bwd_kv", d, dv, k, v)
    _launch(
        target,
        linear_bwd_kv,
        batch * heads * cdiv(tokens, tile.tokens),
        tile,
        {"K": k, "V": v, "W": count if weight is None else weight}
        | {"DKV": dkv, "DK_MEAN": dk_mean, "COUNT": count, "DK": dk, "DV_OUT": dv_out}
        | {"tokens": tokens, "heads": heads, "w_sb": tokens}
        | stride_arguments(k=k, v=v, dk=dk, dv=dv_out)
        | _constants(d, dv, tile, feature_map, target.vendor, k.dtype, v.dtype)
        | {"WEIGHTED": weight is not None},
    )
    return dk, dv_out


def _state(
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor, int, int] | None,
    count: Tensor,
    scale: str,
    feature_map: str,
    splits: int | None,
    target: Target,
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of φ(k)ᵀ v and φ(k), weighted, scaled once.

    `weights` is (of φ(k)ᵀ v, of φ(k), stride over the batch, stride over heads).
    """
    k, v = rows(k), rows(v)
    batch, tokens, heads, d = k.shape
    dv = v.shape[-1]
    tile = _tile(target, "state", d, dv, k, v)
    groups = batch * heads * cdiv(d, tile.d) * cdiv(dv, tile.e)
    splits, share = _split(target, splits, tokens, d, groups, tile)
    partial = torch.empty(batch, heads, splits, d * dv + d, dtype=torch.float32, device=k.device)
    w_kv, w_k, w_sb, w_sh = weights or (count, count, 0, 0)
    _launch(
        target,
        linear_state_fwd,
        groups * splits,
        tile,
        {"K": k, "V": v, "W_KV": w_kv, "W_K": w_k, "PARTIAL": partial}
        | {"tokens": tokens, "heads": heads, "splits": splits, "tokens_per_split": share}
        | stride_arguments(k=k, v=v)
        | {"w_sb": w_sb, "w_sh": w_sh}
        | _constants(d, dv, tile, feature_map, target.vendor, k.dtype, v.dtype)
        | {"WEIGHTED": weights is not None},
    )
    return _reduce(partial, tokens, count, d, dv, scale, target)


def _reduce(
    partial: Tensor, tokens: int, count: Tensor, d: int, dv: int, scale: str, target: Target
) -> tuple[Tensor, Tensor]:
    batch, heads, splits, size = partial.shape
    kv = torch.empty(batch, heads, d, dv, dtype=torch.float32, device=partial.device)
    k_mean = torch.empty(batch, heads, d, dtype=torch.float32, device=partial.device)
    args: dict[str, Any] = {"PARTIAL": partial, "COUNT": count, "KV": kv, "K_MEAN": k_mean}
    args |= {"heads": heads, "splits": splits, "tokens": tokens}
    args |= {"D": d, "DV": dv, "BLOCK": _REDUCE_BLOCK, "SCALE": scale}
    programs = batch * heads * cdiv(size, _REDUCE_BLOCK)
    _launch(target, linear_state_reduce, programs, Tile(1, d, dv, warps=4, stages=1), args)
    return kv, k_mean


def _launch(target: Target, kernel: Any, programs: int, tile: Tile, args: dict[str, Any]) -> None:
    # Whether a·b + c is fused is said here, since Triton 3.10 will change its default.
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    target.launch(Launch(kernel, programs, args, options))


def _tile(target: Target, kernel: str, d: int, dv: int, *operands: Tensor) -> Tile:
    vendor = "hip" if target.vendor == "interpreter" else target.vendor
    itemsize = max(t.element_size() for t in operands)
    return tile_for(vendor, kernel, d, dv, itemsize, target.arch)


def _split(
    target: Target, splits: int | None, tokens: int, d: int, groups: int, tile: Tile
) -> tuple[int, int]:
    """The number of splits, and the tokens of each: a multiple of the block."""
    if splits is None:
        splits = num_splits(tokens, d, groups, tile.tokens, target.multiprocessors)
    blocks = cdiv(tokens, tile.tokens)
    return splits, cdiv(blocks, splits) * tile.tokens


@functools.lru_cache(1024)
def _constants(
    d: int, dv: int, tile: Tile, feature_map: str, vendor: str, *operands: torch.dtype
) -> dict[str, Any]:
    """Not to be changed."""
    # The interpreter's products in half precision are not those of a GPU (in bfloat16 they are
    # wrong), so there the operands stay in float32. Elsewhere float32 keeps its 24 bits:
    # three TF32 products on NVIDIA, and native float32 matrix instructions on AMD.
    dtypes = set(operands)
    exact = vendor == "interpreter" or len(dtypes) > 1
    sizes = {"D": d, "DV": dv, "BN": tile.tokens, "BD": tile.d, "BE": tile.e}
    return sizes | {
        "PHI": feature_map,
        "DOT": tl.float32 if exact else DOT[dtypes.pop()],
        "PRECISION": "tf32x3" if vendor == "cuda" else "ieee",
    }


def _contiguous(state: LinearState) -> LinearState:
    return LinearState(*(x.contiguous() for x in state))


def _key_weight(key_weight: Tensor, batch: int, tokens: int) -> Tensor:
    return key_weight.to(torch.float32).expand(batch, tokens).contiguous()
