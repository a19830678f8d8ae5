"""Softmax near and linear attention far, in one normalisation: against loops and its own parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from linfusion.kernels import (
    TileOrder,
    chunked_attention,
    hybrid_attention,
    linear_state,
    merge,
    window_attention,
)
from linfusion.kernels.window_attention import blocks
from tests.kernels.test_window_attention import error, inputs, pair, seen, tokens

SIZES = [((7, 9), 2.5, "disc"), ((9, 10), 4, "square"), ((3, 5, 4), 2, "disc"), ((1, 1), 1, "disc")]
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-12}
HEADS, F = 2, 5


@pytest.fixture(params=["reference", "dense", "tiles"])
def impl(request, monkeypatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(blocks, "SMALL", 0)
    return "reference" if request.param == "reference" else "blocked"


def features(count: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [tokens(2, n, HEADS, F, seed=10 + i, dtype=dtype).abs() for i in range(count)]


def weights(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([-2.0, 0.5], dtype=dtype)


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: list[Tensor],
    g: Tensor,
    near: Tensor,
    far: Tensor,
    context: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Dense, nothing subtracted; `near` and `far` [N, N] say what is which."""
    scale = q.shape[-1] ** -0.5
    p = torch.einsum("bnhd,bmhd->bnhm", q, k).mul(scale).exp() * near[:, None]
    below, above = (
        torch.einsum("bnhf,bmhf->bnhm", *phi[i : i + 2]) * far[:, None] * g.exp()[:, None]
        for i in (0, len(phi) - 2)
    )
    num = torch.einsum("bnhm,bmhd->bnhd", p + above, v)
    den = (p + below).sum(-1)
    if context is not None:
        e = torch.einsum("bnhd,bmhd->bnhm", q, context[0]).mul(scale).exp()
        num, den = num + torch.einsum("bnhm,bmhd->bnhd", e, context[1]), den + e.sum(-1)
    return num / den[..., None], den.log()


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "rotated, with text"])
@pytest.mark.parametrize("grid, radius, shape", SIZES)
def test_near_and_far_are_one_normalisation(impl, grid, radius, shape, extras, exclude):
    q, k, v = inputs(grid)
    phi = features(4 if extras else 2, math.prod(grid))
    phi[2:] = [x * y.sin() for x, y in zip(phi[2:], phi[:2], strict=False)]  # of either sign
    context = pair(3, seed=7) if extras else None
    near = seen(grid, radius, shape)
    far = ~near if exclude else torch.ones_like(near)
    o, lse = hybrid_attention(
        q, k, v, *phi[:2], grid=grid, radius=radius, log_weight=weights(), shape=shape,
        exclude=exclude, rotated=(phi[2], phi[3]) if extras else None, context=context,
        return_lse=True, impl=impl,
    )  # fmt: skip
    exact, exact_lse = truth(q, k, v, phi, weights(), near, far, context)
    assert error(o, exact) < 1e-12
    assert (lse - exact_lse).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclude, tiled", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("small", [0, 512])
