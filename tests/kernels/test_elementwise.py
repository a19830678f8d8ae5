"""The fused elementwise operators: against torch's and diffusers', their gradients, their bytes."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.library import opcheck

from linfusion.kernels.elementwise import norm_leaky_relu, one_pass, rotary_rms_norm

OPS = torch.ops.linfusion
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Angles that are not those of a neighbour, nor equal within a pair: each entry counts."""
    angle = draw(tokens, dim, seed=9)
    return angle.cos(), angle.sin()


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def check(ours: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == dtype and error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 37, 40), (1, 320), (5, 1, 129)])
def test_a_norm_and_its_activation_are_those_of_torch(shape, dtype):
    x, dy = draw(*shape, dtype=dtype) + 3, draw(*shape, seed=1, dtype=dtype)
    w, b = (draw(shape[-1], seed=i, dtype=dtype) for i in (2, 3))

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = norm_leaky_relu(*leaves, eps=1e-5, slope=0.01, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    truth = run("reference", torch.float64)
    check(run("triton", dtype), truth, dtype)
    eager = nn.functional.leaky_relu(
        nn.functional.layer_norm(x.double(), shape[-1:], w.double(), b.double(), 1e-5), 0.01
    )
    assert torch.equal(truth[0], eager)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 9, 3, 16), (1, 5, 24, 128), (1, 1, 1, 2), (2, 7, 2, 36)])
def test_a_norm_and_its_rotation_are_those_of_flux(shape, dtype):
    x, dy = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    w, (cos, sin) = draw(shape[-1], seed=2, dtype=dtype), tables(shape[1], shape[-1])

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = rotary_rms_norm(*leaves, cos, sin, eps=1e-6, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    check(run("triton", dtype), run("reference", torch.float64), dtype)
    norm = nn.RMSNorm(shape[-1], eps=1e-6, dtype=dtype)
    norm.weight.data.copy_(w)
    with torch.no_grad():
        theirs = apply_rotary_emb(norm(x), (cos, sin), sequence_dim=1)
        ours = rotary_rms_norm(x, norm.weight, cos, sin, eps=1e-6, impl="reference")
    assert error(ours, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("layout", ["a part of a product", "tokens apart", "channels apart"])
def test_the_layout_of_memory_changes_no_bits(layout):
    def view(x: Tensor) -> Tensor:
        if layout == "a part of a product":
            return torch.cat([x, x, x], -1).chunk(3, -1)[1]
        if layout == "tokens apart":
            return torch.cat([x, x], 0).transpose(0, 1).contiguous().transpose(0, 1)[: len(x)]
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    x, dy = draw(2, 9, 24), draw(2, 9, 24, seed=1)
    w, b = draw(24, seed=2), draw(24, seed=3)
    args = (w, b, 1e-5, 0.01)
    assert torch.equal(OPS.norm_leaky_relu(view(x), *args), OPS.norm_leaky_relu(x, *args))
    for a, c in zip(
        OPS.norm_leaky_relu_backward(view(dy), view(x), *args),
        OPS.norm_leaky_relu_backward(dy, x, *args),
        strict=True,
    ):
        assert torch.equal(a, c)
    x, dy = x.view(2, 9, 2, 12), dy.view(2, 9, 2, 12)
    args = (w[:12].clone(), *tables(9, 12), 1e-6)
    assert torch.equal(OPS.rotary_rms_norm(view(x), *args), OPS.rotary_rms_norm(x, *args))


def test_opcheck_of_every_operator():
    x, w, b = draw(2, 5, 24), draw(24, seed=1), draw(24, seed=2)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    opcheck(OPS.norm_leaky_relu, (*leaves, 1e-5, 0.01))
    opcheck(
        OPS.norm_leaky_relu_backward, (draw(2, 5, 24), *(t.detach() for t in leaves), 1e-5, 0.1)
    )
    x, w, (cos, sin) = draw(2, 5, 3, 8), draw(8), tables(5, 8)
    opcheck(OPS.rotary_rms_norm, (x.requires_grad_(), w.requires_grad_(), cos, sin, 1e-6))
    args = (draw(2, 5, 3, 8), x.detach(), w.detach(), cos, sin, 1e-6)
    opcheck(OPS.rotary_rms_norm_backward, args)


X, W = torch.ones(2, 5, 3, 8), torch.ones(8)
TABLE = torch.ones(5, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": X[0]}, r"x: expected 4 axes \[B, N, H, D\], got shape \(5, 3, 8\)"),
        ({"x": X[..., :7]}, r"x: expected an even number of channels, got shape"),
        ({"weight": W[:4]}, r"weight: expected \[C\] = \(8,\) as in x, got \(4,\)"),
        ({"cos": TABLE[:4]}, r"cos: expected \[N, D\] = \(5, 8\) as in x, got \(4, 8\)"),
        ({"sin": TABLE.to("meta")}, r"sin: expected the device of x, cpu, got meta"),
        ({"sin": TABLE.int()}, r"sin: expected a real floating dtype"),
        ({"impl": "cuda"}, r"impl: expected None or one of"),
        ({"x": X.double(), "impl": "triton"}, r"impl: 'triton' takes float16"),
    ],
)
def test_a_wrong_argument_of_a_rotation_is_named(change, message):
    with pytest.raises(ValueError, match="^" + message):
        rotary_rms_norm(**{"x": X, "weight": W, "cos": TABLE, "sin": TABLE} | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.tensor(1.0)}, r"x: expected 1 axis \[..., C\], got shape \(\)"),
        ({"x": X.int()}, r"x: expected a real floating dtype"),
        ({"bias": W[None]}, r"bias: expected 1 axis \[C\], got shape \(1, 8\)"),
        (
            {"x": torch.ones(1, 8193), "weight": torch.ones(8193), "bias": torch.ones(8193)},
            r"impl: 'triton' takes up to 8192 channels, got 8193",
        ),
    ],
)
def test_a_wrong_argument_of_a_norm_is_named(change, message):
    with pytest.raises(ValueError, match="^" + message):
        norm_leaky_relu(**{"x": X, "weight": W, "bias": W, "impl": "triton"} | change)


def test_a_cpu_keeps_the_operators_of_torch():
    assert not one_pass(X)
