"""The Triton kernels of window attention, interpreted on a CPU, against the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from linfusion.kernels import TileOrder, window_attention
from linfusion.kernels.window_attention import reference
from linfusion.kernels.window_attention import triton as kernels
from linfusion.kernels.window_attention.triton.lists import lists

# Relative RMS error against float64. Wrong signs, masks or scales are errors of order one.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3}

# grid, radius, tokens everyone sees, head dimension
SIZES = [
    ((8, 16), 5, 0, 16),
    ((13, 21), 4.5, 5, 8),
    ((1, 9), 3, 33, 40),
    ((5, 6, 4), 3, 2, 16),
]


def inputs(
    grid: tuple[int, ...], always: int, d: int, dtype: torch.dtype, batch: int = 1
) -> tuple[Tensor, ...]:
    """q, k, v, keys and values of everyone, and gradients of the output and its log-sum-exp."""
    g = torch.Generator().manual_seed(always + d)
    n = math.prod(grid)
    shapes = [(batch, t, 2, d) for t in (n, n, n, always, always, n)]
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    return *tensors, torch.randn(batch, n, 2, generator=g)


def run(*tensors: Tensor, choices: tuple[object, ...]) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients by the kernels."""
    *x, do, dlse = tensors
    output = kernels.attention(*x, *choices)
    return *output, *kernels.attention_backward(do, dlse, *x, *output, *choices)


def exact(*tensors: Tensor, choices: tuple[object, ...]) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients by the definition, in float64."""
    *x, do, dlse = (t.double() for t in tensors)
    x = [t.requires_grad_() for t in x]
    output = reference.attention(*x, *choices[:-1])
    grads = torch.autograd.grad(output, x, (do, dlse))
    return *(t.detach() for t in output), *grads


def error(ours: Tensor, truth: Tensor) -> float:
    if truth.numel() == 0:
        return 0.0 if ours.shape == truth.shape else math.inf
    return ((ours.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def check(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    names = ("o", "lse", "dq", "dk", "dv", "dk_all", "dv_all")
    for name, a, b in zip(names, ours, truth, strict=True):
        assert a.dtype == (torch.float32 if name == "lse" else dtype), name
        assert error(a, b) <= TOLERANCE[dtype], name


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


@pytest.mark.parametrize("shape", ["disc", "square"])
@pytest.mark.parametrize(("grid", "radius", "always", "d"), SIZES)
def test_output_and_gradients_agree_with_the_definition(grid, radius, always, d, shape, poisoned):
    tensors = inputs(grid, always, d, torch.float32)
    choices = (grid, float(radius), shape, 0.3, False)
    check(run(*tensors, choices=choices), exact(*tensors, choices=choices), torch.float32)


def test_half_precision_and_a_batch_agree(poisoned):
    grid = (9, 10)
    tensors = inputs(grid, 5, 16, torch.float16, batch=2)
    choices = (grid, 4.0, "disc", 0.25, False)
    check(run(*tensors, choices=choices), exact(*tensors, choices=choices), torch.float16)


def test_a_window_larger_than_tiles_needs_no_mask_inside(poisoned):
    grid = (8, 40)
    tensors = inputs(grid, 0, 8, torch.float32)
    choices = (grid, 24.0, "disc", 0.3, False)
    tables = lists(grid, 24.0, "disc", torch.device("cpu"))
    assert (tables.tiles, tables.whole) == (5, 2 + 3 + 3 + 3 + 2)
    check(run(*tensors, choices=choices), exact(*tensors, choices=choices), torch.float32)


@pytest.mark.parametrize("grid", [(13, 21), (5, 6, 4)])
def test_tile_order_changes_places_and_no_bits(grid):
    order = TileOrder(grid)
    q, k, v, k_all, v_all, do, dlse = inputs(grid, 3, 8, torch.float32)
    raster = run(q, k, v, k_all, v_all, do, dlse, choices=(grid, 4.0, "disc", 0.3, False))
    q, k, v, do, dlse = map(order.permute, (q, k, v, do, dlse))
    tiled = run(q, k, v, k_all, v_all, do, dlse, choices=(grid, 4.0, "disc", 0.3, True))
    for a, b in zip(tiled[:5], raster[:5], strict=True):
        assert torch.equal(order.undo(a), b)
    # Sums over all queries, which they take in the order of memory.
    assert all(error(a, b.double()) < 1e-6 for a, b in zip(tiled[5:], raster[5:], strict=True))


def views(layout: str, x: Tensor) -> Tensor:
    """The values of `x` [B, N, H, D] in another layout of memory."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one of three projections":
        return torch.stack([x, x, x], 2)[:, :, 1]
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # features outermost


@pytest.mark.parametrize("layout", ["heads first", "one of three projections", "inside out"])
def test_the_layout_of_memory_changes_no_bits(layout):
    grid, choices = (5, 9), ((5, 9), 4.0, "disc", 0.3, False)
    *x, dlse = inputs(grid, 3, 8, torch.float32)
    other = [views(layout, t) for t in x]
    ours, truth = run(*other, dlse, choices=choices), run(*x, dlse, choices=choices)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("axis", ["batch", "token", "head"])
