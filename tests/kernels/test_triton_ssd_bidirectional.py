"""The Triton kernels of both directions of the scan, interpreted on a CPU, against recurrences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from linfusion.kernels import ssd_bidirectional
from linfusion.kernels.ssd import reference
from linfusion.kernels.ssd.bidirectional import triton as kernels

OPS = torch.ops.linfusion
# Relative RMS error against float64. Wrong signs, masks or decays are errors of order one.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
NAMES = ("y", "dx", "ddt", "da", "db", "dc", "dskip")
# batch, tokens, heads, channels, groups, features
SIZES = [(2, 1, 2, 5, 2, 3), (1, 63, 4, 24, 2, 40), (1, 70, 3, 40, 1, 24)]


def inputs(
    size: tuple[int, ...], dtype: torch.dtype = torch.float32, skips: bool = True
) -> list[Tensor | None]:
    """x, dt, a, b, c and skip, with decays from hardly any to nearly all of the state."""
    batch, tokens, heads, channels, groups, features = size
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = draw(batch, tokens, heads, channels).to(dtype)
    b, c = (draw(batch, tokens, groups, features).to(dtype) for _ in range(2))
    dt = draw(batch, tokens, heads, 2).exp()
    a = -dt * draw(heads, 2).exp()
    return [x, dt, a, b, c, draw(batch, heads, channels) if skips else None]


def ask(y: Tensor) -> Tensor:
    """The gradient of y that is asked for."""
    return torch.arange(y.numel(), device=y.device).view_as(y).sin().to(y.dtype)


def run(args: list[Tensor | None], chunk_size: int) -> list[Tensor]:
    """Output and gradients by the kernels."""
    y, kept = kernels.scan(*args, chunk_size)
    return [y, *kernels.scan_backward(ask(y), *args, kept, chunk_size)]


def exact(args: list[Tensor | None]) -> list[Tensor | None]:
    """The same by the recurrence, in float64; None for what is not there."""
    leaves = [None if t is None else t.double().requires_grad_() for t in args]
    x, dt, a, b, c, skip = leaves
    forward, backward = (
        reference.scan(x, dt[..., i], a[..., i], b, c, None if i else skip, None, None, bool(i))[0]
        for i in range(2)
    )
    y = forward + backward
    wanted = ask(y).to(args[0].dtype).double()
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, there, wanted, materialize_grads=True))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def error(ours: Tensor, truth: Tensor) -> float:
    wrong, size = (ours.double() - truth).square().mean(), truth.square().mean()
    return 0.0 if wrong == 0 else (wrong / size).sqrt().item()


def check(args: list[Tensor | None], chunk_size: int) -> None:
    for name, mine, true in zip(NAMES, run(args, chunk_size), exact(args), strict=True):
        if true is not None:
            half = name in ("y", "dx", "db", "dc")
            assert mine.dtype == (args[0].dtype if half else torch.float32), name
            assert error(mine, true) <= TOLERANCE[mine.dtype], name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not yet written holds NaN."""

    def poison(allocate):  # type: ignore[no-untyped-def]
        def empty(*args, **kwargs):  # type: ignore[no-untyped-def]
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_agree_with_two_recurrences(size, poisoned):
    check(inputs(size), 32)


def test_without_a_skip_connection_they_agree_too(poisoned):
    check(inputs((1, 20, 2, 5, 2, 3), skips=False), 16)


@pytest.mark.parametrize("chunk_size", [1, 50, 256])
def test_chunks_of_every_size_agree(chunk_size, poisoned):
    args = inputs((1, 270, 2, 16, 1, 16))
    assert error(kernels.scan(*args, chunk_size)[0], exact(args)[0]) <= 2e-6


def test_half_precision_agrees(poisoned):
    check(inputs((1, 70, 4, 24, 2, 40), torch.float16), 64)


def test_decays_that_forget_everything_are_finite(poisoned):
    args = inputs((1, 70, 2, 16, 1, 16))
    args[2] = torch.full_like(args[2], -200.0)
    ours, truth = run(args, 64), exact(args)
    assert not ours[NAMES.index("da")].any()  # e⁻²⁰⁰ is 0 in float32
    assert all(t.isfinite().all() for t in ours)
    assert error(ours[0], truth[0]) <= 2e-6


def test_small_decays_are_exact_between_large_ones(poisoned):
    # In float32 the sums of log-decays, -25,600, have an absolute error of 0.001.
    args = inputs((1, 256, 2, 16, 1, 16))
    args[2] = torch.full_like(args[2], -1e-3)
    args[2][:, ::2] = torch.where(torch.arange(128) < 100, -200.0, -1e-3)[None, :, None, None]
    assert error(kernels.scan(*args, 256)[0], exact(args)[0]) <= 2e-6


@pytest.mark.parametrize("layout", ["heads first", "part of a projection", "inside out"])
def test_the_layout_of_memory_changes_no_bits(layout):
    def view(x: Tensor) -> Tensor:
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "part of a projection":
            return torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]]
        return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # features outermost

    args = inputs((2, 40, 4, 8, 2, 16))
    other = [view(t) if i in (0, 3, 4) else t for i, t in enumerate(args)]
    assert torch.equal(kernels.scan(*other, 32)[0], kernels.scan(*args, 32)[0])


@pytest.mark.parametrize("axis", ["batch", "token", "head"])
def test_offsets_beyond_two_to_the_31_are_right(axis):
    # Four gigabytes of address space, of which a few pages are touched.
    far = {"batch": (2**31, 64, 32, 1), "token": (64, 2**30, 32, 1), "head": (64, 128, 2**31, 1)}
    args = inputs((1 if axis == "token" else 2, 3, 2, 16, 2, 16), torch.float16)
    memory = torch.empty(2**31 + 4096, dtype=torch.float16)
    near, _ = kernels.scan(*args, 16)
    for place in (0, 3, 4):
        moved = memory.as_strided(args[place].shape, far[axis])
        moved.copy_(args[place])
        ours, _ = kernels.scan(*args[:place], moved, *args[place + 1 :], 16)
        assert torch.equal(ours, near), place


def test_the_public_function_runs_these_kernels_and_their_gradients():
    x, dt, a, b, c, skip = inputs((2, 20, 2, 8, 1, 16))
    named = {"x": x, "dt": dt[..., 0], "dt_b": dt[..., 1], "A": a[0, 0, :, 0], "B": b, "C": c}
    named |= {"A_b": a[0, 0, :, 1], "D": skip[0], "z": x.flip(0), "dt_bias": dt[0, 0, :, 0]}

    def results(impl: str, dtype: torch.dtype) -> list[Tensor]:
        x = {k: t.to(dtype).requires_grad_() for k, t in named.items()}
        y = ssd_bidirectional(**x, chunk_size=16, dt_softplus=True, impl=impl)
        return [y, *torch.autograd.grad(F.silu(y).sum(), list(x.values()))]

    truth, eager = (results("reference", dtype) for dtype in (torch.float64, torch.float32))
    ours = results("triton", torch.float32)
    for name, mine, true, plain in zip(("y", *named), ours, truth, eager, strict=True):
        assert error(mine, true) <= 2 * error(plain, true) + 1e-6, name


def test_opcheck_of_the_scans_and_of_their_backward():
    args = inputs((1, 3, 1, 3, 1, 2))
    opcheck(OPS.ssd_bidirectional, (*(t.clone().requires_grad_() for t in args), 4, "triton"))
    y, kept = OPS.ssd_bidirectional(*args, 4, "triton")
    opcheck(OPS.ssd_bidirectional_backward, (y, *args, kept, 4, "triton"))