def test_its_gradients_are_those_of_the_definition(exclude, tiled, small, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", small)
    grid = (7, 9)
    x = [*inputs(grid, dtype), *features(2, 63, dtype), weights(dtype)]

    def grads(impl: str, *x: Tensor) -> tuple[Tensor, ...]:
        *x, g = (y.detach().requires_grad_() for y in x)
        o, lse = hybrid_attention(
            *x, log_weight=g, grid=grid, radius=3, exclude=exclude, return_lse=True,
            order=TileOrder(grid) if tiled else None, impl=impl,
        )  # fmt: skip
        return torch.autograd.grad(o.sin().sum() + lse.cos().sum(), (*x, g))

    for ours, exact in zip(
        grads("blocked", *x), grads("reference", *(y.double() for y in x)), strict=True
    ):
        assert ours.dtype == dtype
        assert error(ours, exact) < LIMITS[dtype]


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_the_balance_does_not_depend_on_what_is_subtracted(impl, shift):
    """Scores and the far weight moved by one number change nothing, but the log-sum-exp by it."""
    grid = (7, 9)
    q, k, v = inputs(grid)
    q, k = (torch.cat([x, torch.ones_like(x[..., :1])], -1) for x in (q, k))
    v, phi = torch.cat([v, v[..., :1]], -1), features(2, 63)
    choices = {"grid": grid, "radius": 3, "scale": 0.3, "return_lse": True, "impl": impl}
    o, lse = hybrid_attention(q, k, v, *phi, log_weight=weights(), **choices)
    q = torch.cat([q[..., :-1], torch.full_like(q[..., :1], 1 + shift / 0.3)], -1)
    moved, moved_lse = hybrid_attention(q, k, v, *phi, log_weight=weights() + shift, **choices)
    assert error(moved, o) < 1e-10
    assert (moved_lse - lse - shift).abs().max() < 1e-10


def test_a_window_that_sees_everything_has_no_far_part(impl):
    q, k, v = inputs((5, 6), torch.float32)
    phi = features(2, 30, torch.float32)
    choices = {"grid": (5, 6), "radius": 9, "impl": impl}
    o = hybrid_attention(q, k, v, *phi, log_weight=weights() + 9, **choices)
    assert torch.equal(o, window_attention(q, k, v, **choices))


def test_features_of_zero_leave_the_window_alone(impl):
    q, k, v = inputs((7, 9), torch.float32)
    phi = [torch.zeros_like(x) for x in features(2, 63, torch.float32)]
    choices = {"grid": (7, 9), "radius": 3, "return_lse": True, "impl": impl}
    found = hybrid_attention(q, k, v, *phi, log_weight=weights() + 9, **choices)
    for ours, alone in zip(found, window_attention(q, k, v, **choices), strict=True):
        assert ours.isfinite().all()
        assert error(ours, alone.double()) < 1e-6


def test_half_precision_is_as_near_as_its_inputs(impl):
    q, k, v = inputs((7, 9))
    phi = features(2, 63)
    choices = {"grid": (7, 9), "radius": 3, "log_weight": weights()}
    exact = hybrid_attention(q, k, v, *phi, **choices, impl="reference")
    narrow = [x.bfloat16() for x in (q, k, v, *phi)]
    o = hybrid_attention(*narrow, **choices, impl=impl)
    assert o.dtype == torch.bfloat16
    assert error(o, exact) < 1e-2


def test_merging_is_one_softmax_over_both():
    q, k, v = inputs((4, 5))
    (k2, v2), choices = pair(6, seed=4), {"grid": (4, 5), "radius": 9, "return_lse": True}
    near = window_attention(q, k, v, **choices)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k2) * 8**-0.5
    far = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), v2), scores.logsumexp(-1)
    for ours, exact in zip(
        merge(*near, *far), window_attention(q, k, v, context=(k2, v2), **choices), strict=True
    ):
        assert error(ours, exact) < 1e-13
    nothing = torch.zeros_like(far[0]), torch.full_like(far[1], -math.inf)
    assert all(map(torch.equal, merge(*near, *nothing), near))
    assert merge(*nothing, *nothing)[1].isneginf().all()
    with pytest.raises(ValueError, match=r"lse2: expected shape \(2, 20, 2\) beside o1"):
        merge(*near, far[0], far[1][:, :3])


CHUNKS = [(2, 0, False), (2, 1, True), (3, 1, False), (1, 2, False), (2, 9, False)]


