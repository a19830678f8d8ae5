"""Tensors that stand for rows still to be computed, so that a stock forward runs in bands.

A UNet, ControlNet or VAE runs unchanged on `Rows`. Every operation on them (`rules.py`) makes a node
that knows how to compute a run of its rows from runs of its parents' rows. What has to be whole (the
input of a convolution, which other rows of the result need again; of a group norm) is computed band
by band into one tensor; everything between two such tensors is never longer than a band: normalised
inputs, concatenated skips, upsampled pictures, keys, values, hidden layers of feed-forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from linfusion.pipelines.store import Store, Whole

BAND_BYTES = 1 << 26  # of the widest tensor of a band

METADATA = frozenset(
    "shape dtype device ndim is_cuda is_meta is_sparse is_quantized is_nested layout requires_grad"
    " size dim numel nelement is_floating_point is_complex element_size __len__ grad_fn is_leaf"
    .split()
)

# Name of a torch function -> (func, *args, **kwargs) -> result, or NotImplemented.
RULES: dict[str, Callable[..., Any]] = {}

Memo = dict[tuple[int, int, int], Tensor]
Pull = Callable[["Node", int, int], Tensor]


class Engine:
    """What the nodes of one model call share.

    Args:
        store: where whole tensors are kept.
        band_bytes: bytes of the widest tensor between two whole ones.
        dry: build the graph and count memory and work, but compute nothing.

    Attributes:
        flops: of products and convolutions so far, those done twice counted twice.
        unbanded: names of the functions that had no rule and ran on whole tensors.
    """

    def __init__(self, store: Store, *, band_bytes: int = BAND_BYTES, dry: bool = False) -> None:
        self.store, self.band_bytes, self.dry = store, band_bytes, dry
        self.flops = 0
        self.unbanded: set[str] = set()

    def wrap(self, tensor: Tensor, axis: int = 2) -> Rows:
        """A picture [B, C, H, W], or its tokens with `axis` 1, as Rows."""
        return Rows(Node.leaf(self, self.store.keep(tensor, axis, 1)))

    def evaluate(self, nodes: Sequence[Node], start: int, stop: int) -> list[Tensor]:
        """The same rows of several nodes, what they share computed once."""
        memo: Memo = {}

        def pull(node: Node, start: int, stop: int) -> Tensor:
            key = (id(node), start, stop)
            if key not in memo:
                memo[key] = node.rows(start, stop, pull)
            return memo[key]

        return [pull(node, start, stop) for node in nodes]

    def bands(self, *nodes: Node) -> Iterator[tuple[int, int]]:
        """Runs of rows of which the widest tensor has about `band_bytes`; counts one pass."""
        lines = nodes[0].lines
        widest = 1
        for node in pending_ancestors(nodes):
            self.flops += node.flops
            widest = max(widest, node.nbytes // lines)
        rows = max(1, min(lines, self.band_bytes // widest))
        if not self.dry:
            count = -(-lines // rows)
            rows = -(-lines // count)  # bands of one size rather than a short last one
            for start in range(0, lines, rows):
                yield start, min(start + rows, lines)

    def realise(self, node: Node) -> None:
        """Compute a node whole, unless it is."""
        if node.value is not None:
            return
        value = self.store.new(node.shape, node.axis, node.line, node.dtype, node.device)
        for start, stop in self.bands(node):
            value.write(start, self.evaluate([node], start, stop)[0])
        node.become(value)

    def settle(self, node: Node) -> None:
        """Compute the work that `node` waits for, in the smallest tensors that carry it.

        A sum is kept rather than its terms; what a cheap function makes larger (a concatenation, an
        upsampling, a change of dtype) is kept from before it. What can be kept nowhere stays as it
        is: its rows are then computed again wherever they are wanted.
        """
        if not node.pending:
            return
        if node.expands:
            for parent in node.parents:
                self.settle(parent)
        elif self.store.fits(node.nbytes):
            self.realise(node)

    def settle_common(self, first: Sequence[Node], second: Sequence[Node]) -> None:
        """Settle what both groups wait for, when they are going to be computed in separate passes."""
        shared = {id(n) for n in pending_ancestors(first)}
        todo, seen = list(second), set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if id(node) in shared:
                self.settle(node)
            else:
                todo.extend(p for p in node.parents if p.pending)

    def whole(self, rows: Rows) -> Tensor:
        """A plain tensor with all rows; meta in a dry run."""
        self.realise(rows.node)
        assert rows.node.value is not None
        if self.dry and rows.node.value.tensor is None:
            return torch.empty(rows.node.shape, dtype=rows.node.dtype, device="meta")
        return rows.node.value.whole()


class Node:
    """A tensor of which any run of rows can be computed.

    Args:
        engine: of the model call.
        shape, dtype, device: of the whole tensor.
        axis: the axis that rows run along.
        line: entries of that axis in a row of the picture: 1 in [B, C, H, W], W in [B, N, C].
        parents: what it is computed from.
        compute: (start, stop, pull) -> those rows, where pull(parent, start, stop) gives a parent's.
        flops: of products, for the whole; 0 marks it cheap enough to be computed again.
        expands: whether it is larger than what it is made of, so that it is not worth keeping.
    """

    def __init__(
        self,
        engine: Engine,
        shape: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        axis: int,
        line: int,
        parents: Sequence[Node] = (),
        compute: Callable[[int, int, Pull], Tensor] | None = None,
        flops: int = 0,
        expands: bool = False,
    ) -> None:
        self.engine, self.shape, self.dtype, self.device = engine, tuple(shape), dtype, device
        self.axis, self.line = axis, line
        self.lines = self.shape[axis] // line
        self.parents, self.compute = tuple(parents), compute
        self.flops, self.expands = flops, expands
        self.value: Whole | None = None

    @classmethod
    def leaf(cls, engine: Engine, value: Whole) -> Node:
        node = cls(
            engine, value.shape, value.dtype, value.device, axis=value.axis, line=value.line
        )
        node.value = value
        return node

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def pending(self) -> bool:
        """Whether rows of it cost products or convolutions."""
        return self.value is None and (self.flops > 0 or any(p.pending for p in self.parents))

    def rows(self, start: int, stop: int, pull: Pull) -> Tensor:
        if self.value is not None:
            return self.value.rows(start, stop)
        assert self.compute is not None
        return self.compute(start, stop, pull)

    def become(self, value: Whole) -> None:
        """Hold what was computed, and let go of what it was computed from."""
        self.value, self.parents, self.compute = value, (), None


def pending_ancestors(nodes: Sequence[Node]) -> list[Node]:
    """`nodes` and what they are computed from, up to tensors that are there; each once."""
    found: dict[int, Node] = {}
    todo = [node for node in nodes if node.value is None]
    while todo:
        node = todo.pop()
        if id(node) not in found:
            found[id(node)] = node
            todo.extend(p for p in node.parents if p.value is None)
    return list(found.values())


class Rows(torch.Tensor):
    """A node in the place of a tensor; see the module."""

    node: Node

    @staticmethod
    def __new__(cls, node: Node) -> Rows:
        rows = torch.Tensor._make_wrapper_subclass(
            cls, node.shape, dtype=node.dtype, device=node.device
        )
        rows.node = node
        return rows

    def __init__(self, node: Node) -> None: ...

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # a property such as x.shape
            name = func.__self__.__name__
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = RULES.get(name)
        result = NotImplemented if rule is None else rule(func, *args, **kwargs)
        return _on_whole(func, name, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise NotImplementedError(f"{func}: reached rows that are still to be computed")

    def __repr__(self, **_: Any) -> str:
        state = "pending" if self.node.pending else "ready"
        return f"Rows({list(self.node.shape)}, {self.node.dtype}, {state})"


def map_rows(
    func: Callable[..., Tensor],
    args: tuple,
    kwargs: dict[str, Any] | None = None,
    *,
    axis: int | None = None,
    line: int | None = None,
    broadcast: bool = False,
    flops: Callable[[tuple[int, ...]], int] | int = 0,
    expands: bool = False,
) -> Rows:
    """A node whose rows are `func` of the same rows of its Rows arguments.

    Args:
        func: is also run on meta tensors, for shape and dtype.
        args, kwargs: of `func`; Rows may stand anywhere in them.
        axis, line: of the result, where they differ from those of the first Rows.
        broadcast: plain tensors as long as the rows are cut to the band as well.
        flops: of the whole result, or a function of its shape.
        expands: see `Node`.
    """
    flat, tree = tree_flatten((args, kwargs or {}))
    places = [i for i, a in enumerate(flat) if isinstance(a, Rows)]
    parents = [flat[i].node for i in places]
    first = parents[0]
    metas = [_meta(a) if isinstance(a, Tensor) else a for a in flat]
    meta_args, meta_kwargs = tree_unflatten(metas, tree)
    like = func(*meta_args, **meta_kwargs)
    axis = first.axis + like.ndim - len(first.shape) if axis is None else axis
    line = first.line if line is None else line
    cut = []
    if broadcast:
        for i, a in enumerate(flat):
            if isinstance(a, Tensor) and i not in places:
                dim = axis - like.ndim + a.ndim
                if dim >= 0 and a.shape[dim] > 1:
                    cut.append((i, dim))
    template = [None if isinstance(a, Rows) else a for a in flat]

    def compute(start: int, stop: int, pull: Pull) -> Tensor:
        values = list(template)
        for i, parent in zip(places, parents, strict=True):
            values[i] = pull(parent, start, stop)
        for i, dim in cut:
            values[i] = values[i].narrow(dim, start * line, (stop - start) * line)
        band_args, band_kwargs = tree_unflatten(values, tree)
        return func(*band_args, **band_kwargs)

    shape = tuple(like.shape)
    work = flops(shape) if callable(flops) else flops
    node = Node(
        first.engine,
        shape,
        like.dtype,
        first.device,
        axis=axis,
        line=line,
        parents=parents,
        compute=compute,
        flops=work,
        expands=expands,
    )
    return Rows(node)


def _meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Rows):
        return torch.empty(tensor.node.shape, dtype=tensor.node.dtype, device="meta")
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
    )


def _on_whole(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run what has no rule on whole tensors: right, but not bounded."""
    if name.endswith("_") and not name.endswith("__"):
        raise NotImplementedError(f"{name}: rows that are still to be computed cannot be written to")
    flat, tree = tree_flatten((args, kwargs))
    for i, a in enumerate(flat):
        if isinstance(a, Rows):
            a.node.engine.unbanded.add(name)
            flat[i] = a.node.engine.whole(a)
    args, kwargs = tree_unflatten(flat, tree)
    return func(*args, **kwargs)
