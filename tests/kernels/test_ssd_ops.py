"""How the scan behaves as a `torch.library` operator, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from linfusion.kernels import ssd_scan

OPS = torch.ops.linfusion


def tensors(length: int = 11, optional: bool = True) -> tuple[list[Tensor], list[Tensor | None]]:
    """x, dt, a, b, c, and skip and initial or None."""
    torch.manual_seed(0)
    shapes = [(2, length, 4, 3), (2, length, 4), (2, length, 4), *[(2, length, 2, 5)] * 2]
    x, dt, a, b, c = (torch.randn(shape) for shape in shapes)
    a = -a.abs()
    needed = [t.requires_grad_() for t in (x, dt, a, b, c)]
    if not optional:
        return needed, [None, None]
    skip, initial = (torch.randn(shape, requires_grad=True) for shape in ((2, 4, 3), (2, 4, 3, 5)))
    return needed, [skip, initial]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_the_scan(optional, reverse):
    needed, rest = tensors(optional=optional)
    opcheck(OPS.ssd_scan, (*needed, *rest, 4, reverse, "blocked"))


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_of_the_backward(optional):
    needed, rest = tensors(optional=optional)
    needed = [t.detach() for t in needed]
    rest = [None if t is None else t.detach() for t in rest]
    y, final, kept = OPS.ssd_scan(*needed, *rest, 4, False, "blocked")
    opcheck(OPS.ssd_scan_backward, (y, final, *needed, rest[0], kept, 4, False, "blocked"))


@pytest.mark.parametrize("chunk_size", [4, 600])
def test_the_fake_knows_how_many_states_are_kept(chunk_size):
    for length in (1, 3, 4, 11, 512, 513, 1300):
        needed, rest = tensors(length, optional=False)
        args = (*(t.detach() for t in needed), *rest, chunk_size, False, "blocked")
        real = OPS.ssd_scan(*args)
        meta = OPS.ssd_scan(*(t.to("meta") if isinstance(t, Tensor) else t for t in args))
        assert [t.shape for t in real] == [t.shape for t in meta]


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Some work before and after, and every option."""
    y, h = ssd_scan(
        x * 2,
        dt,
        a[0, 0],
        b,
        c,
        chunk_size=4,
        D=a[0, 1],
        dt_bias=a[1, 0],
        dt_softplus=True,
        dt_limit=(0.1, 2.0),
        return_final_states=True,
        reverse=True,
    )
    return y.square().sum() + h.sin().sum()


def test_it_compiles_whole_at_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend="eager")
    for length in (6, 11, 16):
        needed, _ = tensors(length)
        assert torch.allclose(compiled(*needed), scan(*needed))


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (6, 11):
        needed, _ = tensors(length)
        ours = torch.autograd.grad(compiled(*needed), needed)
        truth = torch.autograd.grad(scan(*needed), needed)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, truth, strict=True))


def test_checkpointed_gradients_are_the_plain_ones():
    needed, rest = tensors()

    def scan(*args: Tensor) -> Tensor:
        return OPS.ssd_scan(*args, *rest, 4, False, "blocked")[0]

    plain = torch.autograd.grad(scan(*needed).sin().sum(), needed)
    again = checkpoint(scan, *needed, use_reentrant=False).sin().sum()
    assert all(map(torch.equal, torch.autograd.grad(again, needed), plain))


def test_a_second_derivative_is_refused_and_says_what_has_one():
    needed, _ = tensors()
    x, dt, a, b, c = needed
    y = ssd_scan(x, dt, a[0, 0], b, c, chunk_size=4)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference' is differentiable any number"):
        dx.sum().backward()


def test_the_kernels_import_neither_triton_nor_diffusers():
    code = (
        "import sys, torch, linfusion.kernels as k; x = torch.ones(1, 6, 1, 8); "
        "k.ssd_scan(x, x[..., 0], -x[0, 0, :, 0], x, x, chunk_size=4); "
        "print([m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
