"""What the scan computes: against its recurrence, against transformers, and against its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linfusion.kernels import ssd_scan, ssd_step
from linfusion.kernels.ssd import chunks

IMPLEMENTATIONS = ("reference", "blocked")
ALONG = ("x", "dt", "B", "C")  # the tokens
# batch, tokens, heads, channels, groups, features of the state
SIZES = [(2, 37, 4, 5, 2, 3), (1, 64, 6, 3, 1, 4), (1, 1, 2, 3, 2, 1), (2, 70, 3, 4, 3, 2)]


def inputs(
    size: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Every tensor that the scan takes, with decays from hardly any to nearly all of the state."""
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
        "D": draw(heads),
        "dt_bias": draw(heads),
        "initial_states": draw(batch, heads, channels, features),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def results(x: dict[str, Tensor], **choices: object) -> list[Tensor]:
    """Output, last state and all gradients of a scan."""
    y, h = ssd_scan(**x, dt_softplus=True, return_final_states=True, **choices)
    loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + h.square().sum()
    return [y, h, *torch.autograd.grad(loss, list(x.values()))]


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).abs().max() / truth.abs().max()).item()


def by_hand(x: dict[str, Tensor], dt: Tensor) -> Tensor:
    """The scan without bias as the matrix of the paper: every pair of tokens."""
    batch, tokens, heads, _ = x["x"].shape
    y = torch.zeros_like(x["x"])
    for i, h in ((i, h) for i in range(batch) for h in range(heads)):
        a = dt[i, :, h] * x["A"][h]
        g = h // (heads // x["B"].shape[2])
        for t in range(tokens):
            for s in range(t + 1):
                decay = a[s + 1 : t + 1].sum().exp()
                weight = (x["C"][i, t, g] @ x["B"][i, s, g]) * decay * dt[i, s, h]
                y[i, t, h] += weight * x["x"][i, s, h]
    return y


@pytest.fixture(params=["at once", "few heads at a time"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "at once":
        monkeypatch.setattr(chunks, "BLOCK", 200)


def test_the_recurrence_is_the_matrix_of_the_paper():
    x = {k: v.detach() for k, v in inputs((2, 9, 4, 3, 2, 5)).items()}
    dt = x["dt"].exp()
    names = ("x", "A", "B", "C")
    y = ssd_scan(dt=dt, **{k: x[k] for k in names}, chunk_size=4, impl="reference")
    assert error(y, by_hand(x, dt)) < 1e-13


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 64, 100])
@pytest.mark.parametrize("size", SIZES)
def test_chunks_agree_with_the_recurrence(size, chunk_size, block):
    x = inputs(size)
    for reverse in (False, True):
        choices = {"chunk_size": chunk_size, "reverse": reverse}
        truth = results(x, impl="reference", **choices)
        ours = results(x, impl="blocked", **choices)
        for name, a, b in zip(("y", "h", *x), ours, truth, strict=True):
            assert error(a, b) < 1e-10, name


@pytest.mark.parametrize("reverse", [False, True])
def test_runs_of_many_chunks_carry_their_state(reverse):
    x = inputs((1, 1200, 2, 3, 1, 2))  # three runs, and a ragged chunk
    choices = {"chunk_size": 64, "reverse": reverse}
    truth = results(x, impl="reference", **choices)
    for name, a, b in zip(("y", "h", *x), results(x, **choices), truth, strict=True):
        assert error(a, b) < 1e-10, name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_reverse_is_the_scan_of_the_flipped_tokens(impl):
    x = inputs((2, 37, 4, 5, 2, 3))
    x = {k: v.detach() for k, v in x.items()}
    flipped = {k: v.flip(1) if k in ALONG else v for k, v in x.items()}
    choices = {"chunk_size": 8, "return_final_states": True, "impl": impl}
    y, h = ssd_scan(**x, reverse=True, **choices)
    y_flipped, h_flipped = ssd_scan(**flipped, **choices)
    assert error(y, y_flipped.flip(1)) < 1e-13
    assert error(h, h_flipped) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_carried_state_continues_the_scan(impl, reverse):
    x = {k: v.detach() for k, v in inputs((2, 50, 4, 5, 2, 3)).items()}
    choices = {"chunk_size": 8, "return_final_states": True, "reverse": reverse, "impl": impl}
    y, h = ssd_scan(**x, **choices)
    parts: dict[int, Tensor] = {}
    state = x["initial_states"]
    cuts = [(0, 13), (13, 14), (14, 50)]
    for first, last in reversed(cuts) if reverse else cuts:
        part = {k: v[:, first:last] if k in ALONG else v for k, v in x.items()}
        parts[first], state = ssd_scan(**part | {"initial_states": state}, **choices)
    assert error(torch.cat([parts[first] for first, _ in cuts], 1), y) < 1e-13
    assert error(state, h) < 1e-13


