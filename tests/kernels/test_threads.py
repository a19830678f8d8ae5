"""Two threads compute what one does, to the bit, and no setting of torch is touched meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

import linfusion.kernels
from linfusion.attention.linfusion.feature_map import FeatureMap
from linfusion.attention.linfusion.fused import FusedLayer
from linfusion.kernels import linear_attention, ssd_scan, window_attention


def attend(x: Tensor) -> Tensor:
    return linear_attention(x, x, x, impl="blocked")


def scan(x: Tensor) -> Tensor:
    A = -torch.ones(x.shape[2])
    return ssd_scan(x, x[..., 0], A, x, x, chunk_size=64, dt_softplus=True, impl="blocked")


def window(x: Tensor) -> Tensor:
    return window_attention(x, x, x, grid=(x.shape[1] // 20, 20), radius=4, impl="blocked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", [attend, scan, window])
def test_two_threads_compute_the_bits_of_one(call: Callable[[Tensor], Tensor], dtype):
    inputs = [torch.randn(1, tokens, 2, 32).to(dtype) for tokens in (1200, 900)]
    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(call, inputs * 6))
    assert all(torch.equal(o, alone[i % 2]) for i, o in enumerate(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_run_one_fused_layer(dtype):
    torch.manual_seed(0)
    child = FeatureMap(64)
    for p in child.parameters():
        torch.nn.init.normal_(p, std=0.2)
    layer = FusedLayer(Attention(64, heads=2, dim_head=32), child, dtype)
    inputs = [torch.randn(1, tokens, 64).to(dtype) for tokens in (1200, 900)]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x)

    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(call, inputs * 6))
    assert all(torch.equal(o, alone[i % 2]) for i, o in enumerate(found))


def test_no_kernel_changes_a_setting_of_torch():
    for path in Path(linfusion.kernels.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for setting in ("torch.backends", "set_float32", "torch.set_", "use_deterministic"):
            assert setting not in text, (path, setting)
