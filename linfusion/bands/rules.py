"""What each torch function does to `Rows`: which rows of its input a run of its output needs.

Imported for its effect: it fills `rows.RULES`. A function that is not here, or whose rule returns
NotImplemented, runs on whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linfusion.bands.attention_rules
import linfusion.bands.norm_rules  # noqa: F401
from linfusion.bands.rows import RULES, Node, Rows, map_rows
from linfusion.bands.token_rules import cat_tokens, split_tokens

# fmt: off
POINTWISE = [
    "add", "sub", "rsub", "mul", "div", "true_divide", "neg", "abs", "exp", "pow", "square", "sqrt",
    "rsqrt", "clamp", "clip", "sigmoid", "tanh", "relu", "silu", "gelu", "leaky_relu", "softplus",
    "mish", "hardswish", "elu", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__",
    "__truediv__", "__neg__", "__pow__",
]
# fmt: on
CASTS = ["to", "type", "float", "half", "bfloat16", "double", "type_as"]
AS_IT_IS = ["contiguous", "clone", "detach"]


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule(*POINTWISE)
def _pointwise(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    # A band may be a view of a whole tensor that others read.
    if kwargs.pop("inplace", False) or kwargs.pop("out", None) is not None:
        return NotImplemented
    given = [a.node for a in args if isinstance(a, Rows)]
    if any((n.axis - len(n.shape), n.line, n.lines) != _place(given[0]) for n in given):
        return NotImplemented
    return map_rows(func, args, kwargs, broadcast=True)


def _place(node: Node) -> tuple[int, int, int]:
    return node.axis - len(node.shape), node.line, node.lines


@rule(*CASTS)
def _cast(func: Callable[..., Tensor], x: Rows, *args: Any, **kwargs: Any) -> Any:
    like = func(torch.empty(0, dtype=x.node.dtype, device=x.node.device), *args, **kwargs)
    if like.device != x.node.device:
        return NotImplemented
    if like.dtype == x.node.dtype:
        return x
    dtype = like.dtype
    return map_rows(lambda t: t.to(dtype), (x,), expands=dtype.itemsize >= x.node.dtype.itemsize)


@rule(*AS_IT_IS)
def _as_it_is(func: Callable[..., Tensor], x: Rows, *args: Any, **kwargs: Any) -> Any:
    return x


@rule("dropout")
def _dropout(
    func: Any, x: Rows, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    return NotImplemented if training and p else x


# ---- shapes


@rule("permute")
def _permute(func: Any, x: Rows, *dims: Any) -> Any:
    ndim = len(x.node.shape)
    order = [d % ndim for d in _ints(dims)]
    moved = map_rows(lambda t: t.permute(order), (x,), axis=order.index(x.node.axis))
    moved.node.view = True
    return moved


@rule("transpose", "swapaxes")
def _transpose(func: Any, x: Rows, dim0: int, dim1: int) -> Any:
    order = list(range(len(x.node.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(func, x, order)


@rule("reshape", "view")
def _reshape(func: Any, x: Rows, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return NotImplemented
    node = x.node
    new = _ints(shape)
    if -1 in new:
        rest = math.prod(n for n in new if n != -1)
        new[new.index(-1)] = math.prod(node.shape) // rest
    # The rows must stay blocks of the new axis: as much before it as there was.
    before, block = math.prod(node.shape[: node.axis]), math.prod(node.shape[node.axis + 1 :])
    for axis in range(len(new)):
        line, odd = divmod(node.line * block, math.prod(new[axis + 1 :]))
        if math.prod(new[:axis]) == before and not odd and line and new[axis] == line * node.lines:
            break
    else:
        return NotImplemented

    def reshape(t: Tensor) -> Tensor:
        target = list(new)
        target[axis] = t.numel() // math.prod(n for i, n in enumerate(new) if i != axis)
        return t.reshape(target)

    return map_rows(reshape, (x,), axis=axis, line=line)


@rule("flatten")
def _flatten(func: Any, x: Rows, start_dim: int = 0, end_dim: int = -1) -> Any:
    shape = list(x.node.shape)
    start, end = start_dim % len(shape), end_dim % len(shape)
    return _reshape(func, x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


@rule("unflatten")
def _unflatten(func: Any, x: Rows, dim: int, sizes: Sequence[int]) -> Any:
    shape, sizes = list(x.node.shape), list(sizes)
    dim %= len(shape)
    if -1 in sizes:
        rest = math.prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = shape[dim] // rest
    return _reshape(func, x, [*shape[:dim], *sizes, *shape[dim + 1 :]])


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def _split(func: Any, x: Rows, parts: Any, dim: int = 0) -> Any:
    dim %= len(x.node.shape)
    if dim == x.node.axis:
        return split_tokens(x, parts) if x.node.line == 1 else NotImplemented
    pieces = func(torch.empty(x.node.shape, device="meta"), parts, dim)
    out, start = [], 0
    for size in (p.shape[dim] for p in pieces):
        out.append(map_rows(_narrow(dim, start, size), (x,)))
        start += size
    return tuple(out)


def _narrow(dim: int, start: int, size: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.narrow(dim, start, size)


@rule("cat", "concat", "concatenate")
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    node = next(t.node for t in tensors if isinstance(t, Rows))
    dim %= len(node.shape)
    if dim == node.axis:
        return cat_tokens(tensors) if node.line == 1 else NotImplemented
    whole = [
        t if isinstance(t, Rows) else Rows(Node.leaf(e, e.store.keep(t, node.axis, node.line)))
        for e in [node.engine]
        for t in tensors
    ]
    if any(_place(t.node) != _place(node) for t in whole):
        return NotImplemented
    return map_rows(lambda *parts: torch.cat(parts, dim), tuple(whole), expands=True)


# ---- layers


@rule("linear")
def _linear(func: Any, x: Rows, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(weight, Rows) or x.node.axis == len(x.node.shape) - 1:
        return NotImplemented
    width = weight.shape[1]
    return map_rows(F.linear, (x, weight, bias), flops=lambda out: 2 * width * math.prod(out))


@rule("conv2d")
def _conv2d(
    func: Any,
    x: Rows,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    node = x.node
    if not _is_picture(node) or isinstance(weight, Rows) or isinstance(padding, str):
        return NotImplemented
    (sy, sx), (py, px), (dy, dx) = (_pair(v) for v in (stride, padding, dilation))
    (height, width), kernel = node.shape[2:], weight.shape[2:]
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), (py, px), (dy, dx), kernel, (sy, sx), strict=True)
    ]
    reach = dy * (kernel[0] - 1)
    if reach:
        node.engine.settle(node)

    def read(start: int, stop: int) -> tuple[int, int]:
        return start * sy - py, (stop - 1) * sy - py + reach + 1

    def compute(start: int, stop: int, bands: list[Tensor]) -> Tensor:
        band = _padded(bands[0], node, *read(start, stop))
        # Not conv2d: a function mode that changes those has changed this one already.
        return torch.convolution(
            band, weight, bias, (sy, sx), (0, px), (dy, dx), False, (0, 0), groups
        )

    shape = (node.shape[0], weight.shape[0], *out)

    def needs(start: int, stop: int) -> tuple[int, int]:
        return _inside(node, *read(start, stop))

    work = 2 * math.prod(shape) * math.prod(weight.shape[1:])
    return _picture(node, shape, compute, needs, flops=work)


@rule("pad")
def _pad(func: Any, x: Rows, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    node = x.node
    if not _is_picture(node) or len(pad) != 4 or mode != "constant" or value or min(pad) < 0:
        return NotImplemented
    left, right, top, bottom = pad
    batch, channels, height, width = node.shape

    def compute(start: int, stop: int, bands: list[Tensor]) -> Tensor:
        return F.pad(_padded(bands[0], node, start - top, stop - top), (left, right))

    def needs(start: int, stop: int) -> tuple[int, int]:
        return _inside(node, start - top, stop - top)

    shape = (batch, channels, height + top + bottom, width + left + right)
    return _picture(node, shape, compute, needs, expands=True)


def _inside(node: Node, start: int, stop: int) -> tuple[int, int]:
    """Those of the rows start to stop that a picture has; at least one of its rows."""
    low = min(max(start, 0), node.lines - 1)
    return low, max(low + 1, min(stop, node.lines))


def _padded(band: Tensor, node: Node, start: int, stop: int) -> Tensor:
    """Rows start to stop of a picture, zeros where they lie outside it, from those inside."""
    low, high = max(start, 0), min(stop, node.lines)
    if low >= high:
        return band.new_zeros(*band.shape[:2], stop - start, band.shape[3])
    return F.pad(band, (0, 0, low - start, stop - high)) if high - low < stop - start else band


@rule("interpolate")
def _interpolate(
    func: Any,
    x: Rows,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Any:
    node = x.node
    if not _is_picture(node) or mode != "nearest":
        return NotImplemented
    meta = torch.empty(node.shape, device="meta")
    shape = tuple(F.interpolate(meta, size=size, scale_factor=scale_factor).shape)
    scales = (None, None) if scale_factor is None else _pair(scale_factor)
    ys, xs = (_nearest(n, m, s) for n, m, s in zip(node.shape[2:], shape[2:], scales, strict=True))
    rows = ys.tolist()  # asked for every band: never a device's
    columns = xs.to(node.device)

    def read(start: int, stop: int) -> tuple[int, int]:
        return rows[start], rows[stop - 1] + 1

    def compute(start: int, stop: int, bands: list[Tensor]) -> Tensor:
        (band,), low = bands, rows[start]
        if shape[2:] == (2 * node.shape[2], 2 * node.shape[3]):
            twice = F.interpolate(band, scale_factor=2.0)
            return twice.narrow(2, start - 2 * low, stop - start)
        lines = (ys[start:stop] - low).to(band.device)
        return band.index_select(2, lines).index_select(3, columns)

    return _picture(node, shape, compute, read, expands=True)


def _nearest(size: int, out: int, scale: float | None) -> Tensor:
    """Which entry each of `out` entries is, in float32 as torch computes it; on the CPU."""
    ratio = torch.tensor(size / out if scale is None else 1 / scale, dtype=torch.float32)
    index = (torch.arange(out, dtype=torch.float32) * ratio).long()
    return index.clamp(max=size - 1)


def _picture(
    node: Node,
    shape: tuple[int, ...],
    compute: Callable[[int, int, list[Tensor]], Tensor],
    needs: Callable[[int, int], tuple[int, int]],
    **more: Any,
) -> Rows:
    """A picture computed from another one, whose rows are not those of the same place."""
    made = Node(
        node.engine, shape, node.dtype, node.device, axis=2, line=1,
        parents=(node,), compute=compute, needs=needs, **more,
    )  # fmt: skip
    return Rows(made)


def _is_picture(node: Node) -> bool:
    return len(node.shape) == 4 and node.axis == 2 and node.line == 1


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


def _ints(values: Sequence[Any]) -> list[int]:
    return [int(v) for v in (values[0] if isinstance(values[0], Sequence) else values)]
