"""Convolutions in two directions, and gated norms of sums: against torch's, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from linfusion.kernels.elementwise import directional_conv, gated_rms_norm

OPS = torch.ops.linfusion
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(ours: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, truth, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert a.dtype == dtype and a.shape == b.shape and error <= TOLERANCE[dtype]


@pytest.mark.parametrize("ways", ["both", "forward", "backward"])
@pytest.mark.parametrize(
    "shape, taps, first, silu, dtype",
    [
        ((2, 37, 130), 4, 5, True, torch.float32),
        ((1, 16, 24), 4, 0, True, torch.bfloat16),
        ((1, 3, 8), 7, 1, False, torch.float16),
    ],
)
def test_a_convolution_is_that_of_each_direction(ways, shape, taps, first, silu, dtype):
    # A part of a product, as the scan's inputs are: rows that are not one after another.
    x = torch.cat([draw(*shape, dtype=dtype)] * 2, -1).chunk(2, -1)[1]
    channels = shape[2]
    drawn = [draw(channels, taps, seed=1), draw(channels, seed=2)]
    drawn += [draw(channels, taps, seed=3), draw(channels, seed=4)]
    there = {"both": slice(0, 4), "forward": slice(0, 2), "backward": slice(2, 4)}[ways]

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in drawn]
        tokens = x.detach().to(dtype).requires_grad_()
        pairs = [tuple(given[i : i + 2]) if there.start <= i < there.stop else None for i in (0, 2)]
        found = directional_conv(tokens, *pairs, first=first, silu=silu, impl=impl)
        outputs = [y for y in found if y is not None]
        dys = [draw(*shape, seed=5 + i, dtype=dtype) for i in range(len(outputs))]
        leaves = [tokens, *given[there]]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, dys)]

    check(run("triton", dtype), run("reference", torch.float64), dtype)


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("of", ["xozw", "xzw", "xoz", "xw"])
@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 9, 3, 20), torch.float32), ((1, 5, 1, 320), torch.bfloat16)],
)
def test_a_gated_norm_is_that_of_torch(of, shape, dtype, gate_last):
    drawn = {"x": draw(*shape), "o": draw(*shape, seed=1), "z": draw(*shape, seed=2)}
    drawn["w"] = draw(*shape[2:], seed=3)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        given = {n: drawn[n].to(dtype).requires_grad_() for n in of}
        y = gated_rms_norm(
            given["x"], given.get("w"), other=given.get("o"), z=given.get("z"),
            scale=0.5, gate_last=gate_last, impl=impl,
        )  # fmt: skip
        leaves = list(given.values())
        return [y.detach(), *torch.autograd.grad(y, leaves, draw(*shape, seed=4, dtype=dtype))]

    check(run("triton", dtype), run("reference", torch.float64), dtype)


def test_opcheck_of_the_operators_around_a_scan():
    w, b = draw(8, 4).requires_grad_(), draw(8).requires_grad_()
    x = draw(1, 6, 8).requires_grad_()
    opcheck(OPS.directional_conv, (x, w, b, w, None, 2, True))
    opcheck(OPS.directional_conv, (x, None, None, w, b, 0, False))
    y = draw(1, 6, 8)
    args = (y, y, x.detach(), w.detach(), b.detach(), w.detach(), None, 2, True)
    opcheck(OPS.directional_conv_backward, args)
    x, w = draw(1, 5, 2, 8).requires_grad_(), draw(2, 8).requires_grad_()
    opcheck(OPS.gated_rms_norm, (x, x, x, w, 1e-5, 0.5, False))
    opcheck(OPS.gated_rms_norm, (x, None, x, None, 1e-5, 1.0, False))
    x, w = x.detach(), w.detach()
    opcheck(OPS.gated_rms_norm_backward, (x, x, None, x, w, 1e-5, 1.0, True))
    opcheck(OPS.gated_rms_norm_backward, (x, x, x, None, None, 1e-5, 1.0, True))


X = torch.ones(1, 5, 8)
W, B = torch.ones(8, 4), torch.ones(8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"forward": None}, r"forward: got None with backward None"),
        ({"forward": (W[:4], B)}, r"forward: expected \(8, 4\) for x, got \(4, 4\)"),
        ({"backward": (torch.ones(8, 3), B)}, r"backward: expected \(8, 4\) for x, got \(8, 3\)"),
        ({"backward": (W, B.to("meta"))}, r"backward: expected the device of x"),
        ({"first": 5}, r"first: got 5, expected 0 to 4"),
    ],
)
def test_a_wrong_argument_of_a_convolution_is_named(arguments, message):
    with pytest.raises(ValueError, match="^" + message):
        directional_conv(**{"x": X, "forward": (W, B), "backward": None} | arguments)


def test_a_wrong_argument_of_a_gated_norm_is_named():
    x = torch.ones(1, 5, 2, 8)
    with pytest.raises(ValueError, match=r"^weight: expected \(2, 8\) for x, got \(8,\)"):
        gated_rms_norm(x, B)
    with pytest.raises(ValueError, match=r"^z: expected \(1, 5, 2, 8\) for x"):
        gated_rms_norm(x, None, z=x[:, :4])
