"""Computing a band: which rows that takes of which node, and each node once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from linfusion.bands.rows import Node


def consumers_first(nodes: Sequence[Node]) -> list[Node]:
    """`nodes` and all they are computed from, each once and after all that read it."""
    order: list[Node] = []
    seen: set[int] = set()
    todo: list[tuple[Node, bool]] = [(node, False) for node in nodes]
    while todo:
        node, left = todo.pop()
        if left:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            todo.append((node, True))
            todo.extend((parent, False) for parent in node.parents)
    return order[::-1]


def rows_taken(
    nodes: Sequence[Node], order: Sequence[Node], start: int, stop: int
) -> dict[int, tuple[int, int]]:
    """The rows of everything in `order`, by id, that rows start to stop of `nodes` take."""
    wanted = {id(node): (start, stop) for node in nodes}
    for node in order:
        low, high = wanted[id(node)] if node.needs is None else node.needs(*wanted[id(node)])
        for parent in node.parents:
            a, b = wanted.get(id(parent), (low, high))
            wanted[id(parent)] = min(a, low), max(b, high)
    return wanted


def evaluate(nodes: Sequence[Node], order: Sequence[Node], start: int, stop: int) -> list[Tensor]:
    """Rows start to stop of `nodes`: first what that takes of each node, then each of them once."""
    wanted = rows_taken(nodes, order, start, stop)
    readers = {id(node): 1 for node in nodes}  # what is asked for stays
    for parent in (p for node in order for p in node.parents):
        readers[id(parent)] = readers.get(id(parent), 0) + 1
    found: dict[int, Tensor] = {}
    for node in reversed(order):
        low, high = wanted[id(node)]
        if node.value is not None:
            found[id(node)] = node.value.rows(low, high)
            continue
        assert node.compute is not None
        a, b = (low, high) if node.needs is None else node.needs(low, high)
        bands = []
        for parent in node.parents:
            first = wanted[id(parent)][0]
            band = found[id(parent)]
            offset, size = (a - first) * parent.line, (b - a) * parent.line
            bands.append(band.narrow(parent.axis, offset, size))
            readers[id(parent)] -= 1
            if not readers[id(parent)]:
                del found[id(parent)]
        found[id(node)] = node.compute(low, high, bands)
    return [
        found[id(n)].narrow(n.axis, (start - wanted[id(n)][0]) * n.line, (stop - start) * n.line)
        for n in nodes
    ]
