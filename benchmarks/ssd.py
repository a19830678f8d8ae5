"""The scan of Mamba-2, forward and backward, against the chunked scan that transformers runs.

The rival is what their `Mamba2Mixer` calls where `mamba_ssm` is not installed, on the same inputs
and with the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Row, compare
from linfusion.kernels import ssd_scan

TOKENS, HEADS, DIM, STATE = 8192, 8, 64, 64
# Chunks of 256 and 8 groups are transformers' defaults, 1 group that of mamba_ssm.
CASES = ((256, 8), (64, 1), (64, 8))

Scan = Callable[..., Tensor]


def _inputs(groups: int, tokens: int = TOKENS) -> list[Tensor]:
    """x, dt, A, B, C and D as a fresh mixer has them: steps around 0.05, decays of 1 to 8."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        x = torch.randn(1, tokens, HEADS, DIM)
        dt = torch.randn(1, tokens, HEADS) - 3
        b, c = torch.randn(2, 1, tokens, groups, STATE)
        inputs = [x, dt, -torch.arange(1.0, HEADS + 1), b, c, torch.ones(HEADS)]
        return [t.detach().clone().requires_grad_() for t in inputs]


def _run(scan: Scan, inputs: list[Tensor]) -> Tensor:
    *scanned, skip = inputs
    return scan(*scanned, D=skip)


def _train(scan: Scan, inputs: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        y = _run(scan, inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]


def _error(scan: Scan, inputs: list[Tensor], truth: list[Tensor]) -> float:
    """The largest of the relative errors of the output and of each gradient."""
    found = _train(scan, inputs)
    return max(
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)
    )


def mamba2() -> Iterator[list[Row]]:
    """A forward and backward pass at 8,192 tokens, 8 heads × 64, state 64."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    for chunk_size, groups in CASES:
        inputs = _inputs(groups)
        options = {"chunk_size": chunk_size, "dt_softplus": True}
        scans: dict[str, Scan] = {
            "transformers": partial(mamba2_chunk_scan, **options),
            "blocked": partial(ssd_scan, **options),
        }
        with torch.inference_mode(False):
            doubles = [t.detach().double().requires_grad_() for t in inputs]
        truth = _train(partial(ssd_scan, **options), doubles)
        errors = {name: _error(scan, inputs, truth) for name, scan in scans.items()}
        runs = {name: partial(_train, scan, inputs) for name, scan in scans.items()}
        name = f"ssd {chunk_size}/{groups}"
        yield compare(name, TOKENS, torch.float32, runs, runs=3, errors=errors)
