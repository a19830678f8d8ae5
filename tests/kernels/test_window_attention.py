"""What window attention computes: against a loop over pairs, SDPA, and its own parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.kernels import window_attention

IMPLEMENTATIONS = ["reference"]

# grid, radius: ragged, thin, one token, larger than the grid, 3-D
SIZES = [
    ((1, 1), 1),
    ((5, 7), 3),
    ((13, 9), 4.5),
    ((1, 40), 8),
    ((40, 1), 8),
    ((23, 21), 8),
    ((9, 11), 30),
    ((3, 5, 4), 2.3),
    ((5, 9, 10), 4),
]


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(
    grid: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
) -> list[Tensor]:
    shape = (batch, math.prod(grid), heads, dim)
    return [tokens(*shape, seed=i, dtype=dtype) for i in range(3)]


def pair(
    count: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
) -> tuple[Tensor, Tensor]:
    k, v = tokens(2, batch, count, heads, dim, seed=seed, dtype=dtype)
    return k, v


def seen(grid: tuple[int, ...], radius: float, shape: str) -> Tensor:
    """The mask, one pair of tokens at a time."""
    places = list(itertools.product(*map(range, grid)))
    rows = []
    for a in places:
        apart = [[abs(x - y) for x, y in zip(a, b, strict=True)] for b in places]
        if shape == "disc":
            rows.append([sum(x * x for x in d) < radius**2 for d in apart])
        else:
            rows.append([max(d) < radius for d in apart])
    return torch.tensor(rows)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *everywhere: tuple[Tensor, Tensor]
) -> Tensor:
    """SDPA with a mask over the extra tokens and the grid."""
    k = torch.cat([*(pair[0] for pair in everywhere), k], 1)
    v = torch.cat([*(pair[1] for pair in everywhere), v], 1)
    mask = F.pad(mask, (k.shape[1] - mask.shape[1], 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def error(x: Tensor, truth: Tensor) -> float:
    """Relative root mean square."""
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["disc", "square"])
@pytest.mark.parametrize("grid, radius", SIZES)
def test_it_is_softmax_over_the_window(impl, shape, grid, radius):
    q, k, v = inputs(grid)
    o = window_attention(q, k, v, grid=grid, radius=radius, shape=shape, impl=impl)
    assert error(o, dense(q, k, v, seen(grid, radius, shape))) < 1e-13


@pytest.mark.parametrize("radius, count", [(8, 193), (16, 793), (32, 3205)])
def test_a_disc_has_as_many_tokens_as_the_authors_count(radius, count):
    side = 2 * radius + 1
    middle = side * side // 2
    q, k, _ = inputs((side, side), torch.float32, batch=1, heads=1)
    v = torch.zeros_like(k)
    # Equal scores: every token of the window has the same weight.
    _, lse = window_attention(
        torch.zeros_like(q)[:, :, :], k, v, grid=(side, side), radius=radius, return_lse=True
    )
    assert lse[0, middle, 0].exp().item() == pytest.approx(count, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_query_sees_the_context_and_the_pooled_tokens(impl):
    grid, radius = (9, 7), 3
    q, k, v = inputs(grid)
    context, pooled = pair(5, seed=7), pair(4, seed=8)
    mask = seen(grid, radius, "disc")
    for extra in ({"context": context}, {"pooled": pooled}, {"context": context, "pooled": pooled}):
        o = window_attention(q, k, v, grid=grid, radius=radius, **extra, impl=impl)
        assert error(o, dense(q, k, v, mask, *extra.values())) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("radius", [16, 1e9, float("inf")])
def test_a_window_larger_than_the_grid_is_full_attention(impl, radius):
    grid = (11, 11)  # its diagonal is 14.14
    q, k, v = inputs(grid, torch.float32)
    truth = dense(q, k, v, torch.ones(121, 121, dtype=torch.bool))
    o = window_attention(q, k, v, grid=grid, radius=radius, impl=impl)
    assert torch.allclose(o, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_parts_merge_by_their_log_sum_exp(impl):
    grid = (9, 7)
    q, k, v = inputs(grid)
    text, image = pair(5, seed=7), {"grid": grid, "radius": 3, "return_lse": True, "impl": impl}
    whole, lse = window_attention(q, k, v, **image, context=text)
    part, lse_part = window_attention(q, k, v, **image)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, text[0]) * 8**-0.5
    weight = (lse_part - lse).exp()[..., None]
    rest = torch.einsum("bnhm,bmhd->bnhd", (scores - lse[..., None]).exp(), text[1])
    assert error(weight * part + rest, whole) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_scale_multiplies_the_scores(impl):
    q, k, v = inputs((5, 7))
    o = window_attention(q, k, v, grid=(5, 7), radius=3, scale=0.7, impl=impl)
    default = window_attention(q * 0.7 * 8**0.5, k, v, grid=(5, 7), radius=3, impl=impl)
    assert error(o, default) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_is_contiguous_and_has_the_dtype_of_v(impl, dtype):
    q, k, v = inputs((5, 7), dtype)
    o, lse = window_attention(q, k, v, grid=(5, 7), radius=3, return_lse=True, impl=impl)
    assert (o.dtype, o.shape, o.is_contiguous()) == (dtype, q.shape, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (lse.dtype, lse.shape) == (wide, q.shape[:3])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_to_b_to_a_gives_the_result_of_a_both_times(impl):
    first, second = inputs((6, 8), torch.float32), inputs((12, 4), torch.float32)
    a = window_attention(*first, grid=(6, 8), radius=3, impl=impl)
    b = window_attention(*second, grid=(12, 4), radius=3, impl=impl)
    assert not torch.allclose(a, b, atol=0.1)
    assert torch.equal(window_attention(*first, grid=(6, 8), radius=3, impl=impl), a)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(impl, dtype):
    packed = tokens(2, 35, 3, 2, 8, dtype=dtype)  # one fused projection
    views = packed.unbind(2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    inside_out = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in views]
    options = {"grid": (5, 7), "radius": 3, "impl": impl}
    truth = window_attention(*(x.contiguous() for x in views), **options)
    for other in (views, heads_first, inside_out):
        assert torch.equal(window_attention(*other, **options), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_casts_as_for_softmax_and_rounds_no_score(impl):
    q, k, v = inputs((5, 7), torch.float32)
    options = {"grid": (5, 7), "radius": 3, "impl": impl}
    truth = window_attention(*(x.bfloat16() for x in (q, k, v)), **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(window_attention(q, k, v.bfloat16(), **options), truth)


def test_the_reference_is_differentiable_twice():
    x = [y[:1, :, :1, :2].clone().requires_grad_() for y in inputs((2, 3))]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: window_attention(q, k, v, grid=(2, 3), radius=1.5, impl="reference"), x
    )
