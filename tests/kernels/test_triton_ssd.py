"""The Triton kernels of the scan, interpreted on a CPU, against the recurrence."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from linfusion.kernels import ssd_scan
from linfusion.kernels.ssd import reference
from linfusion.kernels.ssd import triton as kernels
from linfusion.kernels.ssd.common import Choices

OPS = torch.ops.linfusion
# Relative RMS error against float64. Wrong signs, masks or decays are errors of order one.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
NAMES = ("y", "final", "dx", "ddt", "da", "db", "dc", "dskip", "dinitial")
# batch, tokens, heads, channels, groups, features
SIZES = [(2, 1, 2, 5, 2, 3), (1, 63, 4, 24, 2, 40), (2, 130, 3, 40, 1, 24), (1, 70, 2, 16, 2, 16)]


class Scan(NamedTuple):
    """What `kernels.scan` takes, and gradients of what it returns."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor | None
    initial: Tensor | None
    dy: Tensor
    dfinal: Tensor


def inputs(
    size: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
) -> Scan:
    """Decays from hardly any to nearly all of the state."""
    batch, tokens, heads, channels, groups, features = size
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x, dy = (draw(batch, tokens, heads, channels).to(dtype) for _ in range(2))
    b, c = (draw(batch, tokens, groups, features).to(dtype) for _ in range(2))
    dt = draw(batch, tokens, heads).exp()
    a = -dt * draw(heads).exp()
    skip, initial = draw(batch, heads, channels), draw(batch, heads, channels, features)
    if not optional:
        skip = initial = None
    return Scan(x, dt, a, b, c, skip, initial, dy, draw(batch, heads, channels, features))


def run(s: Scan, chunk_size: int, reverse: bool, splits: int | None = None) -> list[Tensor]:
    """Output, last state and gradients by the kernels."""
    choices = Choices(chunk_size, reverse)
    y, final, kept = kernels.scan(*s[:7], choices)
    grads = kernels.scan_backward(s.dy, s.dfinal, *s[:6], kept, choices, splits=splits)
    return [y, final, *grads]


def exact(s: Scan, reverse: bool) -> list[Tensor | None]:
    """The same by the recurrence, in float64; None for what is not there."""
    leaves = [None if t is None else t.double().requires_grad_() for t in s[:7]]
    output = reference.scan(*leaves, Choices(1, reverse))
    there = [t for t in leaves if t is not None]
    wanted = (s.dy.double(), s.dfinal.double())
    grads = iter(torch.autograd.grad(output, there, wanted, materialize_grads=True))
    found = [None if t is None else next(grads) for t in leaves]
    return [*(t.detach() for t in output), *found]


def error(ours: Tensor, truth: Tensor) -> float:
    wrong, size = (ours.double() - truth).square().mean(), truth.square().mean()
    return 0.0 if wrong == 0 else (wrong / size).sqrt().item()


def check(ours: list[Tensor], truth: list[Tensor | None], s: Scan) -> None:
    for name, mine, true in zip(NAMES, ours, truth, strict=True):
        if true is not None:
            half = name in ("y", "dx", "db", "dc")
            assert mine.dtype == (s.x.dtype if half else torch.float32), name
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


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_agree_with_the_recurrence(size, reverse, optional, poisoned):
    s = inputs(size, optional=optional)
    check(run(s, 32, reverse), exact(s, reverse), s)


@pytest.mark.parametrize("channels, features", [(80, 72), (128, 65)])
def test_channels_and_features_beyond_a_piece_agree(channels, features, poisoned):
    s = inputs((1, 70, 2, channels, 1, features))
    check(run(s, 64, False), exact(s, False), s)


@pytest.mark.parametrize("chunk_size", [1, 50, 256, 1000])
def test_chunks_of_every_size_agree(chunk_size, poisoned):
    s = inputs((1, 270, 2, 16, 1, 16))
    check(run(s, chunk_size, False), exact(s, False), s)


@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision_agrees(reverse, poisoned):
    s = inputs((1, 130, 4, 24, 2, 40), torch.float16)
    check(run(s, 64, reverse), exact(s, reverse), s)


@pytest.mark.parametrize("splits", [2, 3, 4])
def test_programs_may_share_the_heads_of_a_group(splits, poisoned):
    s = inputs((1, 40, 8, 8, 2, 16))
    ours, whole = run(s, 16, False, splits), run(s, 16, False, 1)
    check(ours, exact(s, False), s)
    places = [NAMES.index(name) for name in ("y", "dx", "da")]
    assert all(torch.equal(ours[i], whole[i]) for i in places)