def test_steps_of_one_token_are_the_scan():
    x = {k: v.detach() for k, v in inputs((2, 9, 4, 5, 2, 3)).items()}
    choices = {"dt_softplus": True, "dt_limit": (0.3, 1.5)}
    y, h = ssd_scan(**x, chunk_size=4, return_final_states=True, **choices)
    state, rows = x["initial_states"], []
    for t in range(9):
        one = [x[k] if k == "A" else x[k][:, t] for k in ("x", "dt", "A", "B", "C")]
        rest = {"D": x["D"], "dt_bias": x["dt_bias"]}
        before = state.clone()
        row, after = ssd_step(*one, state, **rest, **choices)
        assert torch.equal(state, before)
        state = after
        rows.append(row)
    assert error(torch.stack(rows, 1), y) < 1e-13
    assert error(state, h) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    x = inputs((1, 5, 2, 2, 1, 2))

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(x, tensors, strict=True))
        return ssd_scan(
            **named,
            chunk_size=2,
            dt_softplus=True,
            return_final_states=True,
            impl=impl,
        )

    assert gradcheck(f, tuple(x.values()))


def test_the_definition_has_second_derivatives():
    x = inputs((1, 3, 1, 2, 1, 2))
    names = ("x", "dt", "A", "B", "C")

    def f(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return ssd_scan(**named, chunk_size=2, dt_softplus=True, impl="reference")

    assert gradgradcheck(f, tuple(x[name] for name in names))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [-200.0, -1e4])
def test_a_state_that_is_forgotten_at_once_gives_no_nan(impl, decay):
    x = inputs((1, 40, 2, 3, 1, 4), torch.float32)
    x["A"] = torch.full((2,), decay, requires_grad=True)
    x["dt_bias"] = torch.ones(2, requires_grad=True)
    found = results(x, chunk_size=16, impl=impl)
    assert all(t.isfinite().all() for t in found)
    # Nothing is left of any other token: y_t = (C·B dt + D) x_t.
    dt = torch.nn.functional.softplus(x["dt"] + x["dt_bias"])
    alone = (x["B"] * x["C"]).sum(-1) * dt + x["D"]
    y = alone[..., None] * x["x"]
    assert error(found[0][:, 1:], y[:, 1:]) < 1e-2


def test_small_decays_are_exact_after_a_large_one():
    # In float32 the sum of log-decays, -40,000, has an absolute error of 0.004.
    x = {k: v.detach() for k, v in inputs((1, 256, 1, 4, 1, 4), torch.float32).items()}
    x["A"] = torch.full((1,), -1.0)
    x["dt"] = torch.full((1, 256, 1), 1e-3)
    x["dt"][:, :20] = 2000.0
    named = {k: x[k] for k in ("x", "dt", "A", "B", "C")}
    truth = ssd_scan(**{k: v.double() for k, v in named.items()}, chunk_size=256, impl="reference")
    y = ssd_scan(**named, chunk_size=256, impl="blocked")
    assert error(y[:, 30:], truth[:, 30:]) < 1e-5


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("chunk_size, tokens", [(8, 37), (64, 20)])
def test_it_is_the_scan_of_transformers(groups, chunk_size, tokens):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    x = inputs((2, tokens, 4, 8, groups, 16), torch.float32)
    options = {"chunk_size": chunk_size, "dt_softplus": True, "dt_limit": (0.05, 1.0)}
    y, h = ssd_scan(**x, **options, return_final_states=True)
    theirs, state = mamba2_chunk_scan(x.pop("x"), **x, **options, return_final_states=True)
    assert error(y, theirs) < 1e-5
    assert error(h, state) < 1e-5


