"""What surrounds a product in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ptx.comparing import TOLERANCE, Comparison, Draw, compare, f32
from linfusion.kernels.launch import Target


def norm_and_activation(
    target: Target, dtype: torch.dtype, rows: int, channels: int
) -> list[Comparison]:
    """LayerNorm and leaky ReLU in one pass, forward and backward."""
    from linfusion.kernels.elementwise import reference, triton

    draw = Draw(dtype)
    leaves = [draw(1, rows, channels) + 3, draw(channels), draw(channels)]
    dy = draw(1, rows, channels)
    y = triton.norm_leaky_relu(*leaves, 1e-5, 0.01, target=target)
    gradients = triton.norm_leaky_relu_backward(dy, *leaves, 1e-5, 0.01, target=target)
    exact = [t.double().requires_grad_() for t in leaves]
    want = reference.norm_leaky_relu(*exact, 1e-5, 0.01)
    wanted = torch.autograd.grad(want, exact, dy.double())
    return _of_pass(dtype, y, want, ("dx", "dweight", "dbias"), gradients, wanted)


def norm_and_rotation(
    target: Target, dtype: torch.dtype, tokens: int, heads: int, d: int
) -> list[Comparison]:
    """RMSNorm of a head and its rotation in one pass, forward and backward."""
    from linfusion.kernels.elementwise import reference, triton

    draw = Draw(dtype)
    # A part of a product, as queries are: rows that are not one after another.
    x = draw(2, tokens, 3 * heads * d).chunk(3, -1)[1].unflatten(-1, (heads, d))
    weight, dy, angle = draw(d), draw(2, tokens, heads, d), Draw(f32)(tokens, d)
    tables = (angle.cos(), angle.sin())
    y = triton.rotary_rms_norm(x, weight, *tables, 1e-6, target=target)
    gradients = triton.rotary_rms_norm_backward(dy, x, weight, *tables, 1e-6, target=target)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    want = reference.rotary_rms_norm(*exact, *(t.double() for t in tables), 1e-6)
    wanted = torch.autograd.grad(want, exact, dy.double())
    return _of_pass(dtype, y, want, ("dx", "dweight"), gradients, wanted)


def both_directions(
    target: Target, dtype: torch.dtype, tokens: int, channels: int, taps: int, first: int
) -> list[Comparison]:
    """A convolution and SiLU in both directions, forward and backward."""
    from linfusion.kernels.elementwise import reference, triton_conv

    draw = Draw(dtype)
    x = draw(2, tokens, 3 * channels).chunk(3, -1)[1]
    filters = [draw(*shape) for shape in ((channels, taps), (channels,)) * 2]
    dys = [draw(2, tokens, channels) for _ in range(2)]
    y = triton_conv.directional_conv(x, *filters, first, True, target=target)
    gradients = triton_conv.directional_conv_backward(*dys, x, *filters, first, True, target=target)
    exact = [t.double().requires_grad_() for t in (x, *filters)]
    want = reference.directional_conv(*exact, first, True)
    wanted = torch.autograd.grad(want, exact, [dy.double() for dy in dys])
    names = ("dx", "dweight", "dbias", "dweight_b", "dbias_b")
    tolerance = TOLERANCE[dtype]
    return [
        compare("y_b", y[1], want[1], tolerance),
        *_of_pass(dtype, y[0], want[0], names, gradients, wanted),
    ]


def gate_and_norm(
    target: Target, dtype: torch.dtype, tokens: int, groups: int, d: int, gate_last: bool = False
) -> list[Comparison]:
    """Two directions added, gated and normed, forward and backward."""
    from linfusion.kernels.elementwise import reference, triton_gate

    draw = Draw(dtype)
    x, other, dy = (draw(2, tokens, groups, d) for _ in range(3))
    z = draw(2, tokens, 3 * groups * d).chunk(3, -1)[1].unflatten(-1, (groups, d))
    tensors = (x, other, z, draw(groups, d))
    options = (1e-5, 0.5, gate_last)
    y = triton_gate.gated_rms_norm(*tensors, *options, target=target)
    gradients = triton_gate.gated_rms_norm_backward(dy, *tensors, *options, target=target)
    exact = [t.double().requires_grad_() for t in tensors]
    want = reference.gated_rms_norm(*exact, *options)
    wanted = torch.autograd.grad(want, [exact[0], *exact[2:]], dy.double())
    return _of_pass(dtype, y, want, ("dx", "dz", "dweight"), gradients, wanted)


def _of_pass(
    dtype: torch.dtype,
    y: Tensor,
    want: Tensor,
    names: tuple[str, ...],
    gradients: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
) -> list[Comparison]:
    tolerance = TOLERANCE[dtype]
    return [
        compare("y", y, want, tolerance),
        *(
            compare(name, got, exact, 2 * tolerance)
            for name, got, exact in zip(names, gradients, wanted, strict=True)
        ),
    ]
