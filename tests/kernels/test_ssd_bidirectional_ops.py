"""How both scans behave as a `torch.library` operator, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from linfusion.kernels import ssd_bidirectional

OPS = torch.ops.linfusion
ONE = torch.ones
GOOD = {
    "x": ONE(2, 6, 4, 3),
    "dt": ONE(2, 6, 4),
    "A": -ONE(4),
    "B": ONE(2, 6, 2, 5),
    "C": ONE(2, 6, 2, 5),
    "chunk_size": 4,
}


def tensors(length: int = 11) -> list[Tensor]:
    """x, dt, a, b, c and skip."""
    torch.manual_seed(0)
    shapes = [(2, length, 4, 3), *[(2, length, 4, 2)] * 2, *[(2, length, 2, 5)] * 2, (2, 4, 3)]
    x, dt, a, b, c, skip = (torch.randn(shape) for shape in shapes)
    return [t.requires_grad_() for t in (x, dt, -a.abs(), b, c, skip)]


@pytest.mark.parametrize("skips", [False, True])
def test_opcheck_of_the_scans_and_of_their_backward(skips):
    *needed, skip = tensors()
    args = (*needed, skip if skips else None)
    opcheck(OPS.ssd_bidirectional, (*args, 4, "blocked"))
    args = tuple(t if t is None else t.detach() for t in args)
    y, kept = OPS.ssd_bidirectional(*args, 4, "blocked")
    opcheck(OPS.ssd_bidirectional_backward, (y, *args, kept, 4, "blocked"))


@pytest.mark.parametrize("chunk_size", [4, 600])
def test_the_fake_knows_how_many_states_are_kept(chunk_size):
    for length in (1, 3, 4, 11, 512, 513, 1300):
        args = [t.detach() for t in tensors(length)]
        real = OPS.ssd_bidirectional(*args, chunk_size, "blocked")
        meta = OPS.ssd_bidirectional(*(t.to("meta") for t in args), chunk_size, "blocked")
        assert [t.shape for t in real] == [t.shape for t in meta]


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """Some work before and after, and every option."""
    y = ssd_bidirectional(
        x * 2,
        dt[..., 0],
        a[0, 0, :, 0],
        b,
        c,
        chunk_size=4,
        dt_b=dt[..., 1],
        A_b=a[0, 0, :, 1],
        D=skip[0],
        z=x,
        dt_bias=a[1, 0, :, 0],
        dt_bias_b=a[1, 0, :, 1],
        dt_softplus=True,
        dt_limit=(0.1, 2.0),
    )
    return y.square().sum()


def test_it_compiles_whole_at_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend="eager")
    for length in (6, 11, 16):
        needed = tensors(length)
        assert torch.allclose(compiled(*needed), scan(*needed))


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (6, 11):
        needed = tensors(length)
        ours = torch.autograd.grad(compiled(*needed), needed)
        truth = torch.autograd.grad(scan(*needed), needed)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, truth, strict=True))


def test_checkpointed_gradients_are_the_plain_ones():
    needed = tensors()

    def f(*args: Tensor) -> Tensor:
        return OPS.ssd_bidirectional(*args, 4, "blocked")[0]

    plain = torch.autograd.grad(f(*needed).sin().sum(), needed)
    again = checkpoint(f, *needed, use_reentrant=False).sin().sum()
    assert all(map(torch.equal, torch.autograd.grad(again, needed), plain))


def test_vmap_is_a_loop():
    x, dt, a, b, c, _ = (t.detach() for t in tensors())
    xs = torch.stack([x, 2 * x, -x])

    def f(x: Tensor) -> Tensor:
        return ssd_bidirectional(x, dt[..., 0].exp(), a[0, 0, :, 0], b, c, chunk_size=4)

    together = torch.vmap(f)(xs)
    assert all(torch.allclose(u, f(v), atol=1e-6) for u, v in zip(together, xs, strict=True))


def test_a_second_derivative_is_refused_and_says_what_has_one():
    x, dt, a, b, c, _ = tensors()
    y = ssd_bidirectional(x, dt[..., 0], a[0, 0, :, 0], b, c, chunk_size=4)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference' is differentiable any number"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": ONE(6, 4, 3)}, r"x: expected 4 axes \[B, L, H, P\], got shape \(6, 4, 3\)"),
        ({"dt": ONE(2, 5, 4)}, r"dt: expected \[B, L, H\] = \(2, 6, 4\), got \(2, 5, 4\)"),
        ({"dt_b": ONE(2, 5, 4)}, r"dt_b: expected \[B, L, H\] = \(2, 6, 4\), got \(2, 5, 4\)"),
        ({"dt_b": ONE(2, 6)}, r"dt_b: expected 3 axes \[B, L, H\], got shape \(2, 6\)"),
        ({"dt_b": ONE(2, 6, 4).int()}, r"dt_b: expected a real floating dtype .* torch.int32"),
        ({"dt_b": ONE(2, 6, 4, device="meta")}, r"dt_b: expected the device of x, cpu, got meta"),
        ({"A_b": -1.0}, r"A_b: expected a tensor \[H\], got float"),
        ({"A_b": -ONE(3)}, r"A_b: expected \[H\] = \(4,\), got \(3,\)"),
        ({"C": ONE(2, 6, 1, 5)}, r"C: expected \[B, L, G, N\] = \(2, 6, 2, 5\), got"),
        ({"chunk_size": 0}, r"chunk_size: expected an integer of at least 1, got 0"),
        ({"D": ONE(3)}, r"D: expected \[H\] = \(4,\), got \(3,\)"),
        ({"z": ONE(2, 6, 4, 4)}, r"z: expected \[B, L, H, P\] = \(2, 6, 4, 3\), got"),
        ({"dt_bias": ONE(2)}, r"dt_bias: expected \[H\] = \(4,\), got \(2,\)"),
        ({"dt_bias_b": ONE(2)}, r"dt_bias_b: expected \[H\] = \(4,\), got \(2,\)"),
        ({"dt_softplus": 1}, r"dt_softplus: expected True or False, got 1"),
        ({"dt_limit": (math.nan, 1.0)}, r"dt_limit: .* smallest finite, got \(nan, 1.0\)"),
        ({"impl": "cuda"}, r"impl: expected None or one of \('reference', 'blocked'.*got 'cuda'"),
        (
            {"A_b": -ONE(4).double(), "impl": "triton"},
            r"impl: 'triton' takes float16, bfloat16 and float32, got float64",
        ),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match="^" + message):
        ssd_bidirectional(**GOOD | change)
