"""What window attention computes: against a loop over pairs, SDPA, and its own parts."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linfusion.kernels import TileOrder, window_attention
from linfusion.kernels.window_attention import blocked, blocks, products

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


@pytest.fixture(params=["reference", "dense", "tiles", "products"])
def impl(request, monkeypatch) -> str:
    """Every implementation; of `blocked`, which takes few tokens at once, also its tiles."""
    if request.param == "reference":
        return "reference"
    if request.param in ("tiles", "products"):
        monkeypatch.setattr(blocks, "SMALL", 0)
        use(monkeypatch, request.param == "products")
    return "blocked"


def use(monkeypatch, by_products: bool) -> None:
    """Whether tiles are attended by products, whatever CPU this is."""

    def applies(q: Tensor, dtype: torch.dtype) -> bool:
        return by_products and dtype in products.SUMS

    monkeypatch.setattr(blocked, "applies", applies)


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
    x = torch.zeros(1, side * side, 1, 8)
    # Equal scores: every token of the window has the same weight.
    _, lse = window_attention(x, x, x, grid=(side, side), radius=radius, return_lse=True)
    assert lse[0, middle, 0].exp().item() == pytest.approx(count, rel=1e-5)


def test_every_query_sees_the_context_and_the_pooled_tokens(impl):
    grid, radius = (9, 7), 3
    q, k, v = inputs(grid)
    context, pooled = pair(5, seed=7), pair(4, seed=8)
    mask = seen(grid, radius, "disc")
    for extra in ({"context": context}, {"pooled": pooled}, {"context": context, "pooled": pooled}):
        o = window_attention(q, k, v, grid=grid, radius=radius, **extra, impl=impl)
        assert error(o, dense(q, k, v, mask, *extra.values())) < 1e-13


@pytest.mark.parametrize("radius", [16, 1e9, float("inf")])
def test_a_window_larger_than_the_grid_is_full_attention(impl, radius):
    grid = (11, 11)  # its diagonal is 14.14
    q, k, v = inputs(grid, torch.float32)
    truth = dense(q, k, v, torch.ones(121, 121, dtype=torch.bool))
    o = window_attention(q, k, v, grid=grid, radius=radius, impl=impl)
    assert torch.allclose(o, truth, rtol=1e-5, atol=1e-6)


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


def test_the_scale_multiplies_the_scores(impl):
    q, k, v = inputs((5, 7))
    o = window_attention(q, k, v, grid=(5, 7), radius=3, scale=0.7, impl=impl)
    default = window_attention(q * 0.7 * 8**0.5, k, v, grid=(5, 7), radius=3, impl=impl)
    assert error(o, default) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_is_contiguous_and_has_the_dtype_of_v(impl, dtype):
    q, k, v = inputs((5, 7), dtype)
    o, lse = window_attention(q, k, v, grid=(5, 7), radius=3, return_lse=True, impl=impl)
    assert (o.dtype, o.shape, o.is_contiguous()) == (dtype, q.shape, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (lse.dtype, lse.shape) == (wide, q.shape[:3])


def test_a_to_b_to_a_gives_the_result_of_a_both_times(impl):
    first, second = inputs((6, 8), torch.float32), inputs((12, 4), torch.float32)
    a = window_attention(*first, grid=(6, 8), radius=3, impl=impl)
    b = window_attention(*second, grid=(12, 4), radius=3, impl=impl)
    assert not torch.allclose(a, b, atol=0.1)
    assert torch.equal(window_attention(*first, grid=(6, 8), radius=3, impl=impl), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(impl, dtype):
    packed = tokens(2, 35, 3, 2, 8, dtype=dtype)  # one fused projection
    views = packed.unbind(2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    inside_out = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in views]
    options = {"grid": (5, 7), "radius": 3, "impl": impl}
    truth = window_attention(*(x.contiguous() for x in views), **options)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for other in (views, heads_first, inside_out):
        assert torch.allclose(window_attention(*other, **options), truth, **close)


def test_autocast_casts_as_for_softmax_and_rounds_no_score(impl):
    q, k, v = inputs((5, 7), torch.float32)
    options = {"grid": (5, 7), "radius": 3, "impl": impl}
    truth = window_attention(*(x.bfloat16() for x in (q, k, v)), **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(window_attention(q, k, v.bfloat16(), **options), truth)


def gradients(impl: str, grid: tuple[int, ...], tensors: list[Tensor], **options) -> list[Tensor]:
    """Output, log-sum-exp, and gradients of a function of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    q, k, v, *context = tensors
    o, lse = window_attention(
        q, k, v, grid=grid, context=context or None, return_lse=True, impl=impl, **options
    )
    loss = o.double().sin().sum() + lse.double().cos().sum()
    return [o, lse, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("block", [blocks.BLOCK, 1], ids=["one block", "a tile a block"])
@pytest.mark.parametrize("tiled", [False, True], ids=["raster", "tile order"])
@pytest.mark.parametrize("shape", ["disc", "square"])
@pytest.mark.parametrize("grid, radius", [((13, 21), 4.5), ((7, 5, 9), 3)])
def test_tiles_have_the_output_and_gradients_of_the_definition(
    grid, radius, shape, tiled, block, monkeypatch
):
    monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(blocks, "BLOCK", block)
    x = [*inputs(grid), *pair(5, seed=7)]
    options = {"radius": radius, "shape": shape, "order": TileOrder(grid) if tiled else None}
    ours, truth = (gradients(i, grid, x, **options) for i in ("blocked", "reference"))
    for a, b in zip(ours, truth, strict=True):
        assert error(a, b) < 1e-13


def test_gradients_are_those_of_finite_differences(impl):
    x = [y[:1, :, :1, :3].clone().requires_grad_() for y in (*inputs((3, 5)), *pair(2, seed=7))]

    def f(q, k, v, *context):
        return window_attention(
            q, k, v, grid=(3, 5), radius=2, context=context, return_lse=True, impl=impl
        )

    assert torch.autograd.gradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_twice_the_error_of_softmax_in_it(impl, dtype):
    grid, radius = (13, 21), 4.5
    x = [y.to(dtype) for y in (*inputs(grid, dim=32), *pair(20, seed=7, dim=32))]
    mask = seen(grid, radius, "disc")
    truth = gradients("reference", grid, [y.double() for y in x], radius=radius)
    ours = gradients(impl, grid, x, radius=radius)
    theirs = dense(*x[:3], mask, x[3:])
    assert error(ours[0], truth[0]) <= 2 * error(theirs, truth[0])
    for a, b in zip(ours[2:], truth[2:], strict=True):
        assert error(a, b) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_tile_order_is_a_permutation_that_attention_follows(impl):
    for grid in ((13, 21), (8, 16), (5, 6, 9)):
        order = TileOrder(grid)
        x = inputs(grid)
        assert torch.equal(order.undo(order.permute(x[0])), x[0])
        options = {"grid": grid, "radius": 3, "return_lse": True, "impl": impl}
        truth = window_attention(*x, **options)
        ours = window_attention(*map(order.permute, x), order=order, **options)
        for a, b in zip(ours, truth, strict=True):
            assert error(order.undo(a), b) < 1e-14


@pytest.mark.parametrize("grid", [(16, 24), (13, 21), (4, 8, 12), (5, 6, 9)])
def test_tiles_are_contiguous_in_tile_order(grid):
    tile = (8, 8) if len(grid) == 2 else (4, 4, 4)
    places = itertools.product(*map(range, grid))
    by_tile = sorted(places, key=lambda p: ([x // t for x, t in zip(p, tile, strict=True)], p))
    raster = torch.arange(math.prod(grid)).view(grid)
    expected = torch.stack([raster[place] for place in by_tile])
    assert torch.equal(TileOrder(grid).permute(raster.view(-1), dim=0), expected)


def test_products_agree_with_the_flash_kernel():
    q, k, v = tokens(2, 3, 10, 8), tokens(2, 3, 17, 8, seed=1), tokens(2, 3, 17, 8, seed=2)
    bias = torch.zeros(10, 17, dtype=torch.float64)
    bias[:, 3:9] = float("-inf")
    for mask in (None, bias):
        ours = blocked.attend_by_products(q, k, v, mask, 0.3)
        for a, b in zip(ours, blocked.attend(q, k, v, mask, 0.3), strict=True):
            assert error(a, b) < 1e-14


def test_nothing_uninitialised_is_read(monkeypatch):
    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            library = sys._getframe(1).f_globals["__name__"].startswith("linfusion")
            return x.fill_(float("nan")) if library and x.is_floating_point() else x

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for small in (0, 512):
        monkeypatch.setattr(blocks, "SMALL", small)
        x = [*inputs((13, 21), torch.float32), *pair(5, seed=7, dtype=torch.float32)]
        assert all(y.isfinite().all() for y in gradients("blocked", (13, 21), x, radius=4))


@pytest.mark.parametrize("by_products", [False, True])
def test_a_column_of_tiles_is_all_that_is_held(monkeypatch, by_products):
    use(monkeypatch, by_products)
    monkeypatch.setattr(products, "SCORES", 1)  # bytes; one tile's at least
    sizes: dict[int, int] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(out)):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return out

    q, k, v = (torch.zeros(1, 4096, 2, 16) for _ in range(3))
    none = torch.zeros(1, 0, 2, 16)
    with Watch():
        o, _ = blocked.attention(q, k, v, none, none, (64, 64), 4.0, "disc", 0.25, False)
    for x in (q, k, v, o):
        sizes.pop(x.data_ptr(), None)
    # Keys of a column of tiles, 64 × 14 tokens of 2 heads, and what the last tile reads past them;
    # q has 4096, the mask of a dense call 4096².
    assert max(sizes.values()) == (64 * 14 * 2 + blocks.LANES - 1) * 16 * 4 < q.nbytes / 4


def test_the_reference_is_differentiable_twice():
    x = [y[:1, :, :1, :2].clone().requires_grad_() for y in inputs((2, 3))]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: window_attention(q, k, v, grid=(2, 3), radius=1.5, impl="reference"), x
    )


def test_a_tile_order_is_made_once_and_serves_every_mode():
    """One gather a call; and what inference mode made, gradients may use."""

    class Count(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += 1
            return func(*args, **(kwargs or {}))

    order_, x = TileOrder((11, 23)), torch.randn(1, 253, 2, 8)
    with torch.inference_mode():
        order_.permute(x), order_.undo(x)
    with Count() as count:
        back = order_.undo(order_.permute(x))
    assert count.made == 2
    assert torch.equal(back, x)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(order_.permute(x).square().sum(), x)
    assert torch.equal(grad, 2 * x)
    with FakeTensorMode() as mode:  # a dry run finds nothing real, and leaves nothing behind
        assert order_.permute(mode.from_tensor(x)).shape == x.shape
        fresh = TileOrder((11, 29))
        fresh.permute(torch.empty(1, 319, 8))
    assert torch.equal(fresh.undo(fresh.permute(torch.ones(1, 319, 8))), torch.ones(1, 319, 8))
