"""How linear attention behaves as a `torch.library` operator, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from linfusion.kernels import linear_attention, linear_read, linear_state

OPS = torch.ops.linfusion


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("normalizer", ["mean", "none"])
def test_opcheck_of_attention(normalizer):
    q, k, v = tensors((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 4))
    weight = torch.rand(2, 7)
    opcheck(OPS.linear_attention, (q, k, v, weight, "elu1", normalizer, 1e-4, "blocked"))


def test_opcheck_of_a_state():
    k, v = tensors((2, 7, 3, 8), (2, 7, 3, 4))
    opcheck(OPS.linear_state, (k, v, None, "relu", "blocked"))


def test_opcheck_of_a_read():
    q, kv, k_mean = tensors((2, 5, 3, 8), (2, 3, 8, 4), (2, 3, 8))
    count = torch.tensor([7.0, 5.0])
    choices = (torch.float32, "elu1", "sum", 10.0, "blocked")
    opcheck(OPS.linear_read, (q, kv, k_mean.detach().abs(), count, *choices))


def test_opcheck_of_each_backward():
    q, k, v, do = (
        x.detach() for x in tensors((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 4), (2, 5, 3, 4))
    )
    weight, choices = torch.rand(2, 7), ("elu1", "mean", 1e-4, "blocked")
    _, *state = OPS.linear_attention(q, k, v, weight, *choices)
    kv, k_mean, count = state
    opcheck(OPS.linear_attention_backward, (do, q, k, v, weight, *state, *choices))
    opcheck(OPS.linear_read_backward, (do, q, *state, *choices))
    opcheck(OPS.linear_state_backward, (kv, k_mean, k, v, weight, count, "elu1", "blocked"))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_it_compiles_whole_with_any_number_of_tokens(impl):
    torch._dynamo.reset()
    graphs = 0

    def count_graphs(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def f(q, k, v):
        return linear_attention(q * 2, k, v, impl=impl) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=count_graphs)
    for tokens in (11, 13, 300):
        q, k, v = tensors((1, tokens, 2, 8), (1, tokens + 3, 2, 8), (1, tokens + 3, 2, 8))
        assert torch.allclose(compiled(q, k, v), f(q, k, v))
    assert graphs == 1


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()

    def loss(q, k, v):
        return linear_read(q, linear_state(k, v)).square().sum() + linear_attention(q, k, v).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = tensors((1, tokens, 2, 8), (1, tokens + 3, 2, 8), (1, tokens + 3, 2, 8))
        ours, truth = torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, truth, strict=True))


def test_a_second_derivative_is_refused_and_says_what_has_one():
    q, k, v = tensors((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8))
    (dq,) = torch.autograd.grad(
        linear_attention(q, k, v, impl="blocked").sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="impl='reference' is differentiable any number"):
        dq.sum().backward()


def test_the_kernels_import_neither_triton_nor_diffusers():
    code = (
        "import sys, torch, linfusion.kernels as k; x = torch.ones(1, 2, 1, 8); "
        "before = set(sys.modules); k.linear_attention(x, x, x); "
        "print([m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
