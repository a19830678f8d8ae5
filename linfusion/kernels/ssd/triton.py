"""The scan in Triton: what launches the kernels of `triton_forward`, `_read` and `_backward`.

The kernels have been compiled ahead of time (`make aot`, `docs/kernels-aot.md`) and compared with
the reference in Triton's interpreter and in the emulator. They have never run on a GPU.

Tokens, keys and queries may have any strides for batch, token and head; a last axis that is not
contiguous is copied once. Nothing as long as the tokens times the chunk is ever allocated: products
of keys and queries are computed where they are used. What is kept for the backward pass is the
state before every chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linfusion.kernels.launch import (
    Launch,
    Target,
    cdiv,
    pieces,
    rows,
    stride_arguments,
    target_of,
)
from linfusion.kernels.ssd.common import Choices, triton_chunk_of
from linfusion.kernels.ssd.triton_backward import (
    ssd_bwd_decays,
    ssd_bwd_keys,
    ssd_bwd_within,
)
from linfusion.kernels.ssd.triton_configs import num_splits
from linfusion.kernels.ssd.triton_launch import (
    chunk_states,
    columns_of,
    constants_of,
    launch,
    pass_states,
    sizes_of,
    step_of,
    sums_of,
)
from linfusion.kernels.ssd.triton_read import ssd_read

__all__ = ["Launch", "Target", "scan", "scan_backward"]

_DECAYS_BLOCK = 1024


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    choices: Choices,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, L, H, P], last state [B, H, P, N] and the state before every chunk
    [B, chunks, H, P, N] in the order of the scan; arguments as `reference`."""
    target = target or target_of(x)
    x, b, c, dt = rows(x), rows(b), rows(c), dt.contiguous()
    choices = Choices(triton_chunk_of(choices.chunk_size), choices.reverse)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = sums_of(target, a, choices)
    kept = chunk_states(target, b, x, dt, s, (x, b, c), choices, backward=False)
    final = pass_states(target, s, kept, initial, choices.chunk_size, backward=False)
    _read(target, c, b, x, x, dt, s, kept, skip, y, None, None, choices, backward=False)
    return y, final, kept


def scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    kept: Tensor,
    choices: Choices,
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
    choices = Choices(triton_chunk_of(choices.chunk_size), choices.reverse)
    s = sums_of(target, a, choices)
    dstates = chunk_states(target, c, dy, None, s, (x, b, c), choices, backward=True)
    dinitial = pass_states(target, s, dstates, dfinal, choices.chunk_size, backward=True)

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    step = step_of(target, "read", choices, x, b, c)
    tiles = 0 if skip is None else cdiv(length, step.held)
    share = torch.empty(batch, tiles, heads, channels, dtype=torch.float32, device=x.device)
    _read(target, b, c, dy, x, dt, s, dstates, skip, dx, ddt, share, choices, backward=True)
    dskip = x.new_zeros(batch, 0) if skip is None else share.sum(1).to(skip.dtype)

    step = step_of(target, "keys", choices, x, b, c)
    tiles = cdiv(length, step.held)
    between = torch.empty(
        (batch, tiles, heads, choices.chunk_size), dtype=torch.float32, device=x.device
    )
    more = (between, splits, choices)
    dc, read, into = _keys(target, c, b, dy, x, dt, s, kept, *more, backward=False)
    db, written, out_of = _keys(target, b, c, x, dy, dt, s, dstates, *more, backward=True)
    within = torch.empty_like(read)
    args: dict[str, Any] = {"B": b, "C": c, "X": x, "DY": dy, "DT": dt, "S": s, "WITHIN": within}
    args |= sizes_of(b, x) | stride_arguments(b=b, c=c, x=x, g=dy)
    constants = constants_of(b, x, step, choices, True, target, (x, b, c))
    names = ("P", "N", "BM", "BK", "REVERSE", "DOT", "PRECISION")
    args |= {name: constants[name] for name in names}
    args["BD"] = columns_of(step, max(constants["BP"], constants["BN"]))
    launch(target, ssd_bwd_within, batch * heads * tiles, args, step)

    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    args = {"S": s, "STATES": kept, "DSTATES": dstates, "WITHIN": within, "DA": da}
    args |= {"READ": read, "WRITTEN": written, "BETWEEN": between, "INTO": into, "OUT_OF": out_of}
    args |= {"length": length, "heads": heads, "SIZE": channels * b.shape[3]}
    args |= {
        "BLOCK": _DECAYS_BLOCK,
        "BM": step.held,
        "CHUNK": choices.chunk_size,
        "REVERSE": choices.reverse,
    }
    launch(target, ssd_bwd_decays, batch * heads * kept.shape[1], args)
    return dx, ddt, da, db, dc, dskip, dinitial


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
    choices: Choices,
    backward: bool,
) -> None:
    batch, length, heads, _ = v.shape
    step = step_of(target, "read", choices, x, q, k)
    args: dict[str, Any] = {"Q": q, "K": k, "V": v, "X": x, "DT": dt, "S": s, "STATES": states}
    args |= {"SKIP": s if skip is None else skip.float().contiguous(), "OUT": out}
    args |= {"DDT": s if ddt is None else ddt, "DSKIP": s if dskip is None else dskip}
    args |= sizes_of(k, v) | stride_arguments(q=q, k=k, v=v, x=x) | {"SKIPS": skip is not None}
    args |= constants_of(k, v, step, choices, backward, target, (x, q, k))
    del args["BP"]
    args["PA"], args["PB"] = pieces(v.shape[3], step.piece)
    args["BD"] = columns_of(step, args["BN"])
    # Of float32 a product takes high and low halves: they leave no registers to hold q in.
    args["HOLDS"] = all(t.element_size() == 2 for t in (x, q, k))
    launch(target, ssd_read, batch * heads * cdiv(length, step.held), args, step)


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
    choices: Choices,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, L, G, N], and of each place its pairs and its edge, [B, H, L]."""
    batch, length, heads, _ = v.shape
    groups = q.shape[2]
    step = step_of(target, "keys", choices, v, q, k)
    programs = batch * groups * cdiv(length, step.held)
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
    args |= sizes_of(k, v) | stride_arguments(q=q, k=k, u=u, v=v)
    args |= constants_of(k, v, step, choices, backward, target, (v, q, k))
    args["BD"] = columns_of(step, max(args.pop("BP"), args.pop("BN")))
    args["NA"], args["NB"] = pieces(q.shape[3], step.piece)
    # Found by compiling: see `ssd_bwd_keys`.
    args["HOISTS"] = target.vendor != "cuda" or q.shape[3] <= 64
    launch(target, ssd_bwd_keys, programs * splits, args, step)
    return dq[:, :, :, 0] if splits == 1 else dq.sum(3).to(q.dtype), pairs, edges
