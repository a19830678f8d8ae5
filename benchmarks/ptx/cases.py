"""What is run and compared with the reference, at sizes chosen to hurt.

A case is a function that takes a `Target`, launches kernels through the library's own code and
returns how far each result is from the float64 reference. To add a family of kernels, write such a
function and give its cases a name in `CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.launch import Target


class Comparison(NamedTuple):
    """A result's largest error over the largest value of the reference, and what it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


Case = Callable[[Target], list[Comparison]]

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
# A wrong element or a missing product moves a result by 1e-1 and more, at these sizes.
_TOLERANCE = {bf16: 2e-2, f16: 3e-3, f32: 3e-6}


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> Comparison:
    """The error is infinite where a result is not finite."""
    got, want = got.double(), want.double()
    scale = want.abs().max().item() or 1.0
    error = (got - want).abs().max().item() / scale
    return Comparison(name, error if math.isfinite(error) else math.inf, tolerance)


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` gives NaN: what a kernel reads and nobody wrote shows up in its result."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Draw:
    """Normal numbers of one dtype, the same ones every time."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Between 0 and 1, in float32."""
        return torch.rand(*shape, generator=self._generator)


def linear(
    target: Target,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    heads: int,
    d: int,
    *,
    dv: int | None = None,
    phi: str = "elu1",
    normalizer: str = "mean",
    weighted: bool = False,
    packed: bool = False,
    batch: int = 1,
) -> list[Comparison]:
    """Linear attention, forward and backward; `packed`: q, k, v are parts of one tensor."""
    from linfusion.kernels.linear_attention import reference, triton
    from linfusion.kernels.linear_attention.common import Choices

    draw = Draw(dtype)
    if packed:
        parts = draw(batch, queries, 3 * heads * d).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (heads, d)) for x in parts)
    else:
        q, k = draw(batch, queries, heads, d), draw(batch, keys, heads, d)
        v = draw(batch, keys, heads, dv or d)
    weight = None
    if weighted:
        weight = draw.uniform(batch, keys) * (draw.uniform(batch, keys) > 0.3)
    do = draw(batch, queries, heads, dv or d)
    choices = Choices(phi, normalizer, 1e-4)
    state = triton.state_forward(k, v, weight, phi, target=target)
    o = triton.read_forward(q, state, choices, v.dtype, target=target)
    gradients = triton.attention_backward(do, q, k, v, weight, state, choices, target=target)

    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    exact = reference.state_forward(k, v, None if weight is None else weight.double(), phi)
    want = reference.read_forward(q, exact, choices, torch.float64)
    wanted = torch.autograd.grad(want, (q, k, v), do.double())
    tolerance = _TOLERANCE[dtype]
    found = [
        compare("kv", state.kv, exact.kv, tolerance),
        compare("k_mean", state.k_mean, exact.k_mean, max(tolerance, 1e-5)),
        compare("o", o, want, tolerance),
    ]
    for name, x, y in zip(("dq", "dk", "dv"), gradients, wanted, strict=True):
        if keys > 1 or name == "dv":  # of one key, dq and dk are 0 but for rounding
            found.append(compare(name, x, y, tolerance))
    return found


def strided(
    target: Target, dtype: torch.dtype, lay: Callable[[Draw], list[Tensor]]
) -> list[Comparison]:
    """Linear attention, forward, of tensors that lie in memory as `lay` has them."""
    from linfusion.kernels.linear_attention import reference, triton
    from linfusion.kernels.linear_attention.common import Choices

    q, k, v = lay(Draw(dtype))
    choices, tolerance = Choices("elu1", "mean", 1e-4), _TOLERANCE[dtype]
    state = triton.state_forward(k, v, None, "elu1", target=target)
    o = triton.read_forward(q, state, choices, dtype, target=target)
    exact = reference.state_forward(k.double(), v.double(), None, "elu1")
    want = reference.read_forward(q.double(), exact, choices, torch.float64)
    return [compare("kv", state.kv, exact.kv, tolerance), compare("o", o, want, tolerance)]


def _two_bytes_off(draw: Draw) -> list[Tensor]:
    """No address is a multiple of anything."""
    parts = draw(1, 90, 2 * 40 * 3 + 1)[..., 1:].chunk(3, -1)
    return [x.unflatten(-1, (2, 40)) for x in parts]


def _heads_first(draw: Draw) -> list[Tensor]:
    return [draw(1, 3, 70, 64).transpose(1, 2) for _ in range(3)]


def _every_third_token(draw: Draw) -> list[Tensor]:
    return [draw(1, 210, 2, 64)[:, ::3] for _ in range(3)]


def _features_apart(draw: Draw) -> list[Tensor]:
    return [draw(1, 60, 40, 2).transpose(2, 3) for _ in range(3)]


def _expanded(draw: Draw) -> list[Tensor]:
    """One key for all tokens, one value for all heads."""
    k, v = draw(1, 1, 2, 64).expand(1, 40, 2, 64), draw(1, 40, 1, 64).expand(1, 40, 2, 64)
    return [draw(1, 50, 2, 64), k, v]


def window(
    target: Target,
    dtype: torch.dtype,
    grid: tuple[int, ...],
    radius: float,
    heads: int,
    d: int,
    *,
    always: int = 0,
    tiled: bool = False,
    shape: str = "disc",
    batch: int = 1,
    backward: bool = True,
) -> list[Comparison]:
    """Attention in a window; `always` keys are seen by all, `tiled` tokens come tile by tile."""
    from linfusion.kernels.window_attention import TileOrder, reference, triton
    from linfusion.kernels.window_attention.common import bounded

    draw, tokens = Draw(dtype), math.prod(grid)
    q, k, v, do, ka, va = (
        draw(batch, n, heads, d) for n in (tokens, tokens, tokens, tokens, always, always)
    )
    choices = (grid, bounded(radius, grid), shape, d**-0.5)
    order = TileOrder(grid)

    def into(x: Tensor) -> Tensor:
        return order.permute(x) if tiled else x

    def out_of(x: Tensor) -> Tensor:
        return order.undo(x) if tiled else x

    x = (into(q), into(k), into(v), ka, va)
    o, lse = triton.attention(*x, *choices, tiled, target=target)
    exact = [t.double().requires_grad_() for t in (q, k, v, ka, va)]
    want_o, want_lse = reference.attention(*exact, *choices)
    tolerance = _TOLERANCE[dtype]
    found = [
        compare("o", out_of(o), want_o, tolerance),
        compare("lse", out_of(lse), want_lse, max(tolerance / 10, 2e-6)),
    ]
    if backward:
        dlse = Draw(f32)(*lse.shape)
        gradients = triton.attention_backward(
            into(do), into(dlse), *x, o, lse, *choices, tiled, target=target
        )
        wanted = torch.autograd.grad(
            [want_o, want_lse], exact, [do.double(), dlse.double()], allow_unused=True
        )
        for name, got, want in zip(
            ("dq", "dk", "dv", "dka", "dva"), gradients, wanted, strict=True
        ):
            if got.numel():
                got = got if name.endswith("a") else out_of(got)
                found.append(compare(name, got, want, 2 * tolerance))
    return found


def scan(
    target: Target,
    dtype: torch.dtype,
    length: int,
    heads: int,
    groups: int,
    channels: int,
    features: int,
    chunk: int,
    *,
    reverse: bool = False,
    extras: bool = True,
    batch: int = 1,
) -> list[Comparison]:
    """The state-space scan, forward and backward; `extras`: skip and first state."""
    from linfusion.kernels.ssd import reference, triton
    from linfusion.kernels.ssd.common import Choices

    x, dt, a, b, c, draw = _of_scan(dtype, length, heads, groups, channels, features, batch)
    plain = Draw(f32)
    skip = plain(batch, heads, channels) if extras else None
    first = plain(batch, heads, channels, features) if extras else None
    choices = Choices(chunk, reverse)
    y, final, kept = triton.scan(x, dt, a, b, c, skip, first, choices, target=target)
    dy, dfinal = draw(*y.shape), plain(*final.shape)
    gradients = triton.scan_backward(dy, dfinal, x, dt, a, b, c, skip, kept, choices, target=target)
    leaves = [
        None if t is None else t.double().requires_grad_() for t in (x, dt, a, b, c, skip, first)
    ]
    want, want_final = reference.scan(*leaves, choices)
    wanted = torch.autograd.grad(
        [want, want_final], [t for t in leaves if t is not None], [dy.double(), dfinal.double()]
    )
    tolerance = _TOLERANCE[dtype]
    names = ("dx", "ddt", "da", "db", "dc", "dskip", "dfirst")
    return [
        compare("y", y, want, tolerance),
        compare("final", final, want_final, tolerance),
        *(
            compare(name, got, exact, 2 * tolerance)
            for name, got, exact in zip(names, gradients, wanted, strict=False)
        ),
    ]


def _of_scan(
    dtype: torch.dtype,
    length: int,
    heads: int,
    groups: int,
    channels: int,
    features: int,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Draw]:
    draw = Draw(dtype)
    x = draw(batch, length, heads, channels)
    b, c = draw(batch, length, groups, features), draw(batch, length, groups, features)
    dt = 0.2 * draw.uniform(batch, length, heads)
    a = -8 * dt * draw.uniform(heads)
    return x, dt, a, (b / features**0.5).to(dtype), c, draw


def _case(function: Callable[..., list[Comparison]], *arguments: object, **options: object) -> Case:
    return lambda target: function(target, *arguments, **options)


CASES: dict[str, Case] = {
    "linear bf16 D=40": _case(linear, bf16, 200, 300, 2, 40),
    "linear bf16 D=64, packed": _case(linear, bf16, 200, 200, 2, 64, packed=True),
    "linear f16 D=80, weighted": _case(linear, f16, 150, 170, 2, 80, weighted=True),
    "linear bf16 D=160": _case(linear, bf16, 130, 130, 1, 160),
    "linear f32 D=64": _case(linear, f32, 100, 130, 2, 64),
    "linear bf16 D=72, relu_eps, sum": _case(
        linear, bf16, 100, 100, 2, 72, phi="relu_eps", normalizer="sum"
    ),
    "linear bf16 D=64, nothing normalised": _case(
        linear, bf16, 100, 100, 2, 64, phi="identity", normalizer="none"
    ),
    "linear one token": _case(linear, bf16, 1, 1, 1, 64),
    "linear bf16 D=8, 3 heads, batch 2": _case(linear, bf16, 33, 65, 3, 8, batch=2),
    "linear f16 D=33": _case(linear, f16, 70, 50, 2, 33),
    "linear bf16 D=64, Dv=24": _case(linear, bf16, 70, 90, 2, 64, dv=24),
    "linear f32 D=20, Dv=130": _case(linear, f32, 40, 50, 1, 20, dv=130),
    "linear bf16 D=320": _case(linear, bf16, 40, 70, 1, 320),
    "linear many splits": _case(linear, bf16, 64, 2000, 1, 64),
    "linear two bytes off": _case(strided, bf16, _two_bytes_off),
    "linear heads first": _case(strided, f16, _heads_first),
    "linear every third token": _case(strided, bf16, _every_third_token),
    "linear features apart": _case(strided, bf16, _features_apart),
    "linear expanded": _case(strided, bf16, _expanded),
    "window bf16 D=64, r=5": _case(window, bf16, (20, 27), 5.0, 2, 64, always=70),
    "window bf16 D=128, tiled": _case(window, bf16, (19, 17), 6.0, 1, 128, always=33, tiled=True),
    "window f16 D=40, video": _case(window, f16, (5, 9, 6), 3.0, 2, 40),
    "window f32 D=64": _case(window, f32, (13, 20), 4.0, 1, 64, always=20),
    "window f32 D=128, square": _case(window, f32, (13, 10), 4.0, 1, 128, always=5, shape="square"),
    "window 1 × 9, r=100": _case(window, bf16, (1, 9), 100.0, 3, 64, always=1, batch=2),
    "window 9 × 1 × 2": _case(window, f16, (9, 1, 2), 2.0, 1, 16, tiled=True),
    "window r=1, D=72": _case(window, bf16, (10, 10), 1.0, 1, 72),
    "window f32 D=8": _case(window, f32, (9, 11), 3.5, 1, 8, always=3),
    "scan bf16 64×64, chunk 256": _case(scan, bf16, 600, 2, 1, 64, 64, 256),
    "scan bf16 64×64, chunk 64, reverse": _case(scan, bf16, 200, 4, 2, 64, 64, 64, reverse=True),
    "scan f16 64×128, chunk 128": _case(scan, f16, 300, 2, 1, 64, 128, 128, extras=False),
    "scan f32 32×16, chunk 16": _case(scan, f32, 75, 2, 1, 32, 16, 16),
    "scan one token": _case(scan, bf16, 1, 2, 1, 64, 64, 64),
    "scan bf16 100×24, chunk 17": _case(scan, bf16, 70, 2, 2, 100, 24, 17),
    "scan f16 8×8, batch 2": _case(scan, f16, 40, 3, 1, 8, 8, 256, batch=2, reverse=True),
    "scan bf16 128×128": _case(scan, bf16, 140, 1, 1, 128, 128, 128),
    "scan f32 128×128": _case(scan, f32, 50, 1, 1, 128, 128, 64),
    "scan 8 heads, splits": _case(scan, bf16, 70, 8, 1, 32, 32, 64, extras=False),
}