def test_a_small_gradient_of_a_decay_is_exact_beside_large_ones(poisoned):
    # A difference of sums over the chunk would have an error of 1e-7 times the largest gradient.
    s = inputs((1, 256, 2, 16, 1, 16), optional=False)
    s = s._replace(a=torch.full_like(s.a, -3.0), dfinal=torch.zeros_like(s.dfinal))
    s.dy[:, 200:] *= 1e6
    ours, truth = run(s, 256, False), exact(s, False)
    place = NAMES.index("da")
    assert truth[place][:, 200:].abs().max() > 1e5 * truth[place][:, :190].abs().max()
    assert error(ours[place][:, :190], truth[place][:, :190]) < 2e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_a_decay_that_forgets_everything_has_finite_gradients(reverse, poisoned):
    s = inputs((1, 70, 2, 16, 1, 16), optional=False)
    s = s._replace(a=torch.full_like(s.a, -200.0))
    ours = run(s, 64, reverse)
    truth = exact(s, reverse)
    place = NAMES.index("da")
    assert not ours[place].any()  # e⁻²⁰⁰ is 0 in float32
    truth[place] = None
    check(ours, truth, s)


def test_small_decays_are_exact_between_large_ones(poisoned):
    # In float32 the sum of log-decays, -25,600, has an absolute error of 0.001.
    s = inputs((1, 256, 2, 16, 1, 16), optional=False)
    a = torch.full_like(s.a, -1e-3)
    a[:, ::2] = torch.where(torch.arange(128) < 100, -200.0, -1e-3)[None, :, None]
    s = s._replace(a=a)
    check(run(s, 256, False), exact(s, False), s)


def test_the_same_call_gives_the_same_bits():
    s = inputs((1, 70, 4, 8, 2, 8))
    assert all(torch.equal(a, b) for a, b in zip(run(s, 32, False), run(s, 32, False), strict=True))


@pytest.mark.parametrize("layout", ["heads first", "part of a projection", "inside out"])
def test_the_layout_of_memory_changes_no_bits(layout):
    def view(x: Tensor) -> Tensor:
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "part of a projection":
            return torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]]
        return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # features outermost

    s = inputs((2, 40, 4, 8, 2, 16))
    other = s._replace(**{name: view(getattr(s, name)) for name in ("x", "b", "c", "dy")})
    assert all(
        torch.equal(a, b) for a, b in zip(run(s, 32, True), run(other, 32, True), strict=True)
    )


@pytest.mark.parametrize("axis", ["batch", "token", "head"])
def test_offsets_beyond_two_to_the_31_are_right(axis):
    # Four gigabytes of address space, of which a few pages are touched.
    far = {"batch": (2**31, 64, 32, 1), "token": (64, 2**30, 32, 1), "head": (64, 128, 2**31, 1)}
    s = inputs((1 if axis == "token" else 2, 3, 2, 16, 2, 16), torch.float16)
    memory = torch.empty(2**31 + 4096, dtype=torch.float16)
    near = run(s, 16, False)
    for name in ("x", "b", "c", "dy"):
        moved = memory.as_strided(getattr(s, name).shape, far[axis])
        moved.copy_(getattr(s, name))
        ours = run(s._replace(**{name: moved}), 16, False)
        assert all(torch.equal(a, b) for a, b in zip(ours, near, strict=True)), name


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_public_function_runs_these_kernels_and_their_gradients(wide, reverse):
    s = inputs((2, 40, 4, 8, 2, 16))
    g = torch.Generator().manual_seed(1)
    skip = torch.randn((4, 8) if wide else (4,), generator=g)
    named = {"x": s.x, "dt": s.dt, "A": -s.dt[0, 0], "B": s.b, "C": s.c, "D": skip}
    named |= {"initial_states": s.initial, "dt_bias": s.dt[0, 1]}

    def results(impl: str, dtype: torch.dtype) -> list[Tensor]:
        x = {k: t.to(dtype).requires_grad_() for k, t in named.items()}
        y, h = ssd_scan(
            **x,
            chunk_size=16,
            dt_softplus=True,
            return_final_states=True,
            reverse=reverse,
            impl=impl,
        )
        return [y, h, *torch.autograd.grad(y.square().sum() + h.sin().sum(), list(x.values()))]

    truth, eager = (results("reference", dtype) for dtype in (torch.float64, torch.float32))
    ours = results("triton", torch.float32)
    for name, a, b, c in zip(("y", "h", *named), ours, truth, eager, strict=True):
        assert error(a, b) <= 2 * error(c, b) + 1e-6, name


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_the_scan_and_of_its_backward(optional, reverse):
    s = inputs((1, 9, 2, 3, 1, 5), optional=optional)
    args = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in s[:7]]
    opcheck(OPS.ssd_scan, (*args, 4, reverse, "triton"))
    args = [t if t is None else t.detach() for t in args]
    *_, kept = OPS.ssd_scan(*args, 4, reverse, "triton")
    back = (s.dy, s.dfinal, *args[:6], kept, 4, reverse, "triton")
    opcheck(OPS.ssd_scan_backward, back)


def test_the_fake_knows_that_every_chunk_keeps_its_state():
    for length, chunk_size, states in (
        (1, 4, 1),
        (16, 4, 1),
        (33, 4, 3),
        (65, 50, 2),
        (300, 999, 2),
    ):
        s = inputs((1, length, 1, 3, 1, 2))
        meta = [None if t is None else t.to("meta") for t in s[:7]]
        for args in (s[:7], meta):
            *_, kept = OPS.ssd_scan(*args, chunk_size, False, "triton")
            assert kept.shape == (1, states, 1, 3, 2)
