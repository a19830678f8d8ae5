"""What both directions of the scan compute at once: against two scans, and against its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linfusion.kernels import ssd_bidirectional, ssd_scan
from linfusion.kernels.ssd import chunks

IMPLEMENTATIONS = ("reference", "blocked")
# batch, tokens, heads, channels, groups, features of the state
SIZES = [(2, 37, 4, 5, 2, 3), (1, 64, 6, 3, 1, 4), (1, 1, 2, 3, 2, 1), (2, 70, 3, 4, 3, 2)]


def inputs(
    size: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Every tensor it takes, with decays from hardly any to nearly all of the state."""
    batch, tokens, heads, channels, groups, features = size
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {
        "x": draw(batch, tokens, heads, channels),
        "dt": draw(batch, tokens, heads),
        "A": -draw(heads).exp(),
        "B": draw(batch, tokens, groups, features),
        "C": draw(batch, tokens, groups, features),
        "dt_b": draw(batch, tokens, heads),
        "A_b": -draw(heads).exp(),
        "D": draw(heads),
        "z": draw(batch, tokens, heads, channels),
        "dt_bias": draw(heads),
        "dt_bias_b": draw(heads),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def two_scans(x: dict[str, Tensor], **choices: object) -> Tensor:
    """The sum of two recurrences, gated."""
    choices = {"chunk_size": 8, "impl": "reference", "dt_softplus": True, **choices}
    names = ("x", "dt", "A", "B", "C", "dt_bias")
    forward = {name: x[name] for name in names if name in x}
    backward = {name: x.get(name + "_b", x[name]) for name in names if name in x}
    y = ssd_scan(**forward, D=x.get("D"), **choices)
    y = y + ssd_scan(**backward, reverse=True, **choices)
    return y * torch.nn.functional.silu(x["z"]) if "z" in x else y


def with_gradients(y: Tensor, x: dict[str, Tensor]) -> list[Tensor]:
    loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum()
    return [y, *torch.autograd.grad(loss, list(x.values()))]


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).abs().max() / truth.abs().max()).item()


def agree(x: dict[str, Tensor], impl: str = "blocked", **choices: object) -> None:
    chunk_size = choices.pop("chunk_size", 8)
    ours = ssd_bidirectional(**x, chunk_size=chunk_size, dt_softplus=True, impl=impl, **choices)
    truth = with_gradients(two_scans(x, **choices), x)
    for name, a, b in zip(("y", *x), with_gradients(ours, x), truth, strict=True):
        # A single token has no decay: its gradient is exactly 0.
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name


@pytest.fixture(params=["at once", "few heads at a time"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "at once":
        monkeypatch.setattr(chunks, "BLOCK", 200)


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 64, 100])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_sum_of_two_scans(size, chunk_size, block):
    agree(inputs(size), chunk_size=chunk_size)


