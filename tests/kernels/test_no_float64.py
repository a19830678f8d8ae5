"""float64 stays off devices: Apple's GPUs have none, and the blocked forms are what runs there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linfusion.attention.linfusion.feature_map import FeatureMap
from linfusion.attention.linfusion.fused import FusedLayer
from linfusion.kernels.linear_attention import blocked as linear
from linfusion.kernels.linear_attention.common import Choices
from linfusion.kernels.ssd import blocked as ssd
from linfusion.kernels.ssd.common import Choices as ScanChoices


class NoFloat64(TorchDispatchMode):
    """Refuses operators that give float64, as a device without it does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            assert not (isinstance(x, Tensor) and x.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_and_its_gradients(reverse):
    x, dt, b = torch.randn(1, 100, 2, 8), torch.rand(1, 100, 2), torch.randn(1, 100, 1, 8)
    choices, skip = ScanChoices(64, reverse), torch.randn(1, 2, 8)
    with NoFloat64():
        y, final, kept = ssd.scan(x, dt, -dt, b, b, skip, None, choices)
        ssd.scan_backward(y, final, x, dt, -dt, b, b, skip, kept, choices)


def test_linear_attention_and_its_gradients():
    q, choices = torch.randn(1, 100, 2, 8), Choices("elu1", "mean", 1e-4)
    with NoFloat64():
        state = linear.state_forward(q, q, torch.rand(1, 100), "elu1")
        o = linear.read_forward(q, state, choices, q.dtype)
        linear.attention_backward(o, q, q, q, None, state, choices)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_fused_layer(on_cpu, monkeypatch):
    monkeypatch.setattr("linfusion.attention.linfusion.fused._is_cpu", lambda x: on_cpu)
    layer = FusedLayer(Attention(16, heads=2, dim_head=8), FeatureMap(16), torch.float32)
    with torch.no_grad(), NoFloat64():
        layer(torch.randn(1, 100, 16))
