"""What linear attention computes: against closed forms, between implementations, its gradients."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linfusion.kernels import LinearState, linear_attention, linear_read, linear_state

CHOICES = [
    ("elu1", "mean"),
    ("elu1", "sum"),
    ("elu1", None),
    ("relu", "mean"),
    ("relu", "sum"),
    ("relu_eps", "mean"),
    ("identity", None),
]
# B, N, M, H, D, E
SIZES = [
    (1, 1, 1, 1, 8, 8),
    (2, 63, 500, 2, 40, 40),
    (1, 500, 63, 3, 63, 24),
    (3, 7, 130, 1, 80, 8),
    (1, 65, 33, 2, 160, 160),
    (1, 5, 9, 1, 576, 576),
]


def inputs(
    batch: int, n: int, m: int, heads: int, d: int, e: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + 7 * m + 31 * d)
    q = torch.randn(batch, n, heads, d, dtype=torch.float64)
    k = torch.randn(batch, m, heads, d, dtype=torch.float64)
    v = torch.randn(batch, m, heads, e, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The authors' formula in the working dtype: elu + 1, 1/√N on both factors, divide last."""
    b, n, h, _ = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, x.shape[1], -1) for x in (q, k, v))
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
    s = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
    return (q @ s / z).reshape(b, h, n, -1).transpose(1, 2)


def error(x: Tensor, truth: Tensor) -> float:
    """Relative root mean square."""
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalizer", ["mean", "sum", None])
def test_it_is_the_normalised_sum_over_all_pairs(impl, size, normalizer):
    q, k, v = inputs(*size)
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    a = torch.einsum("bnhd,bmhd->bhnm", phi_q, phi_k)
    if normalizer == "mean":
        a = a / (a.sum(-1, keepdim=True) + 0.1 * k.shape[1])
    elif normalizer == "sum":
        a = a / (a.sum(-1, keepdim=True) + 0.1)
    truth = torch.einsum("bhnm,bmhe->bnhe", a, v)
    o = linear_attention(q, k, v, normalizer=normalizer, eps=0.1, impl=impl)
    assert error(o, truth) < 1e-13


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("feature_map, normalizer", CHOICES)
def test_blocks_agree_with_the_reference(size, feature_map, normalizer):
    q, k, v = inputs(*size, dtype=torch.float32)
    options = {"feature_map": feature_map, "normalizer": normalizer}
    truth = linear_attention(q.double(), k.double(), v.double(), **options, impl="reference")
    assert error(linear_attention(q, k, v, **options, impl="blocked"), truth) < 2e-6


