"""Features in bfloat16: what they compute, and that gradients do not see them."""

from __future__ import annotations

import pytest
import torch

from linfusion.kernels import linear_attention
from linfusion.kernels.linear_attention import blocked_bf16
from linfusion.kernels.linear_attention.common import Choices
from tests.kernels.test_linear_attention import CHOICES, error, inputs

# B, N, M, H, D, E: one block, many, short sequences together, heads of two widths
SIZES = [
    (1, 40, 33, 2, 8, 8),
    (2, 9001, 4001, 8, 40, 40),
    (5, 70, 64, 2, 40, 24),
    (1, 65, 9, 3, 24, 63),
]


def attention(q, k, v, feature_map, normalizer):
    state = blocked_bf16.state_forward(k, v, feature_map)
    choices = Choices(feature_map, normalizer or "none", 1e-4)
    return blocked_bf16.read_forward(q, state, choices)


@pytest.mark.parametrize("feature_map, normalizer", CHOICES)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_reference_to_a_few_roundings(feature_map, normalizer, size):
    q, k, v = inputs(*size, dtype=torch.bfloat16)
    choices = {"feature_map": feature_map, "normalizer": normalizer, "eps": 1e-4}
    truth = linear_attention(*(x.double() for x in (q, k, v)), **choices, impl="reference")
    found = attention(q, k, v, feature_map, normalizer)
    assert (found.dtype, found.is_contiguous()) == (torch.bfloat16, True)
    assert error(found, truth) < 4e-3


def test_inputs_keep_their_strides():
    packed = torch.randn(2, 700, 3, 8, 40).bfloat16()  # one fused projection
    q, k, v = packed.unbind(2)
    truth = attention(q.contiguous(), k.contiguous(), v.contiguous(), "elu1", "mean")
    assert torch.equal(attention(q, k, v, "elu1", "mean"), truth)


def test_features_are_float32_ones_narrowed():
    x = torch.linspace(-20, 20, 4001).bfloat16()[None, :, None, None]
    found = blocked_bf16._phi(x, "elu1", torch.empty_like(x).view(-1), torch.empty_like(x).view(-1))
    truth = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert ((found.transpose(1, 2).double() - truth).abs() <= truth * 2**-8).all()


def test_features_of_numbers_at_the_ends():
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, inf, -inf]).bfloat16()
    nan = torch.tensor([0x7FC0, 0xFFC0 - 0x10000], dtype=torch.int16).view(torch.bfloat16)
    x = torch.cat([x, nan])  # one of either sign
    found = blocked_bf16._phi(x[None, :, None, None], "elu1", x.clone(), x.clone()).flatten()
    truth = torch.where(x > 0, x + 1, x.exp())
    assert torch.equal(found[:-2], truth[:-2]) and found[-2:].isnan().all()


def test_gradients_are_those_of_a_float32_state(monkeypatch):
    monkeypatch.setattr(blocked_bf16, "BF16_PRODUCTS", True)
    q, k, v = (x.requires_grad_() for x in inputs(1, 700, 900, 8, 40, 40, dtype=torch.bfloat16))
    o = linear_attention(q, k, v, impl="blocked")
    do = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, k, v), do)
    monkeypatch.setattr(blocked_bf16, "BF16_PRODUCTS", False)
    exact = torch.autograd.grad(linear_attention(q, k, v, impl="blocked"), (q, k, v), do)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert not torch.equal(o, linear_attention(q, k, v, impl="blocked"))


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"weight": torch.ones(1, 9)}])
def test_what_it_is_not_for(monkeypatch, change):
    monkeypatch.setattr(blocked_bf16, "BF16_PRODUCTS", True)
    q, k, v = inputs(1, 5, 9, 2, 40, 40, change.get("dtype", torch.bfloat16))
    assert not blocked_bf16.applies(q, k, v, change.get("weight"))
    q, k, v = inputs(1, 5, 9, 2, 40, 40, torch.bfloat16)
    assert blocked_bf16.applies(q, k, v, None)
