"""The scan in Triton: what launches the kernels of `triton_forward` and `triton_backward`.

The kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 (`make aot`,
`docs/kernels-aot.md`) and compared with the reference in Triton's interpreter. They have never run
on a GPU.

Tokens, keys and queries may have any strides for batch, token and head; a last axis that is not
contiguous is copied once. Nothing as long as the tokens times the chunk is ever allocated: products
of keys and queries are computed where they are used. What is kept for the backward pass is the
state before every chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import DOT, Launch, Target, named, rows, strides_of, target_of
from linfusion.kernels.ssd.common import triton_chunk_of
from linfusion.kernels.ssd.triton_backward import (
    ssd_bwd_decays,
    ssd_bwd_keys,
    ssd_bwd_within,
)
from linfusion.kernels.ssd.triton_configs import Step, num_splits, step_for
from linfusion.kernels.ssd.triton_forward import ssd_cumsum, ssd_pass, ssd_read, ssd_states

__all__ = ["Launch", "Target", "scan", "scan_backward"]

_SUM_HEADS = 8
_PASS_BLOCK = 512
_DECAYS_BLOCK = 1024
_PLAIN = Step(1, 1, 1, warps=4, stages=1)  # of kernels without products


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    seg: Tensor | None,
    chunk_size: int,
    reverse: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, L, H, P], last state [B, H, P, N] and the state before every chunk
    [B, chunks, H, P, N] in the order of the scan; arguments as `reference`."""
    target = target or target_of(x)
    x, b, c, dt = rows(x), rows(b), rows(c), dt.contiguous()
    chunk = triton_chunk_of(chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = _cumsum(target, a, seg, chunk, reverse)
    kept = _states(target, b, x, dt, s, (x, b, c), chunk, reverse, backward=False)
    final = _pass(target, s, kept, initial, chunk, backward=False)
    _read(target, c, b, x, x, dt, s, kept, skip, y, None, None, chunk, reverse, backward=False)
    return y, final, kept


def scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    seg: Tensor | None,
    kept: Tensor,
    chunk_size: int,
    reverse: bool,
    *,
    splits: int | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, skip and the initial state (equations: `triton_backward`).

    `splits` programs share the heads of a group; None decides from the shape.
    """
    target = target or target_of(x)
    dy, x, b, c, dt, kept = rows(dy), rows(x), rows(b), rows(c), dt.contiguous(), kept.contiguous()
    batch, length, heads, channels = x.shape
    chunk = triton_chunk_of(chunk_size)
    s = _cumsum(target, a, seg, chunk, reverse)
    dstates = _states(target, c, dy, dt, s, (x, b, c), chunk, reverse, backward=True)
    dinitial = _pass(target, s, dstates, dfinal, chunk, backward=True)

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    step = _step(target, "read", chunk, x, b, c)
    tiles = 0 if skip is None else triton.cdiv(length, step.held)
    share = torch.empty(batch, tiles, heads, channels, dtype=torch.float32, device=x.device)
    _read(target, b, c, dy, x, dt, s, dstates, skip, dx, ddt, share, chunk, reverse, backward=True)
    dskip = x.new_zeros(batch, 0) if skip is None else share.sum(1).to(skip.dtype)

    step = _step(target, "keys", chunk, x, b, c)
    tiles = triton.cdiv(length, step.held)
    between = torch.empty((batch, tiles, heads, chunk), dtype=torch.float32, device=x.device)
    choices = (between, splits, chunk, reverse)
    dc, read, into = _keys(target, c, b, dy, x, dt, s, kept, *choices, backward=False)
    db, written, out_of = _keys(target, b, c, x, dy, dt, s, dstates, *choices, backward=True)
    within = torch.empty_like(read)
    args: dict[str, Any] = {"B": b, "C": c, "X": x, "DY": dy, "DT": dt, "S": s, "WITHIN": within}
    args |= _sizes(b, x) | _strides(b=b, c=c, x=x, g=dy)
    constants = _constants(b, x, step, chunk, reverse, True, target, (x, b, c))
    names = ("P", "N", "BM", "BK", "REVERSE", "DOT", "PRECISION")
    args |= {name: constants[name] for name in names} | {"BD": _columns(step, constants)}
    _launch(target, ssd_bwd_within, batch * heads * tiles, args, step)

    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    args = {"S": s, "STATES": kept, "DSTATES": dstates, "WITHIN": within, "DA": da}
    args |= {"READ": read, "WRITTEN": written, "BETWEEN": between, "INTO": into, "OUT_OF": out_of}
    args |= {"length": length, "heads": heads, "SIZE": channels * b.shape[3]}
    args |= {"BLOCK": _DECAYS_BLOCK, "BM": step.held, "CHUNK": chunk, "REVERSE": reverse}
    _launch(target, ssd_bwd_decays, batch * heads * kept.shape[1], args)
    return dx, ddt, da, db, dc, dskip, dinitial


def _cumsum(target: Target, a: Tensor, seg: Tensor | None, chunk: int, reverse: bool) -> Tensor:
    """Sums of log-decays up to and with each place of its chunk, high and low, [B, H, 2, L]."""
    a = a.contiguous()
    batch, length, heads = a.shape
    s = torch.empty(batch, heads, 2, length, dtype=torch.float32, device=a.device)
    args: dict[str, Any] = {"A": a, "SEG": a if seg is None else seg.contiguous(), "S": s}
    args |= {"length": length, "heads": heads, "CHUNK": chunk, "BH": _SUM_HEADS}
    args |= {"SEGMENTS": seg is not None, "REVERSE": reverse}
    programs = batch * triton.cdiv(length, chunk) * triton.cdiv(heads, _SUM_HEADS)
    _launch(target, ssd_cumsum, programs, args)
    return s


def _states(
    target: Target,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    s: Tensor,
    operands: tuple[Tensor, ...],
    chunk: int,
    reverse: bool,
    backward: bool,
) -> Tensor:
    """What every chunk adds to a state, [B, chunks, H, P, N]."""
    batch, length, heads, channels = v.shape
    features, chunks = k.shape[3], triton.cdiv(length, chunk)
    states = torch.empty(
        batch, chunks, heads, channels, features, dtype=torch.float32, device=v.device
    )
    step = _step(target, "states", chunk, *operands)
    args: dict[str, Any] = {"K": k, "V": v, "DT": dt, "S": s, "STATES": states}
    args |= _sizes(k, v) | _strides(k=k, v=v)
    args |= _constants(k, v, step, chunk, reverse, backward, target, operands)
    del args["BM"]  # it holds a tile of the state
    args |= {"BP": min(args["BP"], step.columns), "BN": min(args["BN"], step.columns)}
    tiles = triton.cdiv(channels, args["BP"]) * triton.cdiv(features, args["BN"])
    _launch(target, ssd_states, batch * chunks * heads * tiles, args, step)
    return states


def _pass(
    target: Target, s: Tensor, states: Tensor, first: Tensor | None, chunk: int, backward: bool
) -> Tensor:
    """Turn what chunks add into the states between them, in place; returns the one at the end."""
    batch, _, heads, channels, features = states.shape
    last = torch.empty(batch, heads, channels, features, dtype=torch.float32, device=states.device)
    args: dict[str, Any] = {"S": s, "STATES": states, "LAST": last}
    args |= {"FIRST": last if first is None else first.contiguous()}
    args |= {"length": s.shape[3], "heads": heads, "SIZE": channels * features}
    args |= {"BLOCK": _PASS_BLOCK, "CHUNK": chunk, "STARTED": first is not None}
    programs = batch * heads * triton.cdiv(channels * features, _PASS_BLOCK)
    _launch(target, ssd_pass, programs, args | {"BACKWARD": backward})
    return last


def _read(
    target: Target,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    dt: Tensor,
    s: Tensor,
    states: Tensor,
    skip: Tensor | None,
    out: Tensor,
    ddt: Tensor | None,
    dskip: Tensor | None,
    chunk: int,
    reverse: bool,
    backward: bool,
) -> None:
    batch, length, heads, _ = v.shape
    step = _step(target, "read", chunk, x, q, k)
    args: dict[str, Any] = {"Q": q, "K": k, "V": v, "X": x, "DT": dt, "S": s, "STATES": states}
    args |= {"SKIP": s if skip is None else skip.contiguous(), "OUT": out}
    args |= {"DDT": s if ddt is None else ddt, "DSKIP": s if dskip is None else dskip}
    args |= _sizes(k, v) | _strides(q=q, k=k, v=v, x=x) | {"SKIPS": skip is not None}
    args |= _constants(k, v, step, chunk, reverse, backward, target, (x, q, k))
    _launch(target, ssd_read, batch * heads * triton.cdiv(length, step.held), args, step)


def _keys(
    target: Target,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    dt: Tensor,
    s: Tensor,
    states: Tensor,
    between: Tensor,
    splits: int | None,
    chunk: int,
    reverse: bool,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, L, G, N], and of each place its pairs and its edge, [B, H, L]."""
    batch, length, heads, _ = v.shape
    groups = q.shape[2]
    step = _step(target, "keys", chunk, v, q, k)
    programs = batch * groups * triton.cdiv(length, step.held)
    if splits is None:
        splits = num_splits(heads // groups, programs, target.multiprocessors)
    dq = torch.empty(
        (batch, length, groups, splits, q.shape[3]),
        dtype=q.dtype if splits == 1 else torch.float32,
        device=q.device,
    )
    pairs, edges = (
        torch.empty(batch, heads, length, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    args: dict[str, Any] = {"Q": q, "K": k, "U": u, "V": v, "DT": dt, "S": s, "STATES": states}
    args |= {"DQ": dq, "PAIRS": pairs, "EDGES": edges}
    args |= {"BETWEEN": between, "splits": splits}
    args |= _sizes(k, v) | _strides(q=q, k=k, u=u, v=v)
    args |= _constants(k, v, step, chunk, reverse, backward, target, (v, q, k))
    args["BD"] = _columns(step, args)
    del args["BP"]  # rows of a state are taken BD at a time
    _launch(target, ssd_bwd_keys, programs * splits, args, step)
    return dq[:, :, :, 0] if splits == 1 else dq.sum(3).to(q.dtype), pairs, edges


def _launch(
    target: Target,
    kernel: Any,
    programs: int,
    args: dict[str, Any],
    step: Step = _PLAIN,
) -> None:
    # Whether a·b + c is fused is said here, since Triton 3.10 will change its default.
    options = {"num_warps": step.warps, "num_stages": step.stages, "enable_fp_fusion": True}
    target.launch(Launch(kernel, programs, args, options))


def _step(target: Target, kernel: str, chunk: int, x: Tensor, b: Tensor, c: Tensor) -> Step:
    vendor = "hip" if target.vendor == "interpreter" else target.vendor
    itemsize = max(t.element_size() for t in (x, b, c))
    return step_for(vendor, kernel, max(x.shape[3], b.shape[3]), itemsize, chunk)


def _columns(step: Step, constants: dict[str, Any]) -> int:
    return min(step.columns, max(constants["BP"], constants["BN"]))


def _sizes(k: Tensor, v: Tensor) -> dict[str, int]:
    return {"length": v.shape[1], "heads": v.shape[2], "groups": k.shape[2]}


def _strides(**tensors: Tensor) -> dict[str, int]:
    align, strides = strides_of(*tensors.values())
    args: dict[str, int] = {"ALIGN": align}
    for name, stride in zip(tensors, strides, strict=True):
        args |= named(name, stride)
    return args


def _constants(
    k: Tensor,
    v: Tensor,
    step: Step,
    chunk: int,
    reverse: bool,
    backward: bool,
    target: Target,
    operands: tuple[Tensor, ...],
) -> dict[str, Any]:
    # The interpreter's products in half precision are not those of a GPU (in bfloat16 they are
    # wrong), so there the operands stay in float32. Elsewhere float32 keeps its 24 bits:
    # three TF32 products on NVIDIA, and native float32 matrix instructions on AMD.
    dtypes = {t.dtype for t in operands}
    exact = target.vendor == "interpreter" or len(dtypes) > 1
    channels, features = v.shape[3], k.shape[3]
    return {
        "P": channels,
        "N": features,
        "BP": max(16, triton.next_power_of_2(channels)),
        "BN": max(16, triton.next_power_of_2(features)),
        "BM": step.held,
        "BK": step.taken,
        "CHUNK": chunk,
        "REVERSE": reverse,
        "BACKWARD": backward,
        "DOT": tl.float32 if exact else DOT[dtypes.pop()],
        "PRECISION": "tf32x3" if target.vendor == "cuda" else "ieee",
    }
