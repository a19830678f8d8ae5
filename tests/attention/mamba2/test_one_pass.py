"""Mamba-2 and MATE where kernels do what operators do: the same results, fewer bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linfusion.attention.mamba2 import causal, one_pass, qk_norms
from linfusion.attention.mamba2.bidirectional import BiMamba2
from linfusion.attention.mamba2.causal import Mamba2
from linfusion.attention.mate.layer import MATE

MOVES_NOTHING = {"_unsafe_view", "detach", "empty", "new_empty"}
PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes the kernels, which are interpreted; the scan is blocked."""
    for module in (causal, one_pass, qk_norms):
        monkeypatch.setattr(module, "one_pass", lambda x: True)
    monkeypatch.setattr("linfusion.kernels.elementwise.api.implementation", lambda *args: "triton")


def learned(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


SIZES: dict[str, Any] = {"d_state": 4, "headdim": 4, "d_conv": 3}
LIKE: dict[str, Any] = {"qk_norm_eps": 1e-6, "average": True}
LAYERS = {
    "as a video transformer has it": lambda: BiMamba2(8, **SIZES),
    "with groups": lambda: BiMamba2(8, ngroups=2, **SIZES),
    "with its own B and C": lambda: BiMamba2(8, share_bc=False, share_dt=True, **SIZES),
    "from attention": lambda: BiMamba2.like_attention(8, 2, qk_norm="rms_norm", **LIKE),
    "from attention normed across": lambda: BiMamba2.like_attention(
        8, 2, qk_norm="rms_norm_across_heads", **LIKE
    ),
    "from attention without norms": lambda: BiMamba2.like_attention(8, 2, qk_norm=None, **LIKE),
    "hydra": lambda: BiMamba2(8, bidirectional="hydra", **SIZES),
}


@pytest.mark.parametrize("lead, lead_first", [(0, True), (3, True), (3, False)])
@pytest.mark.parametrize("name", LAYERS)
def test_both_directions_are_what_they_were(name, lead, lead_first, request):
    layer, u = learned(LAYERS[name]()), torch.randn(2, 11, 8)

    def run() -> list[Tensor]:
        inputs = u.clone().requires_grad_()
        y = layer(inputs, lead=lead, lead_first=lead_first)
        leaves = [inputs, *layer.parameters()]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected = run()
    request.getfixturevalue("on_a_gpu")
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "both"])
@pytest.mark.parametrize("run", [1, 5])
def test_runs_that_carry_the_state_are_what_they_were(kind, run, request):
    layer = learned(Mamba2(8, **SIZES) if kind == "causal" else BiMamba2(8, **SIZES))
    u = torch.randn(2, 6, 8)

    def both() -> list[Tensor]:
        with torch.no_grad():
            first, state = layer(u[:, :run], None, True)
            second, state = layer(u[:, run:], state, True)
        return [first, second, *state]

    expected = both()
    request.getfixturevalue("on_a_gpu")
    for ours, theirs in zip(both(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conv1d", "conv1d_b", "norm"])
def test_a_module_that_something_watches_is_called(name, on_a_gpu):
    layer, u = learned(BiMamba2(8, **SIZES)), torch.randn(1, 5, 8)
    with torch.no_grad():
        plain = layer(u)
        layer.get_submodule(name).register_forward_hook(lambda module, inputs, out: out.flip(-1))
        assert (layer(u) - plain).abs().max() > 1e-2


class Counted(TorchDispatchMode):
    """Bytes of operators, by name, but of views and of those between which these are."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if not func.is_view and name not in PRODUCTS | MOVES_NOTHING:
            leaves = tree_leaves((args, kwargs, out))
            self.moved[name] += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
            self.launches += 1
        return out


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_elementwise_bytes_of_a_mate_layer(layer_idx, on_a_gpu, monkeypatch):
    channels, grid = 64, (4, 8, 8)
    layer = MATE(channels, 2, layer_idx, d_state=8).bfloat16()
    x = torch.randn(1, 256, channels).bfloat16()
    scan = one_pass.ssd_scan

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        before = counted.moved.copy(), counted.launches
        found = scan(*args, **kwargs)
        counted.moved, counted.launches = before
        return found

    monkeypatch.setattr(one_pass, "ssd_scan", uncounted)
    with torch.no_grad(), Counted() as counted:
        layer(x, grid)
    # Some 420 by the operators of torch; windows that move are put together from several runs.
    assert sum(counted.moved.values()) <= (80, 96)[layer_idx] * x.numel()
    assert counted.moved["directional_conv"] > 12 * x.numel()  # it is what was counted
