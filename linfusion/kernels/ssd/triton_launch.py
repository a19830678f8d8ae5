"""Launches of the kernels that every scan in Triton has, and the arguments of all of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from linfusion.kernels.launch import DOT, Launch, Target, cdiv, power_of_2, stride_arguments
from linfusion.kernels.ssd.common import Choices
from linfusion.kernels.ssd.triton_configs import Step, step_for
from linfusion.kernels.ssd.triton_forward import ssd_cumsum, ssd_pass, ssd_states

_SUM_HEADS = 8
_PASS_BLOCK = 512
_PLAIN = Step(1, 1, 1, warps=4, stages=1)  # of kernels without products


def sums_of(target: Target, a: Tensor, choices: Choices) -> Tensor:
    """Sums of log-decays up to and with each place of its chunk, high and low, [B, H, 2, L]."""
    a = a.contiguous()
    batch, length, heads = a.shape
    s = torch.empty(batch, heads, 2, length, dtype=torch.float32, device=a.device)
    args: dict[str, Any] = {"A": a, "S": s}
    args |= {"length": length, "heads": heads, "BH": _SUM_HEADS}
    args |= {"CHUNK": choices.chunk_size, "REVERSE": choices.reverse}
    programs = batch * cdiv(length, choices.chunk_size) * cdiv(heads, _SUM_HEADS)
    launch(target, ssd_cumsum, programs, args)
    return s


def chunk_states(
    target: Target,
    k: Tensor,
    v: Tensor,
    dt: Tensor | None,
    s: Tensor,
    operands: tuple[Tensor, ...],
    choices: Choices,
    backward: bool,
) -> Tensor:
    """What every chunk adds to a state [B, chunks, H, P, N], its tokens times their steps `dt`."""
    batch, length, heads, channels = v.shape
    features, chunks = k.shape[3], cdiv(length, choices.chunk_size)
    states = torch.empty(
        batch, chunks, heads, channels, features, dtype=torch.float32, device=v.device
    )
    step = step_of(target, "states", choices, *operands)
    args: dict[str, Any] = {"K": k, "V": v, "S": s, "STATES": states}
    args |= {"DT": s if dt is None else dt, "STEPS": dt is not None}
    args |= sizes_of(k, v) | stride_arguments(k=k, v=v)
    args |= constants_of(k, v, step, choices, backward, target, operands)
    del args["BM"]  # it holds a tile of the state
    args |= {"BP": min(args["BP"], step.columns), "BN": min(args["BN"], step.columns)}
    tiles = cdiv(channels, args["BP"]) * cdiv(features, args["BN"])
    launch(target, ssd_states, batch * chunks * heads * tiles, args, step)
    return states


def pass_states(
    target: Target, s: Tensor, states: Tensor, first: Tensor | None, chunk: int, backward: bool
) -> Tensor:
    """Turn what chunks add into the states between them, in place; returns the one at the end."""
    batch, _, heads, channels, features = states.shape
    last = torch.empty(batch, heads, channels, features, dtype=torch.float32, device=states.device)
    args: dict[str, Any] = {"S": s, "STATES": states, "LAST": last}
    args |= {"FIRST": last if first is None else first.contiguous()}
    args |= {"length": s.shape[3], "heads": heads, "SIZE": channels * features}
    args |= {"BLOCK": _PASS_BLOCK, "CHUNK": chunk, "STARTED": first is not None}
    programs = batch * heads * cdiv(channels * features, _PASS_BLOCK)
    launch(target, ssd_pass, programs, args | {"BACKWARD": backward})
    return last


def launch(
    target: Target,
    kernel: Any,
    programs: int,
    args: dict[str, Any],
    step: Step = _PLAIN,
) -> None:
    # Whether a·b + c is fused is said here, since Triton 3.10 will change its default.
    options = {"num_warps": step.warps, "num_stages": step.stages, "enable_fp_fusion": True}
    target.launch(Launch(kernel, programs, args, options))


def step_of(target: Target, kernel: str, choices: Choices, x: Tensor, b: Tensor, c: Tensor) -> Step:
    vendor = "hip" if target.vendor == "interpreter" else target.vendor
    itemsize = max(t.element_size() for t in (x, b, c))
    return step_for(
        vendor, kernel, max(x.shape[3], b.shape[3]), itemsize, choices.chunk_size, target.arch
    )


def columns_of(step: Step, widest: int) -> int:
    return min(step.columns, widest)


def sizes_of(k: Tensor, v: Tensor) -> dict[str, int]:
    return {"length": v.shape[1], "heads": v.shape[2], "groups": k.shape[2]}


def constants_of(
    k: Tensor,
    v: Tensor,
    step: Step,
    choices: Choices,
    backward: bool,
    target: Target,
    operands: tuple[Tensor, ...],
) -> dict[str, Any]:
    return _constants(
        v.shape[3],
        k.shape[3],
        step,
        choices,
        backward,
        target.vendor,
        frozenset(t.dtype for t in operands),
    ).copy()


@functools.lru_cache(1024)
def _constants(
    channels: int,
    features: int,
    step: Step,
    choices: Choices,
    backward: bool,
    vendor: str,
    dtypes: frozenset[torch.dtype],
) -> dict[str, Any]:
    # The interpreter's products in half precision are not those of a GPU (in bfloat16 they are
    # wrong), so there the operands stay in float32. Elsewhere float32 keeps its 24 bits:
    # three TF32 products on NVIDIA, and native float32 matrix instructions on AMD.
    exact = vendor == "interpreter" or len(dtypes) > 1
    return {
        "P": channels,
        "N": features,
        "BP": power_of_2(channels),
        "BN": power_of_2(features),
        "BM": step.held,
        "BK": step.taken,
        "CHUNK": choices.chunk_size,
        "REVERSE": choices.reverse,
        "BACKWARD": backward,
        "DOT": tl.float32 if exact else DOT[next(iter(dtypes))],
        "PRECISION": "tf32x3" if vendor == "cuda" else "ieee",
    }
