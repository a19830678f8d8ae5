"""Layers where one kernel does what operators do: the same results, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linfusion.attention.clear import processor as clear
from linfusion.attention.clear.processor import CLEARProcessor
from linfusion.attention.clear.window import LocalWindow
from linfusion.attention.grids.joint import Grids, RotaryTable
from linfusion.attention.linfusion import feature_map
from linfusion.attention.linfusion.feature_map import FeatureMap, ResidualMLP
from linfusion.attention.linfusion.fused import FusedLayer
from linfusion.attention.linfusion.processor import LinFusionProcessor

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear_attention", "window_attention"}
MOVES_NOTHING = {"_unsafe_view", "detach", "empty", "new_empty"}


class Bytes(TorchDispatchMode):
    """Bytes that operators between products read and write; an operator of ours is one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if not func.is_view and name not in PRODUCTS | MOVES_NOTHING:
            tensors = tree_leaves((args, kwargs, out))
            self.moved += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        return out


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes the kernels, which are interpreted."""
    monkeypatch.setattr(feature_map, "one_pass", lambda x: True)
    monkeypatch.setattr(clear, "one_pass", lambda x: True)
    monkeypatch.setattr("linfusion.kernels.elementwise.api.implementation", lambda *args: "triton")


def learned(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return module


def layer(dtype: torch.dtype = torch.float32, channels: int = 64) -> Attention:
    attn = learned(Attention(channels, heads=2, dim_head=channels // 2))
    attn.add_module("linfusion", learned(FeatureMap(channels)))
    attn.set_processor(LinFusionProcessor())
    return attn.to(dtype)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_computes_what_its_modules_do(dtype, grad, monkeypatch, request):
    mlp, x = learned(ResidualMLP(64, 48)).to(dtype), torch.randn(2, 37, 64).to(dtype)
    with torch.set_grad_enabled(grad):
        exact, eager = mlp.double()(x.double()), mlp.to(dtype)(x)
        request.getfixturevalue("on_a_gpu")
        ours = mlp(x)
    error, theirs = ((t.double() - exact).abs().mean() for t in (ours, eager))
    assert ours.dtype == dtype and error <= 2 * theirs + 1e-7
    assert (ours - x).abs().mean() > 0.1  # what the map adds


def watched(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output.flip(-1))


def wrapped(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x).flip(-1)


def replaced(module: nn.Module) -> None:
    class Flipped(type(module)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(-1)

    module.__class__ = Flipped


@pytest.mark.parametrize("change", [watched, wrapped, replaced])
@pytest.mark.parametrize("name", ["first", "norm", "last"])
def test_a_module_that_something_changed_is_called(name, change, on_a_gpu, monkeypatch):
    mlp, x = learned(ResidualMLP(16, 16)), torch.randn(1, 5, 16)
    with torch.no_grad():
        plain = mlp(x)
        change(mlp.get_submodule(name))
        ours = mlp(x)
        monkeypatch.setattr(feature_map, "one_pass", lambda x: False)
        torch.testing.assert_close(ours, mlp(x))
    assert (ours - plain).abs().max() > 0.1


def test_elementwise_bytes_of_a_linfusion_layer(on_a_gpu):
    attn, x = layer(torch.bfloat16), torch.randn(1, 400, 64).bfloat16()
    with torch.no_grad(), Bytes() as counted:
        attn(x)
    weights = 2 * 3 * 64 * 2  # of norms, and biases
    assert counted.moved == 16 * x.numel() + weights  # 28 by the operators of torch


def test_elementwise_bytes_of_a_fused_layer(on_a_gpu, monkeypatch):
    attn, x = layer(torch.bfloat16), torch.randn(1, 400, 64).bfloat16()
    fused = FusedLayer(attn, attn.linfusion, torch.bfloat16)
    # The way of a GPU, on a CPU.
    monkeypatch.setattr("linfusion.attention.linfusion.fused._is_cpu", lambda x: False)
    with torch.no_grad():
        expected = attn(x)
        with Bytes() as counted:
            out = fused(x)
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    assert counted.moved <= 8 * x.numel() + 4096  # 86 to 91 in pieces and float32


def flux_layer(joint: bool, dtype: torch.dtype) -> FluxAttention:
    extra = {"added_kv_proj_dim": 64, "out_dim": 64} if joint else {"pre_only": True}
    attn = learned(FluxAttention(64, heads=8, dim_head=8, bias=True, **extra)).to(dtype)
    attn.add_module("clear", LocalWindow({"radius": 3}))
    attn.set_processor(CLEARProcessor())
    return attn


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_normed_and_turned_as_by_diffusers(dtype, joint, request):
    attn = flux_layer(joint, dtype)
    x, text = torch.randn(1, 20, 64).to(dtype), torch.randn(1, 7, 64).to(dtype)
    angle = torch.randn(27 if joint else 20, 8)
    table = (angle.cos(), angle.sin())

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = clear._projected(attn, x, text if joint else None, table)
        return [t for t in found if t is not None]

    eager = run()
    request.getfixturevalue("on_a_gpu")
    for ours, theirs in zip(run(), eager, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.04
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("joint", [False, True])
def test_bytes_of_queries_and_keys(joint, on_a_gpu):
    attn = flux_layer(joint, torch.bfloat16)
    grid, text = (20, 20), 24
    x, words = torch.randn(1, 400, 64).bfloat16(), torch.randn(1, text, 64).bfloat16()
    angle = torch.randn(text + 400, 8)
    table = RotaryTable((angle.cos(), angle.sin()), Grids((grid,), (None,)))
    inputs = (x, words) if joint else (torch.cat([words, x], 1), None)
    elements = 2 * (text + 400) * 64
    at_attention: list[int] = []

    def attention(window: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            at_attention.append(counted.moved)
            return window(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), Bytes() as counted:
        patch.setattr(clear, "window_attention", attention(clear.window_attention))
        attn.processor(attn, *inputs, image_rotary_emb=table)
    # 4 to norm and turn, 1 of the rotary table, in a joint layer 4 to put text and image together.
    assert at_attention == [pytest.approx((9 if joint else 5) * elements, rel=0.01)]