def test_gradients_are_those_of_transformers():
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    x = inputs((1, 37, 4, 8, 2, 16), torch.float32)
    del x["initial_states"]  # theirs is not differentiable by a state of another shape
    options = {"chunk_size": 8, "dt_softplus": True}
    leaves = list(x.values())
    ours = torch.autograd.grad(ssd_scan(**x, **options).square().sum(), leaves)
    theirs = mamba2_chunk_scan(x.pop("x"), **x, **options).square().sum()
    for a, b in zip(ours, torch.autograd.grad(theirs, leaves), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_rounds_the_output_alone(dtype, impl):
    x = {k: v.detach().to(dtype) for k, v in inputs((2, 37, 4, 5, 2, 3)).items()}
    y, h = ssd_scan(**x, chunk_size=8, return_final_states=True, impl=impl)
    exact = {k: v.double() for k, v in x.items()}
    truth, _ = ssd_scan(**exact, chunk_size=8, return_final_states=True, impl="reference")
    assert y.dtype == dtype and h.dtype == torch.float32
    assert (y.double() - truth).abs().le(1e-5 + truth.abs() * torch.finfo(dtype).eps / 1.9).all()


def test_autocast_leaves_states_alone():
    x = inputs((1, 20, 4, 5, 2, 3), torch.float32)
    truth = results(x, chunk_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h = ssd_scan(**x, chunk_size=8, dt_softplus=True, return_final_states=True)
    assert torch.equal(y, truth[0]) and torch.equal(h, truth[1])


def test_every_layout_of_memory_gives_the_same_output():
    x = {k: v.detach() for k, v in inputs((2, 37, 4, 5, 2, 3), torch.float32).items()}
    other = {
        k: v.transpose(0, -1).contiguous().transpose(0, -1) if v.dim() > 1 else v
        for k, v in x.items()
    }
    assert error(ssd_scan(**other, chunk_size=8), ssd_scan(**x, chunk_size=8)) < 1e-6


def test_a_skip_of_each_channel_is_that_of_each_head():
    x = inputs((1, 20, 4, 5, 2, 3))
    wide = {**x, "D": x["D"].detach()[:, None].expand(4, 5).clone().requires_grad_()}
    narrow, ours = results(x, chunk_size=8), results(wide, chunk_size=8)
    assert error(ours[0], narrow[0]) < 1e-14
    place = 2 + list(x).index("D")
    assert error(ours[place].sum(1), narrow[place]) < 1e-13


@pytest.mark.parametrize("impl, taken, other", [("blocked", 64, 32), ("triton", 256, 128)])
def test_a_chunk_is_as_long_as_serves_where_nobody_says(impl, taken, other):
    x = {k: v.detach() for k, v in inputs((1, 300, 2, 4, 1, 4), torch.float32).items()}
    y = ssd_scan(**x, impl=impl)
    assert torch.equal(y, ssd_scan(**x, chunk_size=taken, impl=impl))
    assert not torch.equal(y, ssd_scan(**x, chunk_size=other, impl=impl))  # rounded otherwise
    assert error(y, ssd_scan(**x, impl="reference")) < 1e-5


def test_steps_stay_within_their_limits():
    x = {k: v.detach() for k, v in inputs((1, 20, 4, 5, 2, 3)).items()}
    limit = (0.1, 0.6)
    y = ssd_scan(**x, chunk_size=8, dt_limit=limit)
    x["dt"] = (x["dt"] + x.pop("dt_bias")).clamp(*limit)
    assert torch.equal(y, ssd_scan(**x, chunk_size=8))


def test_blocked_keeps_one_state_for_many_tokens():
    x = inputs((1, 2048, 2, 16, 1, 16), torch.float32)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ssd_scan(*(x[k] for k in ("x", "dt", "A", "B", "C")), chunk_size=16)
    assert 4 * 2 * 16 * 16 in kept  # a state for 512 tokens
    assert max(kept) == x["x"].numel()
