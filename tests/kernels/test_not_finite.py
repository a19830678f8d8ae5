"""What is not finite reaches the tokens that see it and no others; what is finite stays so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linfusion.kernels import linear_attention, linear_state, ssd_scan

LOST = [float("nan"), float("inf")]
EVERY = ["reference", "blocked", "triton"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scanned(tokens: int = 40) -> dict[str, Tensor]:
    return {
        "x": draw(2, tokens, 2, 8),
        "dt": draw(2, tokens, 2, seed=1),
        "A": -draw(2, seed=2).exp(),
        "B": draw(2, tokens, 1, 8, seed=3),
        "C": draw(2, tokens, 1, 8, seed=4),
    }


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
@pytest.mark.parametrize("impl", EVERY)
def test_a_scan_carries_it_to_later_tokens_alone(impl, name, reverse, lost):
    tensors, at = scanned(), 20  # inside a chunk, inside a tile
    choices = {"chunk_size": 32, "dt_softplus": True, "reverse": reverse, "impl": impl}
    whole = ssd_scan(**tensors, **choices)
    tensors[name][1, at, 0] = lost
    y = ssd_scan(**tensors, **choices)
    before = slice(at + 1, None) if reverse else slice(0, at)
    assert torch.equal(y[0], whole[0])
    assert torch.allclose(y[1, before], whole[1, before], rtol=1e-5, atol=1e-6)
    assert not y[1, at, 0].isfinite().all()


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("size", [1e3, 1e38])
def test_a_decay_of_any_size_gives_finite_outputs_and_gradients(impl, size):
    tensors = scanned()
    tensors["A"] = torch.full((2,), -size)
    tensors["dt"] += 10  # A times it overflows
    leaves = [t.requires_grad_() for t in tensors.values()]
    y, h = ssd_scan(**tensors, chunk_size=32, dt_softplus=True, return_final_states=True, impl=impl)
    grads = torch.autograd.grad(y.square().sum() + h.sum(), leaves)
    assert all(t.isfinite().all() for t in (y, h, *grads))


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_masked_key_may_hold_anything(name, impl, lost):
    q, k, v = (draw(2, n, 2, 16, seed=n) for n in (9, 40, 41))
    v = v[:, :40].contiguous()
    weight = torch.ones(2, 40, dtype=torch.bool)
    weight[:, 30:] = False
    expected = linear_attention(q, k, v, key_weight=weight, impl=impl)
    k, v = k.clone(), v.clone()
    {"k": k, "v": v}[name][:, 33:36, :, 3] = lost
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = linear_attention(q, k, v, key_weight=weight, impl=impl)
    assert torch.equal(o, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.square().sum(), leaves))
    state = linear_state(k, v, key_weight=weight, impl=impl)
    assert all(x.isfinite().all() for x in state)


@pytest.mark.parametrize("impl", EVERY)
def test_a_query_that_is_lost_is_lost_alone(impl):
    q, k, v = (draw(2, n, 2, 16, seed=n) for n in (70, 40, 41))
    v = v[:, :40]
    expected = linear_attention(q, k, v, impl=impl)
    q = q.clone()
    q[1, 33, 1, 5] = float("nan")
    o = linear_attention(q, k, v, impl=impl)
    lost = torch.zeros_like(o, dtype=torch.bool)
    lost[1, 33, 1] = True
    assert torch.equal(o.isnan(), lost)
    assert torch.equal(o[~lost], expected[~lost])