@pytest.mark.parametrize("tokens", [1639, 9001])
def test_many_blocks_are_one_sum(tokens):
    q, k, v = inputs(2, tokens, tokens, 8, 40, 40, dtype=torch.float32)
    truth = linear_attention(q.double(), k.double(), v.double(), impl="reference")
    assert error(linear_attention(q, k, v, impl="blocked"), truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_error_is_at_most_that_of_the_eager_formula(dtype, tokens, scale):
    q, k, v = inputs(1, tokens, tokens, 8, 40, 40)
    q, k, v = (scale * q).to(dtype), (scale * k).to(dtype), v.to(dtype)
    truth = eager(q.double(), k.double(), v.double())
    ours, theirs = error(linear_attention(q, k, v), truth), error(eager(q, k, v), truth)
    # In float32 both are a few roundings; which of two equal errors is smaller is chance.
    assert ours <= theirs * (1.1 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_half_precision_sum_does_not_drift(dtype):
    # Keys and values are constant, so o = v·z/(z + eps); a float16 sum of φ(k) would overflow.
    k, v = torch.full((1, 70_000, 1, 8), 1.0, dtype=dtype), torch.ones(1, 70_000, 1, 8, dtype=dtype)
    o = linear_attention(k[:, :2], k, v, eps=0.0)
    assert torch.equal(o, torch.ones_like(o))


def test_elu1_keeps_its_tail():
    # exp(-20) = 2e-9; elu(-20) + 1 is 0 in float32.
    q = torch.full((1, 1, 1, 8), -20.0)
    s = linear_state(q, torch.ones(1, 1, 1, 8))
    assert torch.allclose(s.k_mean, torch.tensor(-20.0).exp(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_callable_is_the_feature_map(impl):
    q, k, v = inputs(2, 5, 7, 2, 8, 8)
    o = linear_attention(q, k, v, feature_map=lambda x: torch.cat([x, -x], -1).relu(), impl=impl)
    phi_q, phi_k = (torch.cat([x, -x], -1).relu() for x in (q, k))
    truth = linear_attention(phi_q, phi_k, v, feature_map="identity", impl=impl)
    assert torch.equal(o, truth)


def test_a_callable_is_evaluated_in_float32():
    seen = []

    def feature_map(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.relu()

    q, k, v = inputs(1, 5, 7, 2, 8, 8, dtype=torch.bfloat16)
    o = linear_attention(q, k, v, feature_map=feature_map)
    assert (set(seen), o.dtype) == ({torch.float32}, torch.bfloat16)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("normalizer", ["mean", "sum", None])
def test_a_mask_removes_keys(impl, normalizer):
    q, k, v = inputs(2, 5, 9, 2, 8, 8)
    mask = torch.arange(9) % 3 != 0
    o = linear_attention(q, k, v, key_weight=mask[None], normalizer=normalizer, impl=impl)
    truth = linear_attention(q, k[:, mask], v[:, mask], normalizer=normalizer, impl=impl)
    assert error(o, truth) < 1e-14


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_weight_of_two_is_a_key_given_twice(impl):
    q, k, v = inputs(2, 5, 9, 2, 8, 8)
    weight = torch.tensor([[2.0] + [1.0] * 8, [1.0] * 9])
    o = linear_attention(q, k, v, key_weight=weight, impl=impl)
    twice = torch.cat([k[:1, :1], k[:1]], 1), torch.cat([v[:1, :1], v[:1]], 1)
    assert error(o[:1], linear_attention(q[:1], *twice, impl=impl)) < 1e-14
    assert error(o[1:], linear_attention(q[1:], k[1:], v[1:], impl=impl)) < 1e-14


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_with_every_key_masked_the_output_is_zero(impl):
    q, k, v = inputs(1, 5, 9, 2, 8, 8)
    o = linear_attention(q, k, v, key_weight=torch.zeros(1, 9), impl=impl)
    assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype):
    batch, n, heads, d = 2, 70, 3, 40
    packed = torch.randn(batch, n, 3, heads, d).to(dtype)  # one fused projection
    q, k, v = packed.unbind(2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    inside_out = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    truth = linear_attention(*(x.contiguous() for x in (q, k, v)))
    for views in ((q, k, v), heads_first, inside_out):
        assert torch.allclose(linear_attention(*views), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_the_output_is_contiguous_and_has_the_dtype_of_v(impl):
    q, k, v = inputs(2, 5, 9, 2, 8, 16, dtype=torch.float16)
    o = linear_attention(q.float(), k.float(), v, impl=impl)
    assert (o.dtype, o.shape, o.is_contiguous()) == (torch.float16, (2, 5, 2, 16), True)


def test_nothing_uninitialised_is_read(monkeypatch):
    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            library = sys._getframe(1).f_globals["__name__"].startswith("linfusion")
            return x.fill_(float("nan")) if library and x.is_floating_point() else x

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for size in ((2, 500, 700, 8, 40, 24), (3, 5, 2, 2, 8, 40)):
        q, k, v = (x.requires_grad_() for x in inputs(*size, dtype=torch.float32))
        o = linear_attention(q, k, v, key_weight=torch.rand(1, k.shape[1]), impl="blocked")
        o.square().sum().backward()
        assert all(x.isfinite().all() for x in (o, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_autocast_does_not_round_the_sums(impl):
    q, k, v = inputs(1, 50, 50, 2, 8, 8, dtype=torch.float32)
    truth = linear_attention(q, k, v, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, impl=impl), truth)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("feature_map, normalizer", CHOICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_finite_differences(impl, feature_map, normalizer, weighted):
    q, k, v = (x.requires_grad_() for x in inputs(2, 7, 5, 2, 3, 4))
    weight = torch.rand(2, 5, dtype=torch.float64) if weighted else None
    options = {"feature_map": feature_map, "normalizer": normalizer, "key_weight": weight}
    assert torch.autograd.gradcheck(
        lambda q, k, v: linear_attention(q, k, v, **options, impl=impl), (q, k, v)
    )


def test_gradients_flow_through_a_state():
    q, k, v = (x.requires_grad_() for x in inputs(2, 7, 6, 2, 3, 4))

    def halves(q, k, v):
        first, second = linear_state(k[:, :2], v[:, :2]), linear_state(k[:, 2:], v[:, 2:])
        return linear_read(q, first.merge(second))

    assert torch.autograd.gradcheck(halves, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_many_blocks_agree_with_the_reference(dtype):
    q, k, v = inputs(2, 700, 900, 8, 40, 24)
    do = torch.randn(2, 700, 8, 24)
    truth = [x.to(dtype).double().requires_grad_() for x in (q, k, v)]
    linear_attention(*truth, impl="reference").backward(do.to(dtype).double())
    ours = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    linear_attention(*ours, impl="blocked").backward(do.to(dtype))
    for x, y in zip(ours, truth, strict=True):
        assert error(x.grad, y.grad) < (2e-6 if dtype == torch.float32 else 3e-3)


def test_backward_saves_nothing_as_long_as_the_tokens_but_the_inputs():
    q, k, v = (x.requires_grad_() for x in inputs(1, 300, 300, 2, 8, 8, dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_attention(q, k, v, impl="blocked")
    long = [x for x in saved if x.numel() >= 300]
    assert {x.data_ptr() for x in long} == {x.data_ptr() for x in (q, k, v)}


def test_the_reference_is_differentiable_twice():
    q, k, v = (x.requires_grad_() for x in inputs(1, 3, 2, 1, 2, 2))
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: linear_attention(q, k, v, impl="reference"), (q, k, v)
    )


def test_the_weight_of_a_key_can_be_learned():
    q, k, v = inputs(1, 3, 4, 1, 2, 2)
    weight = torch.rand(1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: linear_attention(q, k, v, key_weight=w), weight)


def states(k: Tensor, v: Tensor, cuts: list[int]) -> list[LinearState]:
    edges = [0, *sorted(cuts), k.shape[1]]
    return [linear_state(k[:, a:b], v[:, a:b]) for a, b in pairwise(edges) if a < b]


def close(a: LinearState, b: LinearState) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-13) for x, y in zip(a, b, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=4), st.permutations(range(5)))
def test_splitting_the_tokens_changes_nothing(cuts, order):
    _, k, v = inputs(2, 1, 60, 2, 8, 5)
    parts = states(k, v, cuts)
    parts = [parts[i] for i in order if i < len(parts)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert close(merged, linear_state(k, v))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_merge_is_commutative_and_associative(a, b, c):
    _, k, v = inputs(1, 1, a + b + c, 2, 8, 5)
    x, y, z = states(k, v, [a, a + b])
    assert close(x.merge(y), y.merge(x))
    assert close(x.merge(y).merge(z), x.merge(y.merge(z)))


def test_an_empty_state_is_the_identity_of_merge():
    _, k, v = inputs(2, 1, 9, 2, 8, 5)
    x, empty = linear_state(k, v), linear_state(k, v, key_weight=torch.zeros(1, 9))
    assert close(x.merge(empty), x)
    assert close(empty.merge(empty), empty)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(40)))
def test_the_order_of_the_keys_does_not_matter(order):
    q, k, v = inputs(1, 4, 40, 2, 8, 5)
    assert error(linear_attention(q, k[:, order], v[:, order]), linear_attention(q, k, v)) < 1e-13


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("normalizer", ["mean", "sum", None])
def test_attention_is_a_read_of_the_state(impl, normalizer):
    q, k, v = inputs(2, 9, 12, 2, 8, 5, dtype=torch.float32)
    state = linear_state(k, v, impl=impl)
    o = linear_read(q, state, normalizer=normalizer, impl=impl)
    assert torch.equal(o, linear_attention(q, k, v, normalizer=normalizer, impl=impl))


def test_a_state_is_float32():
    _, k, v = inputs(1, 1, 12, 2, 8, 5, dtype=torch.bfloat16)
    assert {x.dtype for x in linear_state(k, v)} == {torch.float32}
