"""Tensors that stand for rows still to be computed, so that a stock forward runs in bands.

A UNet, ControlNet or VAE runs unchanged on `Rows`. Every operation on them (`rules.py`) makes a
node that knows how to compute a run of its rows from runs of its parents' rows. What has to be
whole (the input of a convolution, which other rows of the result need again; of a group norm) is
computed band by band into one tensor; everything between two such tensors is never longer than a
band: normalised inputs, concatenated skips, upsampled pictures, keys, values, hidden layers of
feed-forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from linfusion.bands.evaluate import consumers_first, evaluate
from linfusion.bands.hollow import hollow, like_of
from linfusion.bands.store import Store, Whole

BAND_BYTES = 1 << 25  # of the widest tensor of a band

# fmt: off
METADATA = frozenset([
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
    "is_meta", "is_sparse", "is_quantized", "is_nested", "size", "dim", "numel", "nelement",
    "element_size", "is_floating_point", "is_complex", "__len__",
])
# fmt: on

# Name of a torch function -> (func, *args, **kwargs) -> result, or NotImplemented.
RULES: dict[str, Callable[..., Any]] = {}


class Engine:
    """What the nodes of one model call share.

    Args:
        store: where whole tensors are kept.
        band_bytes: bytes of the widest tensor between two whole ones.
        dry: build the graph and count memory and work, but compute nothing.
        share: of the rows, where several processes have some each (`linfusion.parallel`).

    Attributes:
        flops: of products and convolutions so far, those done twice counted twice; of all rows.
        widest: bytes of the largest tensor that was only there in bands.
        unbanded: names of the functions that had no rule and ran on whole tensors.
    """

    def __init__(
        self,
        store: Store,
        *,
        band_bytes: int = BAND_BYTES,
        dry: bool = False,
        share: Any = None,
    ) -> None:
        self.store, self.band_bytes, self.dry, self.share = store, band_bytes, dry, share
        self.flops = self.widest = 0
        self.unbanded: set[str] = set()

    def wrap(self, tensor: Tensor, axis: int = 2) -> Rows:
        """A picture [B, C, H, W], or its tokens with `axis` 1, as Rows."""
        return Rows(Node.leaf(self, self.store.keep(tensor, axis, 1)))

    def passes(self, *nodes: Node) -> Iterator[tuple[int, int, list[Tensor]]]:
        """The rows of `nodes`, all alike, in bands: (start, stop, a tensor of each).

        In a band the widest tensor has about `band_bytes`, and what several nodes need is computed
        once. A dry run counts the work and yields nothing. Of rows that are shared, these are the
        own ones.
        """
        order = consumers_first(nodes)
        lines = nodes[0].lines
        widest = 1
        for node in order:
            if node.value is None:
                self.flops += node.flops
                widest = max(widest, node.nbytes // lines)
                self.widest = max(self.widest, node.nbytes)
        if self.dry:
            return
        first, end = (0, lines) if self.share is None else self.share.own(lines)
        if self.share is not None:
            self.share.fetch(nodes, order)
        if first == end:
            return
        rows = max(1, min(end - first, self.band_bytes // widest))
        # Bands of one size rather than a short last one.
        rows = -(-(end - first) // -(-(end - first) // rows))
        for start in range(first, end, rows):
            stop = min(start + rows, end)
            yield start, stop, evaluate(nodes, order, start, stop)

    def realise(self, node: Node) -> None:
        """Compute a node whole, unless it is."""
        if node.value is not None:
            return
        new = self.store.new if self.share is None else functools.partial(self.share.new, self)
        value = new(node.shape, node.axis, node.line, node.dtype, node.device)
        for start, _, (band,) in self.passes(node):
            value.write(start, band)
        node.become(value)

    def settle(self, node: Node) -> None:
        """Compute the work that `node` waits for, in the smallest tensors that carry it.

        A sum is kept rather than its terms; what a cheap function made of one tensor, larger or
        not, is kept from before it. What can be kept nowhere stays as it is: its rows are then
        computed again wherever they are wanted.
        """
        if not node.pending or node.passed_over:
            return
        if node.expands or (not node.flops and len(node.parents) == 1):
            for parent in node.parents:
                self.settle(parent)
        elif self.store.fits(node.nbytes):
            self.realise(node)
        else:
            node.passed_over = True

    def settle_common(self, first: Sequence[Node], second: Sequence[Node]) -> None:
        """Settle what both groups wait for, when they will be computed in separate passes."""
        shared = {id(n) for n in consumers_first(first) if n.value is None}
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
        compute: (start, stop, the parents' rows) -> those rows.
        needs: (start, stop) -> the rows that takes of every parent; None for the same.
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
        compute: Callable[[int, int, list[Tensor]], Tensor] | None = None,
        needs: Callable[[int, int], tuple[int, int]] | None = None,
        flops: int = 0,
        expands: bool = False,
    ) -> None:
        self.engine, self.shape, self.dtype, self.device = engine, tuple(shape), dtype, device
        self.axis, self.line = axis, line
        self.lines = self.shape[axis] // line
        self.parents, self.compute, self.needs = tuple(parents), compute, needs
        self.flops, self.expands = flops, expands
        self.value: Whole | None = None
        self.passed_over = False  # asked about, and not kept
        self.run: tuple[Node, int, int] | None = None  # the one this is a run of, where it is
        self.view = False  # whether it is its parent with the axes in another order

    @classmethod
    def leaf(cls, engine: Engine, value: Whole) -> Node:
        node = cls(engine, value.shape, value.dtype, value.device, axis=value.axis, line=value.line)
        node.value = value
        return node

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def pending(self) -> bool:
        """Whether rows of it cost products or convolutions."""
        return self.value is None and (self.flops > 0 or any(p.pending for p in self.parents))

    def become(self, value: Whole) -> None:
        """Hold what was computed, and let go of what it was computed from."""
        self.value, self.parents, self.compute = value, (), None


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
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Not a stub: `__torch_function__` serves every call, and there is no data below it.
        raise NotImplementedError(f"{func}: reached rows that are still to be computed")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
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
    like = like_of(func, flat, tree, _meta)
    axis = first.axis + len(like.shape) - len(first.shape) if axis is None else axis
    line = first.line if line is None else line
    cut = []
    if broadcast:
        for i, a in enumerate(flat):
            if isinstance(a, Tensor) and i not in places:
                dim = axis - len(like.shape) + a.ndim
                if dim >= 0 and a.shape[dim] > 1:
                    cut.append((i, dim))
    template = [None if isinstance(a, Rows) else a for a in flat]

    def compute(start: int, stop: int, bands: list[Tensor]) -> Tensor:
        values: list[Any] = list(template)
        for i, band in zip(places, bands, strict=True):
            values[i] = band
        for i, dim in cut:
            values[i] = values[i].narrow(dim, start * line, (stop - start) * line)
        band_args, band_kwargs = tree_unflatten(values, tree)
        return func(*band_args, **band_kwargs)

    work = flops(like.shape) if callable(flops) else flops
    node = Node(
        first.engine,
        like.shape,
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
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_whole(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run what has no rule on whole tensors: right, but not bounded."""
    if name.endswith("_") and not name.endswith("__"):
        raise NotImplementedError(
            f"{name}: rows that are still to be computed cannot be written to"
        )
    flat, tree = tree_flatten((args, kwargs))
    given = [a.node for a in flat if isinstance(a, Rows)]
    engine = given[0].engine
    engine.unbanded.add(name)
    flat = [engine.whole(a) if isinstance(a, Rows) else a for a in flat]
    if engine.dry:
        flat = [_meta(a) if isinstance(a, Tensor) else a for a in flat]
    args, kwargs = tree_unflatten(flat, tree)
    made = func(*args, **kwargs)
    return tree_map(functools.partial(_without_values, given[0]), made) if engine.dry else made


def _without_values(node: Node, made: Any) -> Any:
    """What a dry run goes on with: Rows where the shape is that of `node`, else zeros."""
    if not isinstance(made, Tensor):
        return made
    zeros = hollow(made.shape, made.dtype, node.device)
    if made.shape != torch.Size(node.shape):
        return zeros
    return Rows(Node.leaf(node.engine, node.engine.store.adopt(zeros, node.axis, node.line)))
