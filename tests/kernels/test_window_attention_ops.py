"""How window attention behaves as a `torch.library` operator, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from linfusion.kernels import TileOrder, window_attention
from linfusion.kernels.window_attention import blocks

OPS = torch.ops.linfusion


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def choices(tiled: bool = False, cells: tuple[int, ...] = ()) -> tuple[object, ...]:
    return [3, 7], 2.5, "disc", 0.3, tiled, cells, "blocked"


@pytest.mark.parametrize("small", [0, 512], ids=["tiles", "dense"])
@pytest.mark.parametrize("always", [0, 4])
def test_opcheck_of_attention(small, always, monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", small)
    x = tensors(*[(2, 21, 3, 8)] * 3, *[(2, always, 3, 8)] * 2)
    opcheck(OPS.window_attention, (*x, *choices(cells=(2, 4) if always else ())))


@pytest.mark.parametrize("small", [0, 512], ids=["tiles", "dense"])
def test_opcheck_of_the_backward(small, monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", small)
    shape, everywhere = (2, 21, 3, 8), (2, 4, 3, 8)
    x = [y.detach() for y in tensors(*[shape] * 4, everywhere, everywhere, shape[:3])]
    do, *inputs, dlse = x
    output = OPS.window_attention(*inputs, *choices())
    opcheck(OPS.window_attention_backward, (do, dlse, *inputs, *output, *choices()))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_it_compiles_whole_at_any_size(impl):
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor, height: int) -> Tensor:
        grid = (height, q.shape[1] // height)
        return window_attention(q * 2, k, v, grid=grid, radius=3, context=(k, v), impl=impl) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="eager")
    for height, width in ((4, 6), (5, 9), (7, 3)):
        x = tensors(*[(1, height * width, 2, 8)] * 3)
        assert torch.allclose(compiled(*x, height), f(*x, height))


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()
    order = TileOrder((3, 7))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = window_attention(q, k, v, grid=(3, 7), radius=3, return_lse=True, order=order)
        return o.square().sum() + lse.sin().sum()

    x = tensors(*[(1, 21, 2, 8)] * 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, truth = torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, truth, strict=True))


def test_tile_order_compiles_whole():
    torch._dynamo.reset()
    order = TileOrder((9, 13))
    x = torch.randn(1, 117, 4)

    def f(x: Tensor) -> Tensor:
        return order.undo(order.permute(x) + 1)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(x), x + 1)


def test_a_second_derivative_is_refused_and_says_what_has_one():
    q, k, v = tensors(*[(1, 6, 2, 8)] * 3)
    o = window_attention(q, k, v, grid=(2, 3), radius=2, impl="blocked")
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference' is differentiable any number"):
        dq.sum().backward()


def test_the_kernels_import_neither_triton_nor_diffusers():
    code = (
        "import sys, torch, linfusion.kernels as k; x = torch.ones(1, 6, 1, 8); "
        "k.window_attention(x, x, x, grid=(2, 3), radius=2); "
        "print([m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
