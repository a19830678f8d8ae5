"""What torch functions of joint transformers do to `Rows` that stand for tokens, [B, N, ...].

There a row is a token: text and image are joined to one sequence and taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linfusion.bands.hollow import hollow
from linfusion.bands.rows import RULES, Node, Rows, map_rows


def cat_tokens(tensors: Sequence[Tensor]) -> Rows:
    """Sequences one after the other; the longest of them stays to be computed."""
    main = max((t for t in tensors if isinstance(t, Rows)), key=lambda t: t.node.lines)
    node, axis = main.node, main.node.axis
    at = next(i for i, t in enumerate(tensors) if t is main)
    # Of the others, which are text, whole tensors; the Rows are held for as long as these.
    parts = [t if t is main else whole(t) for t in tensors]
    kept = [t for t in tensors if t is not main]
    offset = sum(p.shape[axis] for p in parts[:at])
    shape = list(node.shape)
    shape[axis] = sum(p.shape[axis] for p in parts)

    def needs(start: int, stop: int) -> tuple[int, int]:
        return _inside(node, start - offset, stop - offset)

    def compute(start: int, stop: int, bands: list[Tensor], _kept: Any = kept) -> Tensor:
        found, begin = [], 0
        for i, part in enumerate(parts):
            low, high = max(start - begin, 0), min(stop - begin, part.shape[axis])
            if low < high and i == at:
                found.append(bands[0].narrow(axis, low - needs(start, stop)[0], high - low))
            elif low < high:
                found.append(part.narrow(axis, low, high - low))
            begin += part.shape[axis]
        return found[0] if len(found) == 1 else torch.cat(found, axis)

    return _tokens(node, shape, compute, needs, expands=True)


def split_tokens(x: Rows, sizes: Any) -> Any:
    """Runs of a sequence."""
    lines = x.node.lines
    if isinstance(sizes, int):
        return NotImplemented
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if sum(sizes) != lines:
        return NotImplemented
    return tuple(_run(x, s, s + n) for s, n in zip(starts, sizes, strict=True))


def held(rows: Rows) -> Tensor:
    """The tokens of `rows` whole, computed if need be.

    Where they are a run of others, those are computed, as the rest of them will be wanted too, and
    this is a view.
    """
    node, engine, run = rows.node, rows.node.engine, rows.node.run
    if node.view and node.value is None and node.parents[0].value is not None:
        assert node.compute is not None
        return node.compute(0, node.lines, [engine.whole(Rows(node.parents[0]))])
    if run is None or node.value is not None:
        return engine.whole(rows)
    parent, start, stop = run
    engine.realise(parent)
    return engine.whole(Rows(parent)).narrow(node.axis, start, stop - start)


def whole(value: Tensor) -> Tensor:
    """`held`, of a tensor that may be plain."""
    return held(value) if isinstance(value, Rows) else value


def _run(x: Rows, start: int, stop: int) -> Rows:
    node = x.node
    shape = list(node.shape)
    shape[node.axis] = stop - start

    def needs(low: int, high: int) -> tuple[int, int]:
        return low + start, high + start

    made = _tokens(node, shape, lambda low, high, bands: bands[0], needs)
    made.node.run = (node, start, stop)
    return made


def _tokens(
    node: Node,
    shape: Sequence[int],
    compute: Callable[..., Tensor],
    needs: Callable[[int, int], tuple[int, int]],
    **more: Any,
) -> Rows:
    made = Node(
        node.engine, shape, node.dtype, node.device, axis=node.axis, line=1,
        parents=(node,), compute=compute, needs=needs, **more,
    )  # fmt: skip
    return Rows(made)


def _inside(node: Node, start: int, stop: int) -> tuple[int, int]:
    """Those of the tokens start to stop that there are; at least one."""
    low = min(max(start, 0), node.lines - 1)
    return low, max(low + 1, min(stop, node.lines))


def _getitem(func: Any, x: Rows, index: Any) -> Any:
    """A run of tokens, or a part of the batch or of the channels."""
    node = x.node
    places = index if isinstance(index, tuple) else (index,)
    full = slice(None)
    slices = all(isinstance(p, slice) for p in places) and len(places) <= len(node.shape)
    if slices and (len(places) <= node.axis or places[node.axis] == full):
        return map_rows(lambda t: t[places], (x,), axis=node.axis)
    if node.line != 1 or len(places) != node.axis + 1 or any(p != full for p in places[:-1]):
        return NotImplemented
    if not isinstance(places[-1], slice) or places[-1].step not in (None, 1):
        return NotImplemented
    start, stop, _ = places[-1].indices(node.lines)
    if (start, stop) == (0, node.lines):
        return x
    if stop <= start:
        shape = [*node.shape[: node.axis], 0, *node.shape[node.axis + 1 :]]
        return torch.empty(shape, dtype=node.dtype, device=node.device)
    return _run(x, start, stop)


def _unbind(func: Any, x: Rows, dim: int = 0) -> Any:
    dim %= len(x.node.shape)
    if dim <= x.node.axis:
        return NotImplemented
    size = x.node.shape[dim]
    axis = x.node.axis
    return tuple(map_rows(_selected(dim, i), (x,), axis=axis) for i in range(size))


def _selected(dim: int, index: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.select(dim, index)


def _stack(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    rows = [t for t in tensors if isinstance(t, Rows)]
    axis = rows[0].node.axis
    dim %= len(rows[0].shape) + 1
    alike = all(t.node.axis == axis and t.shape == rows[0].shape for t in rows)
    if len(rows) != len(tensors) or dim <= axis or not alike:
        return NotImplemented
    return map_rows(lambda *parts: torch.stack(parts, dim), tuple(tensors), axis=axis)


def _mean(func: Any, x: Rows, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    ndim = len(x.node.shape)
    dims = [d % ndim for d in ([dim] if isinstance(dim, int) else dim or range(ndim))]
    if min(dims) <= x.node.axis:
        return NotImplemented
    return map_rows(lambda t: t.mean(dims, keepdim=keepdim, **options), (x,), axis=x.node.axis)


def _index_select(func: Any, x: Rows, dim: int, index: Tensor) -> Any:
    """Tokens in another order: whole, and counted."""
    if dim % len(x.node.shape) != x.node.axis or x.node.line != 1:
        return NotImplemented
    source, engine = held(x), x.node.engine
    if engine.dry:
        shape = [len(index) if i == x.node.axis else n for i, n in enumerate(source.shape)]
        moved = hollow(shape, source.dtype, x.node.device)
    else:
        moved = source.index_select(dim, index)
    return Rows(Node.leaf(engine, engine.store.adopt(moved, x.node.axis, 1)))


RULES.update(
    {
        "__getitem__": _getitem,
        "unbind": _unbind,
        "stack": _stack,
        "mean": _mean,
        "index_select": _index_select,
    }
)