@pytest.mark.parametrize("frames, overlap, rotated", CHUNKS)
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_chunks_see_themselves_and_the_past(impl, frames, overlap, rotated):
    grid, row = (7, 3, 2), 6
    x = [*inputs(grid), *features(4 if rotated else 2, 42)]
    context = pair(3, seed=7)
    frame = torch.arange(7).repeat_interleave(row)
    first = (frame // frames * frames - overlap)[:, None]  # that softmax sees
    far = frame < first
    near = ~far & (frame < first + overlap + frames)
    exact, _ = truth(*x[:3], x[3:], weights(), near, far, context)
    choices = {
        "frames": frames, "overlap": overlap, "log_weight": weights(), "context": context,
        "impl": impl,
    }  # fmt: skip

    def run(part: slice, state):
        y = [z[:, part.start * row : part.stop * row] for z in x]
        return chunked_attention(
            *y[:5], grid=(part.stop - part.start, 3, 2), state=state,
            rotated=(y[5], y[6]) if rotated else None, **choices,
        )  # fmt: skip

    assert error(run(slice(0, 7), None)[0], exact) < 1e-13
    state, found = None, []
    for start in range(0, 7, 2 * frames):
        o, state = run(slice(start, min(7, start + 2 * frames)), state)
        found.append(o)
        assert state.k.shape[1] <= overlap * row
    assert error(torch.cat(found, 1), exact) < 1e-13


def test_gradients_flow_through_the_past():
    grid = (5, 2, 3)

    def grads(impl: str) -> tuple[Tensor, ...]:
        *x, g = (y.requires_grad_() for y in (*inputs(grid), *features(2, 30), weights()))
        o, _ = chunked_attention(*x, grid=grid, frames=2, overlap=1, log_weight=g, impl=impl)
        return torch.autograd.grad(o[:, -6:].sin().sum(), (*x, g))  # of the last frame alone

    for ours, exact in zip(grads("blocked"), grads("reference"), strict=True):
        assert error(ours, exact) < 1e-12
        assert exact.norm() > 0


@pytest.mark.parametrize("small, exclude", [(0, True), (512, False)])
def test_opcheck(small, exclude, monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", small)
    ops = torch.ops.linfusion
    q, k, v = (x.requires_grad_() for x in inputs((3, 7), torch.float32))
    phi_q, phi_k = (x.requires_grad_() for x in features(2, 21, torch.float32))
    choices = [3, 7], 2.5, "disc", 0.3, False, "blocked"
    opcheck(ops.hybrid_window_sum, (phi_q, phi_k, v, *choices))
    num, den = (x.detach() for x in ops.hybrid_window_sum(phi_q, phi_k, v, *choices))
    saved = (x.detach() for x in (phi_q, phi_k, v))
    opcheck(ops.hybrid_window_sum_backward, (num, den, *saved, *choices))
    o, lse = window_attention(q, k, v, grid=(3, 7), radius=2.5, return_lse=True, impl="blocked")
    state = linear_state(phi_k, v, feature_map="identity", impl="blocked")
    left_out = (num, den) if exclude else (num[:, :0], den[:, :0])
    x = [o, lse, phi_q, phi_q, state.kv, state.k_mean, weights(torch.float32).expand(2, 2)]
    x = [y.detach().requires_grad_() for y in (*x, *left_out)]
    opcheck(ops.hybrid_join, (*x, "blocked"))
    x = [y.detach() for y in (*x, *ops.hybrid_join(*x, "blocked"))]
    opcheck(ops.hybrid_join_backward, (x[0], x[1], *x))


def test_it_compiles_whole_and_a_second_derivative_is_refused():
    torch._dynamo.reset()
    x = [y.requires_grad_() for y in (*inputs((3, 7)), *features(2, 21), weights())]

    def loss(*x: Tensor) -> Tensor:
        return hybrid_attention(*x[:5], log_weight=x[5], grid=(3, 7), radius=2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*x), x)
    exact = torch.autograd.grad(loss(*x), x, create_graph=True)
    assert all(torch.allclose(a, b) for a, b in zip(ours, exact, strict=True))
    with pytest.raises(RuntimeError, match="impl='reference' is differentiable any number"):
        exact[0].sum().backward()


X = torch.ones(2, 6, 3, 8)
PHI = X[..., :4]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"phi_q": None}, r"phi_q: expected a tensor \[B, N, H, F\], got NoneType"),
        ({"phi_k": PHI[:, :5]}, r"phi_k: expected features \(2, 6, 3\) × F .* \(2, 5, 3, 4\)"),
        ({"phi_k": X}, r"phi_k: expected the 4 features of phi_q, got 8"),
        ({"phi_q": PHI.double()}, r"phi_q: expected the dtype of q, torch.float32, got"),
        ({"phi_q": PHI.to("meta")}, r"phi_q: expected the device of q, cpu, got meta"),
        ({"rotated": PHI}, r"rotated: expected None or a pair of features .* got Tensor"),
        ({"rotated": (PHI, None)}, r"rotated phi_k: expected a tensor .* got NoneType"),
        ({"log_weight": 0.5}, r"log_weight: expected a floating tensor \[H\], got float"),
        ({"log_weight": torch.zeros(2)}, r"log_weight: expected one .* 3 heads, got shape \(2,\)"),
        ({"grid": (2, 4)}, r"grid: expected one of the 6 tokens of q, got"),
        ({"radius": 0}, r"radius: expected a number of tokens above 0, got 0"),
        ({"shape": "circle"}, r"shape: expected one of"),
        ({"context": X}, r"context: expected a pair"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = {
        "q": X, "k": X, "v": X, "phi_q": PHI, "phi_k": PHI, "grid": (2, 3), "radius": 2,
        "log_weight": torch.zeros(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**(right | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": (2, 3)}, r"grid: expected \(t, h, w\), got \(2, 3\)"),
        ({"frames": 0}, r"frames: expected a whole number of at least 1, got 0"),
        ({"overlap": -1}, r"overlap: expected a whole number of at least 0, got -1"),
        ({"overlap": 1.5}, r"overlap: expected a whole number of at least 0, got 1.5"),
        ({"state": (1, 2)}, r"state: expected the ChunkState of the call before or None, got tup"),
    ],
)
def test_wrong_chunks_are_named(change, message):
    right = {"grid": (1, 2, 3), "frames": 1, "log_weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        chunked_attention(X, X, X, PHI, PHI, **(right | change))


def test_a_state_of_another_size_is_refused():
    choices = {"frames": 1, "overlap": 1, "log_weight": torch.zeros(3)}
    _, state = chunked_attention(X, X, X, PHI, PHI, grid=(1, 2, 3), **choices)
    with pytest.raises(ValueError, match=r"state.k: expected frames of 2 tokens that fit"):
        small = [x[:, :2, :, :5] for x in (X, X, X, PHI, PHI)]
        chunked_attention(*small, grid=(1, 1, 2), state=state, **choices)
