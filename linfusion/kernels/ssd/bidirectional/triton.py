"""Both scans in Triton: C Bᵀ once in the forward pass; the backward pass is that of two scans.

The kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 (`make aot`,
`docs/kernels-aot.md`) and compared with the reference in Triton's interpreter. They have never run
on a GPU. Nothing is kept for the backward pass, which computes the states again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from linfusion.kernels.launch import Launch, Target, rows, target_of
from linfusion.kernels.ssd import triton as one_direction
from linfusion.kernels.ssd.bidirectional.triton_read import ssd_read_both
from linfusion.kernels.ssd.common import triton_chunk_of
from linfusion.kernels.ssd.triton_launch import (
    chunk_states,
    constants_of,
    launch,
    named_strides,
    pass_states,
    sizes_of,
    step_of,
    sums_of,
)

__all__ = ["Launch", "Target", "scan", "scan_backward"]


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    chunk_size: int,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, P], and nothing kept [B, 0, H, 2, P, N]; arguments as `ops`."""
    target = target or target_of(x)
    x, b, c = rows(x), rows(b), rows(c)
    chunk = triton_chunk_of(chunk_size)
    # Of the backward direction, log-decays come one token later; see `triton_read`.
    decays = a[..., 0], F.pad(a[:, :-1, :, 1], (0, 0, 1, 0))
    steps = [t.contiguous() for t in dt.unbind(-1)]
    sums = [sums_of(target, t, None, chunk, False) for t in decays]
    states = []
    for s, step, backward in zip(sums, steps, (False, True), strict=True):
        states.append(chunk_states(target, b, x, step, s, (x, b, c), chunk, False, backward))
        pass_states(target, s, states[-1], None, chunk, backward)

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = step_of(target, "read both", chunk, x, b, c)
    args: dict[str, Any] = {"Q": c, "K": b, "V": x, "DT": steps[0], "DT_B": steps[1]}
    args |= {"S": sums[0], "S_B": sums[1], "STATES": states[0], "STATES_B": states[1]}
    args |= {"SKIP": y if skip is None else skip.contiguous(), "OUT": y, "SKIPS": skip is not None}
    args |= sizes_of(b, x) | named_strides(q=c, k=b, v=x)
    args |= constants_of(b, x, tile, chunk, False, False, target, (x, b, c))
    del args["REVERSE"], args["BACKWARD"]
    programs = x.shape[0] * x.shape[2] * triton.cdiv(x.shape[1], tile.held)
    launch(target, ssd_read_both, programs, args, tile)
    return y, x.new_empty(x.shape[0], 0, x.shape[2], 2, x.shape[3], b.shape[3], dtype=dt.dtype)


def scan_backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    kept: Tensor,
    chunk_size: int,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c and skip."""
    target = target or target_of(x)
    dy, x, b, c = rows(dy), rows(x), rows(b), rows(c)
    chunk = triton_chunk_of(chunk_size)
    found = []
    for i, (step, decay) in enumerate(zip(dt.unbind(-1), a.unbind(-1), strict=True)):
        reverse, step = bool(i), step.contiguous()
        s = sums_of(target, decay, None, chunk, reverse)
        states = chunk_states(target, b, x, step, s, (x, b, c), chunk, reverse, False)
        pass_states(target, s, states, None, chunk, False)
        tensors = x, step, decay, b, c, None if reverse else skip, None, states
        grads = one_direction.scan_backward(dy, None, *tensors, chunk_size, reverse, target=target)
        found.append(grads)
    (dx, ddt, da, db, dc, dskip, _), (dx_b, ddt_b, da_b, db_b, dc_b, *_) = found
    both = torch.stack([ddt, ddt_b], -1), torch.stack([da, da_b], -1)
    return dx + dx_b, *both, db + db_b, dc + dc_b, dskip
