"""Window attention in Triton: what launches the kernels of `forward` and `backward`.

The kernels have been compiled for sm_80, sm_90, sm_100 and gfx942 (`make aot`,
`docs/kernels-aot.md`) and compared with the reference in Triton's interpreter. They have never run
on a GPU.

Tensors are [B, N, H, D] with any strides for batch, token and head; a last axis that is not
contiguous is copied once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import (
    DOT,
    Launch,
    Target,
    named,
    pieces,
    rows,
    strides_of,
    target_of,
)
from linfusion.kernels.window_attention.cells import cell_grid, counts
from linfusion.kernels.window_attention.order import TILES
from linfusion.kernels.window_attention.triton.backward import window_bwd_q
from linfusion.kernels.window_attention.triton.backward_keys import window_bwd_all, window_bwd_kv
from linfusion.kernels.window_attention.triton.configs import Step, step_for
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
    q, (k, v), k_all, v_all = rows(q), alike(k, v), k_all.contiguous(), v_all.contiguous()
    o = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    args: dict[str, Any] = {"Q": q, "K": k, "V": v, "KA": k_all, "VA": v_all, "OUT": o, "LSE": lse}
    choices = Choices(k_all.shape[1], grid, radius, shape, scale, tiled, cells)
    plan = plan_of(target, "fwd", q.dtype, q.device, choices, layouts(q=q, k=k))
    start(target, window_fwd, plan.programs, plan, args | plan.fixed | plan.cells)
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
    do, q, (k, v) = rows(do), rows(q), alike(k, v)
    k_all, v_all, o, lse, dlse = (x.contiguous() for x in (k_all, v_all, o, lse, dlse))
    dq, dk, dv, dk_all, dv_all = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, k_all, v_all)
    )
    delta = torch.empty_like(lse)
    choices = Choices(k_all.shape[1], grid, radius, shape, scale, tiled, cells)
    where = layouts(q=q, k=k, g=do)

    plan = plan_of(target, "bwd_q", q.dtype, q.device, choices, where)
    args: dict[str, Any] = {"Q": q, "K": k, "V": v, "KA": k_all, "VA": v_all, "OUT": o, "DO": do}
    args |= {"LSE": lse, "DLSE": dlse, "DQ": dq, "DELTA": delta}
    start(target, window_bwd_q, plan.programs, plan, args | plan.fixed | plan.cells)

    plan = plan_of(target, "bwd_kv", q.dtype, q.device, choices, where)
    args = {"Q": q, "DO": do, "LSE": lse, "DELTA": delta} | plan.fixed
    keys = {"K": k, "V": v, "DK": dk, "DV": dv}
    start(target, window_bwd_kv, plan.programs, plan, args | keys)
    if always := k_all.shape[1]:
        programs = q.shape[0] * q.shape[2] * triton.cdiv(always, plan.step.held)
        keys = {"K": k_all, "V": v_all, "DK": dk_all, "DV": dv_all}
        start(target, window_bwd_all, programs, plan, args | keys | plan.cells)
    return dq, dk, dv, dk_all, dv_all


class Choices(NamedTuple):
    """What is asked of the windows; `always` is how many keys every query sees."""

    always: int
    grid: tuple[int, ...]
    radius: float
    shape: str
    scale: float
    tiled: bool
    cells: tuple[int, ...]


class Plan(NamedTuple):
    """What of a launch depends on shapes alone: made once for each, so a call costs little.

    Attributes:
        programs: as many as take all tiles.
        step: of the kernel.
        fixed: arguments of every kernel.
        cells: those of the kernels that have keys that everyone sees.
    """

    programs: int
    step: Step
    fixed: dict[str, Any]
    cells: dict[str, Any]


Layouts = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


def layouts(**tensors: Tensor) -> Layouts:
    """Shape and strides of each, with the name that its strides have."""
    return tuple((name, tuple(x.shape), x.stride()) for name, x in tensors.items())


def strided(where: Layouts) -> tuple[int, dict[str, int]]:
    """What divides every stride, and the strides by name, divided by it."""
    empty = [torch.empty_strided(shape, stride, device="meta") for _, shape, stride in where]
    align, strides = strides_of(*empty)
    found: dict[str, int] = {}
    for (name, *_), stride in zip(where, strides, strict=True):
        found |= named(name, stride)
    return align, found


@lru_cache(maxsize=256)
def plan_of(
    target: Target,
    kernel: str,
    dtype: torch.dtype,
    device: torch.device,
    choices: Choices,
    where: Layouts,
) -> Plan:
    """The plan for the tensors of those layouts, the first of them the queries'."""
    _, (batch, _, heads, d), _ = where[0]
    step = step_of(target, kernel, d, dtype)
    args: dict[str, Any] = {"heads": heads, "scale": float(choices.scale)}
    align, strides = strided(where)
    args |= strides
    args |= dots(d, step, align, target, dtype)
    tiles, window = window_arguments(*choices[1:4], choices.tiled, device)
    programs = batch * heads * tiles * (64 // step.held)
    return Plan(programs, step, args | window, _cells(choices, device))


def window_arguments(
    grid: tuple[int, ...], radius: float, shape: str, tiled: bool, device: torch.device
) -> tuple[int, dict[str, Any]]:
    """How many tiles the grid has, and the arguments that say what each sees."""
    tables = lists(grid, radius, shape, device)
    t, y, x = (1,) * (3 - len(grid)) + grid
    st, sy, sx = (1,) * (3 - len(grid)) + TILES[len(grid)]
    args: dict[str, Any] = {"TABLE": tables.table, "BITS": tables.bits, "tiles": tables.tiles}
    args |= {"T": t, "Y": y, "X": x, "ST": st, "SY": sy, "SX": sx, "TILED": tiled}
    return tables.tiles, args


def _cells(choices: Choices, device: torch.device) -> dict[str, Any]:
    """Which of the keys that everyone sees stand for cells, and for how many tokens."""
    always, grid, cells = choices.always, choices.grid, choices.cells
    args: dict[str, Any] = {"always": always, "COUNTED": bool(cells)}
    missing = (1,) * (3 - len(grid))
    grid, cells = missing + grid, missing + (cells or (1,) * len(grid))
    reaches: tuple[int, ...] = (0, 0, 0)
    table = torch.empty(0, device=device)
    if args["COUNTED"]:
        table, reaches = counts(grid, cells, choices.radius, choices.shape, device)
        always -= math.prod(cell_grid(grid, cells))
    args |= {"COUNTS": table, "text": always}
    args |= dict(zip(("RT", "RY", "RX"), reaches, strict=True))
    return args | dict(zip(("CT", "CY", "CX"), cells, strict=True))


def alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Both with contiguous features and the same strides: every stride takes a register."""
    if k.stride() != v.stride():
        return k.contiguous(), v.contiguous()
    return rows(k), rows(v)


def start(target: Target, kernel: Any, programs: int, plan: Plan, args: dict[str, Any]) -> None:
    # Whether a·b + c is fused is said here, since Triton 3.10 will change its default.
    options = {
        "num_warps": plan.step.warps,
        "num_stages": plan.step.stages,
        "enable_fp_fusion": True,
    }
    target.launch(Launch(kernel, programs, args, options))


def step_of(target: Target, kernel: str, d: int, dtype: torch.dtype) -> Step:
    """How many tokens that kernel takes at a time there."""
    if target.vendor == "interpreter":
        return Step(64, 64, warps=1, stages=1, columns=64)  # what takes the fewest steps
    return step_for(target.vendor, target.arch, kernel, d, dtype.itemsize)


def dots(d: int, step: Step, align: int, target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """Columns in pieces, tokens at a time, and what products are taken in."""
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
        "DOT": tl.float32 if target.vendor == "interpreter" else DOT[dtype],
        "PRECISION": "tf32x3" if target.vendor == "cuda" else "ieee",
        "ALIGN": align,
    }