def test_offsets_beyond_two_to_the_31_are_right(axis):
    # Four gigabytes of address space, of which a few pages are touched.
    far = {"batch": (2**31, 64, 32, 1), "token": (64, 2**30, 32, 1), "head": (64, 128, 2**31, 1)}
    batch = 1 if axis == "token" else 2
    *x, dlse = inputs((1, 3), 0, 32, torch.float16, batch=batch)
    choices = ((1, 3), 2.0, "disc", 0.3, False)
    memory = torch.empty(2**31 + 4096, dtype=torch.float16)
    near = run(*x, dlse, choices=choices)
    for i in (0, 1, 2, 5):
        view = memory.as_strided(x[i].shape, far[axis])
        view.copy_(x[i])
        moved = [view if i == j else y for j, y in enumerate(x)]
        ours = run(*moved, dlse, choices=choices)
        assert all(torch.equal(a, b) for a, b in zip(ours, near, strict=True))


def test_the_public_function_runs_these_kernels_and_their_gradients():
    grid = (5, 9)
    q, k, v, *pair, do, dlse = inputs(grid, 3, 8, torch.float32)
    leaves = [t.requires_grad_() for t in (q, k, v, *pair)]
    output = window_attention(
        *leaves[:3], grid=grid, radius=4, context=leaves[3:], return_lse=True, impl="triton"
    )
    grads = torch.autograd.grad(output, leaves, (do, dlse))
    choices = (grid, 4.0, "disc", 8**-0.5, False)
    truth = exact(*(t.detach() for t in leaves), do, dlse, choices=choices)
    check((*output, *grads), truth, torch.float32)


@pytest.mark.parametrize(
    ("grid", "radius", "shape"),
    [((13, 21), 4.5, "disc"), ((30, 17), 12, "square"), ((5, 9, 10), 6, "disc")],
)
def test_lists_and_bits_are_the_window_of_every_pair(grid, radius, shape):
    tables = lists(grid, float(radius), shape, torch.device("cpu"))
    tile = (8, 8) if len(grid) == 2 else (4, 4, 4)
    places = list(itertools.product(*map(range, grid)))
    counts = [-(-size // side) for size, side in zip(grid, tile, strict=True)]

    def home(place: tuple[int, ...]) -> tuple[int, int]:
        t = i = 0
        for x, side, count in zip(place, tile, counts, strict=True):
            t, i = t * count + x // side, i * side + x % side
        return t, i

    seen = set()
    of_tile: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for place in places:
        of_tile.setdefault(home(place)[0], []).append((place, home(place)[1]))
    for t, queries in of_tile.items():
        first, masked, last, itself = tables.table[4 * t : 4 * t + 4].tolist()
        assert itself == t
        for entry in range(first, last):
            at = 4 * tables.tiles + 2 * entry
            listed, mask = tables.table[at : at + 2].tolist()
            words = tables.bits[mask].tolist()
            unmasked = entry < masked
            assert not unmasked or len(of_tile[listed]) == 64
            for (a, i), (b, j) in itertools.product(queries, of_tile[listed]):
                assert not unmasked or words[i] >> j & 1
                if words[i] >> j & 1:
                    seen.add((a, b))
    for a, b in itertools.product(places, places):
        apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
        near = sum(x * x for x in apart) < radius**2 if shape == "disc" else max(apart) < radius
        assert ((a, b) in seen) == near


@pytest.mark.parametrize(
    ("side", "radius", "whole", "part"),
    [(64, 8, 0, 7.6), (64, 16, 1.0, 17.1), (128, 16, 1.0, 20.4), (128, 32, 21.6, 36.2)],
)
def test_as_many_tiles_are_visited_as_there_are(side, radius, whole, part):
    tables = lists((side, side), float(radius), "disc", torch.device("cpu"))
    assert tables.whole / tables.tiles == pytest.approx(whole, abs=0.05)
    assert tables.part / tables.tiles == pytest.approx(part, abs=0.1)


def test_what_a_launch_needs_is_made_once_a_shape():
    """A captured graph holds addresses of tables, whatever other grids come after it."""
    collected = []
    target = kernels.Target("cuda", 1, collected.append)
    for grid in ((9, 10), *((9, 11 + i) for i in range(12)), (9, 10)):
        q, k, v, *rest = inputs(grid, 3, 16, torch.float16)
        kernels.attention(q, k, v, *rest[:2], grid, 4.0, "disc", 0.3, False, target=target)
    first, last = collected[0].args, collected[-1].args
    assert first["TABLE"].data_ptr() == last["TABLE"].data_ptr()
    assert first["BITS"].data_ptr() == last["BITS"].data_ptr()
    assert first["tiles"] != collected[-2].args["tiles"] or first["X"] != collected[-2].args["X"]


@pytest.mark.parametrize(
    ("d", "pieces"),
    [(64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (128, (64, 64))],
)
def test_columns_of_a_head_are_not_padded_to_twice_their_number(d, pieces):
    collected = []
    target = kernels.Target("cuda", 1, collected.append)
    x = [torch.empty(1, 64, 1, d, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    none = torch.empty(1, 0, 1, d, dtype=torch.bfloat16, device="meta")
    kernels.attention(*x, none, none, (8, 8), 4.0, "disc", 0.3, False, target=target)
    assert (collected[0].args["BA"], collected[0].args["BB"]) == pieces
