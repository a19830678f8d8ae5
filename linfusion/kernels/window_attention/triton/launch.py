"""Window attention in Triton: what launches the kernels of `forward` and `backward`.

The kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 (`make aot`,
`docs/kernels-aot.md`) and compared with the reference in Triton's interpreter. They have never run
on a GPU.

Tensors are [B, N, H, D] with any strides for batch, token and head; a last axis that is not
contiguous is copied once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import DOT, Launch, Target, named, rows, strides_of, target_of
from linfusion.kernels.window_attention.cells import cell_grid, counts
from linfusion.kernels.window_attention.order import TILES
from linfusion.kernels.window_attention.triton.backward import window_bwd_q
from linfusion.kernels.window_attention.triton.backward_keys import window_bwd_all, window_bwd_kv
from linfusion.kernels.window_attention.triton.configs import Step, pieces, step_for
from linfusion.kernels.window_attention.triton.forward import window_fwd
from linfusion.kernels.window_attention.triton.lists import lists

__all__ = ["Launch", "Target", "attention", "attention_backward"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...] = (),
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and log-sum-exp [B, N, H] float32; arguments as for the operator."""
    target = target or target_of(q)
    q, (k, v), k_all, v_all = rows(q), _alike(k, v), k_all.contiguous(), v_all.contiguous()
    batch, tokens, heads, d = q.shape
    o = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)
    align, strides = strides_of(q, k)
    step = _step(target, "fwd", d, q)
    args: dict[str, Any] = {"Q": q, "K": k, "V": v, "KA": k_all, "VA": v_all, "OUT": o, "LSE": lse}
    args |= {"heads": heads, "always": k_all.shape[1], "scale": float(scale)}
    for name, stride in zip(("q", "k"), strides, strict=True):
        args |= named(name, stride)
    args |= _constants(d, step, align, target, q)
    tiles, window = _window(grid, radius, shape, tiled, q)
    window |= _cells(grid, radius, shape, cells, k_all)
    _launch(target, window_fwd, batch * heads * tiles * (64 // step.held), step, args | window)
    return o, lse


def attention_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    o: Tensor,
    lse: Tensor,
    grid: tuple[int, ...],
    radius: float,
    shape: str,
    scale: float,
    tiled: bool,
    cells: tuple[int, ...] = (),
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dk_all and dv_all (equations: `backward`)."""
    target = target or target_of(q)
    do, q, (k, v) = rows(do), rows(q), _alike(k, v)
    k_all, v_all, o, lse, dlse = (x.contiguous() for x in (k_all, v_all, o, lse, dlse))
    batch, _, heads, d = q.shape
    dq, dk, dv, dk_all, dv_all = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, k_all, v_all)
    )
    delta = torch.empty_like(lse)
    tiles, window = _window(grid, radius, shape, tiled, q)
    counted = _cells(grid, radius, shape, cells, k_all)

    step = _step(target, "bwd_q", d, q)
    align, strides = strides_of(q, k, do)
    args: dict[str, Any] = {"Q": q, "K": k, "V": v, "KA": k_all, "VA": v_all, "OUT": o, "DO": do}
    args |= {"LSE": lse, "DLSE": dlse, "DQ": dq, "DELTA": delta}
    args |= {"heads": heads, "always": k_all.shape[1], "scale": float(scale)}
    for name, stride in zip(("q", "k", "g"), strides, strict=True):
        args |= named(name, stride)
    args |= _constants(d, step, align, target, q)
    programs = batch * heads * tiles * (64 // step.held)
    _launch(target, window_bwd_q, programs, step, args | window | counted)

    step = _step(target, "bwd_kv", d, q)
    args = {"Q": q, "DO": do, "LSE": lse, "DELTA": delta, "heads": heads, "scale": float(scale)}
    for name, stride in zip(("q", "k", "g"), strides, strict=True):
        args |= named(name, stride)
    args |= _constants(d, step, align, target, q)
    programs = batch * heads * tiles * (64 // step.held)
    keys = {"K": k, "V": v, "DK": dk, "DV": dv}
    _launch(target, window_bwd_kv, programs, step, args | keys | window)
    if always := k_all.shape[1]:
        programs = batch * heads * triton.cdiv(always, step.held)
        keys = {"K": k_all, "V": v_all, "DK": dk_all, "DV": dv_all}
        args = {name: x for name, x in args.items() if not name.startswith("k_")} | window
        args = {name: x for name, x in args.items() if name not in ("TABLE", "BITS")}
        counted["always"] = always
        _launch(target, window_bwd_all, programs, step, args | keys | counted)
    return dq, dk, dv, dk_all, dv_all


def _window(
    grid: tuple[int, ...], radius: float, shape: str, tiled: bool, q: Tensor
) -> tuple[int, dict[str, Any]]:
    """How many tiles the grid has, and the arguments that say what each sees."""
    tables = lists(grid, radius, shape, q.device)
    t, y, x = (1,) * (3 - len(grid)) + grid
    st, sy, sx = (1,) * (3 - len(grid)) + TILES[len(grid)]
    args: dict[str, Any] = {"TABLE": tables.table, "BITS": tables.bits, "tiles": tables.tiles}
    args |= {"T": t, "Y": y, "X": x, "ST": st, "SY": sy, "SX": sx, "TILED": tiled}
    return tables.tiles, args


def _cells(
    grid: tuple[int, ...], radius: float, shape: str, cells: tuple[int, ...], k_all: Tensor
) -> dict[str, Any]:
    """Which of the keys that everyone sees stand for cells, and for how many tokens."""
    always = k_all.shape[1]
    if not cells:
        none = {"COUNTS": k_all, "text": always, "RT": 0, "RY": 0, "RX": 0}
        return none | {"COUNTED": False, "CT": 1, "CY": 1, "CX": 1}
    missing = (1,) * (3 - len(grid))
    grid, cells = missing + grid, missing + cells
    table, (rt, ry, rx) = counts(grid, cells, radius, shape, k_all.device)
    args: dict[str, Any] = {"COUNTS": table, "RT": rt, "RY": ry, "RX": rx, "COUNTED": True}
    args["text"] = always - math.prod(cell_grid(grid, cells))
    return args | dict(zip(("CT", "CY", "CX"), cells, strict=True))


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Both with contiguous features and the same strides: every stride takes a register."""
    if k.stride() != v.stride():
        return k.contiguous(), v.contiguous()
    return rows(k), rows(v)


def _launch(target: Target, kernel: Any, programs: int, step: Step, args: dict[str, Any]) -> None:
    # Whether a·b + c is fused is said here, since Triton 3.10 will change its default.
    options = {"num_warps": step.warps, "num_stages": step.stages, "enable_fp_fusion": True}
    target.launch(Launch(kernel, programs, args, options))


def _step(target: Target, kernel: str, d: int, q: Tensor) -> Step:
    if target.vendor == "interpreter":
        return Step(64, 64, warps=1, stages=1, columns=64)  # what takes the fewest steps
    return step_for(target.vendor, kernel, d, q.element_size())


def _constants(d: int, step: Step, align: int, target: Target, q: Tensor) -> dict[str, Any]:
    columns = pieces(d, step.columns)
    # The interpreter's products in half precision are not those of a GPU (in bfloat16 they are
    # wrong), so there the operands stay in float32. Elsewhere float32 keeps its 24 bits:
    # three TF32 products on NVIDIA, and native float32 matrix instructions on AMD.
    return {
        "D": d,
        "BA": columns[0],
        "BB": columns[1],
        "BM": step.held,
        "BK": step.taken,
        "DOT": tl.float32 if target.vendor == "interpreter" else DOT[q.dtype],
        "PRECISION": "tf32x3" if target.vendor == "cuda" else "ieee",
        "ALIGN": align,
    }