def test_runs_of_many_chunks_carry_their_states():
    agree(inputs((1, 1200, 2, 3, 1, 2)), chunk_size=64)  # three runs, and a ragged chunk


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_steps_of_both_directions_stay_within_their_limits(impl):
    x = inputs((1, 37, 4, 5, 2, 3))
    agree(x, impl, dt_limit=(0.3, 1.1))
    assert error(two_scans(x, dt_limit=(0.3, 1.1)), two_scans(x)) > 0.05


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_the_backward_direction_lacks_is_that_of_the_forward_one(impl):
    x = inputs((2, 37, 4, 5, 2, 3))
    for name in ("dt_b", "A_b", "dt_bias_b"):
        del x[name]
        agree(x, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_anything_optional_it_is_still_the_sum(impl):
    x = inputs((2, 37, 4, 5, 2, 3))
    agree({name: x[name] for name in ("x", "dt", "A", "B", "C")}, impl)


def test_a_skip_of_each_channel_is_that_of_each_head():
    x = inputs((1, 20, 4, 5, 2, 3))
    wide = {**x, "D": x["D"].detach()[:, None].expand(4, 5).clone().requires_grad_()}
    narrow, ours = (
        with_gradients(ssd_bidirectional(**t, chunk_size=8, dt_softplus=True), t) for t in (x, wide)
    )
    assert error(ours[0], narrow[0]) < 1e-14
    place = 1 + list(x).index("D")
    assert error(ours[place].sum(1), narrow[place]) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    x = inputs((1, 5, 2, 2, 1, 2))

    def f(*tensors: Tensor) -> Tensor:
        named = dict(zip(x, tensors, strict=True))
        return ssd_bidirectional(**named, chunk_size=2, dt_softplus=True, impl=impl)

    assert gradcheck(f, tuple(x.values()))


def test_the_definition_has_second_derivatives():
    x = inputs((1, 3, 1, 2, 1, 2))
    names = ("x", "dt", "A", "B", "C", "dt_b")

    def f(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return ssd_bidirectional(**named, chunk_size=2, dt_softplus=True, impl="reference")

    assert gradgradcheck(f, tuple(x[name] for name in names))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [-200.0, -1e4])
def test_states_that_are_forgotten_at_once_give_no_nan(impl, decay):
    x = inputs((1, 40, 2, 3, 1, 4), torch.float32)
    x["A"], x["A_b"] = (torch.full((2,), decay, requires_grad=True) for _ in range(2))
    x["dt_bias"], x["dt_bias_b"] = (torch.ones(2, requires_grad=True) for _ in range(2))
    y = ssd_bidirectional(**x, chunk_size=16, dt_softplus=True, impl=impl)
    assert all(t.isfinite().all() for t in with_gradients(y, x))
    # Nothing is left of any other token: y_t = (C·B (dt + dt_b) + D) x_t silu(z).
    steps = (x["dt"] + x["dt_bias"], x["dt_b"] + x["dt_bias_b"])
    alone = (x["B"] * x["C"]).sum(-1) * sum(map(torch.nn.functional.softplus, steps)) + x["D"]
    assert error(y, alone[..., None] * x["x"] * torch.nn.functional.silu(x["z"])) < 1e-2


def test_small_decays_are_exact_beside_large_ones():
    # In float32 the sums of log-decays, -40,000, have an absolute error of 0.004.
    x = {k: v.detach() for k, v in inputs((1, 256, 1, 4, 1, 4), torch.float32).items()}
    x = {name: x[name] for name in ("x", "dt", "A", "B", "C")}
    x["A"] = torch.full((1,), -1.0)
    x["dt"] = torch.full((1, 256, 1), 1e-3)
    x["dt"][:, :20] = x["dt"][:, -20:] = 2000.0
    truth = two_scans({k: v.double() for k, v in x.items()}, dt_softplus=False)
    y = ssd_bidirectional(**x, chunk_size=256)
    assert error(y[:, 30:-30], truth[:, 30:-30]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_rounds_the_output_alone(dtype, impl):
    x = {k: v.detach().to(dtype) for k, v in inputs((2, 37, 4, 5, 2, 3)).items()}
    del x["z"]  # a product of two rounded numbers
    y = ssd_bidirectional(**x, chunk_size=8, dt_softplus=True, impl=impl)
    truth = two_scans({k: v.double() for k, v in x.items()})
    assert y.dtype == dtype
    assert (y.double() - truth).abs().le(1e-5 + truth.abs() * torch.finfo(dtype).eps / 1.9).all()


def test_half_precision_rounds_gradients_alone():
    x = {k: v.detach().bfloat16() for k, v in inputs((2, 37, 4, 5, 2, 3)).items()}
    del x["z"]
    x = {k: v.requires_grad_() for k, v in x.items()}
    y = ssd_bidirectional(**x, chunk_size=8, dt_softplus=True)
    dx, db = torch.autograd.grad(y.sum(), [x["x"], x["B"]])
    exact = {k: v.detach().double().requires_grad_() for k, v in x.items()}
    truth = torch.autograd.grad(two_scans(exact).sum(), [exact["x"], exact["B"]])
    for ours, true in zip((dx, db), truth, strict=True):
        assert (ours.double() - true).abs().le(1e-5 + true.abs() * 2**-8).all()


def test_autocast_leaves_sums_alone():
    x = inputs((1, 20, 4, 5, 2, 3), torch.float32)
    truth = ssd_bidirectional(**x, chunk_size=8, dt_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd_bidirectional(**x, chunk_size=8, dt_softplus=True), truth)


def test_every_layout_of_memory_gives_the_same_output():
    x = {k: v.detach() for k, v in inputs((2, 37, 4, 5, 2, 3), torch.float32).items()}
    other = {
        k: v.transpose(0, -1).contiguous().transpose(0, -1) if v.dim() > 1 else v
        for k, v in x.items()
    }
    ours, theirs = (ssd_bidirectional(**t, chunk_size=8, dt_softplus=True) for t in (x, other))
    assert error(theirs, ours) < 1e-6


def test_blocked_keeps_two_states_for_many_tokens():
    x = inputs((1, 2048, 2, 16, 1, 16), torch.float32)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ssd_bidirectional(*(x[k] for k in ("x", "dt", "A", "B", "C")), chunk_size=16)
    assert 4 * 2 * 2 * 16 * 16 in kept  # two states for 512 tokens
    assert max(kept) == x["x"].numel()
