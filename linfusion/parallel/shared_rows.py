"""The engine of `linfusion.bands` with rows shared among ranks: bands in time, shards in space.

A node still stands for all rows of a tensor. Of one that is computed whole, each rank computes and
keeps its own rows; what a pass reads beyond them is fetched first, once, from whichever rank has
them. Which rows those are follows from the graph, which is the same on all ranks, so sizes are
never exchanged, and any cut of the rows gives the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from linfusion.bands.evaluate import rows_taken
from linfusion.bands.rows import Engine, Node
from linfusion.bands.store import Whole
from linfusion.parallel.ranks import Ranks, Run


class Share:
    """Which rows are whose, at every level of a model.

    Args:
        ranks: that share the rows.
        cuts: of the picture that the model is called with: where each rank's rows begin, and the
            end. Levels of other heights are cut in proportion.
    """

    def __init__(self, ranks: Ranks, cuts: Sequence[int]) -> None:
        self.ranks, self.cuts = ranks, tuple(cuts)

    def at(self, lines: int) -> tuple[int, ...]:
        """Where each rank's rows begin in a tensor of so many."""
        return tuple(cut * lines // self.cuts[-1] for cut in self.cuts)

    def own(self, lines: int) -> Run:
        """First and end of this rank's rows."""
        cuts = self.at(lines)
        return cuts[self.ranks.rank], cuts[self.ranks.rank + 1]

    def new(
        self,
        engine: Engine,
        shape: tuple[int, ...],
        axis: int,
        line: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Part:
        """This rank's rows of an empty tensor of that shape."""
        cuts = self.at(shape[axis] // line)
        first, end = cuts[self.ranks.rank], cuts[self.ranks.rank + 1]
        # A dry run refuses what is too large for any rank: all have to come to one answer.
        rows = max(b - a for a, b in pairwise(cuts)) if engine.dry else end - first
        own = engine.store.new(
            (*shape[:axis], rows * line, *shape[axis + 1 :]), axis, line, dtype, device
        )
        return Part(own, shape, cuts, self.ranks)

    def fetch(self, nodes: Sequence[Node], order: Sequence[Node]) -> None:
        """Before a pass over `nodes`: the rows of others that it reads."""
        parts = [node for node in order if isinstance(node.value, Part)]
        if not parts or self.ranks.world == 1:
            return
        taken = [rows_taken(nodes, order, *run) for run in pairwise(self.at(nodes[0].lines))]
        for node in parts:
            assert isinstance(node.value, Part)
            node.value.fetch([wanted[id(node)] for wanted in taken])


class Part(Whole):
    """This rank's rows of a whole tensor, and those of others that were fetched.

    Args:
        own: the rows of this rank.
        shape: of the whole.
        cuts: where each rank's rows begin, and the end.
        ranks: that have the others.
    """

    def __init__(
        self, own: Whole, shape: tuple[int, ...], cuts: tuple[int, ...], ranks: Ranks
    ) -> None:
        super().__init__(own.store, shape, own.axis, own.line, own.dtype, own.device)
        self.own, self.cuts, self.ranks = own, cuts, ranks
        self.first = cuts[ranks.rank]
        self.held = list(pairwise(cuts))  # by every rank
        self.above: Tensor | None = None  # of the own rows, and below them
        self.below: Tensor | None = None

    def fetch(self, wanted: Sequence[Run]) -> None:
        """Hold the rows that every rank wants, where one of them does not yet."""
        hull = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(wanted, self.held, strict=True)]
        if hull == self.held:
            return
        above, below = self.ranks.beyond(self._moved, self.cuts, hull)
        self.above, self.below = (self._back(rows) for rows in (above, below))
        self.held = hull

    def rows(self, start: int, stop: int) -> Tensor:
        """Lines start to stop of the whole, held by this rank; a view where they are its own."""
        first, end = self.first, self.cuts[self.ranks.rank + 1]
        pieces = []
        if start < first and self.above is not None:
            pieces.append(self._of(self.above, self.held[self.ranks.rank][0], start, stop))
        if start < end and stop > first:
            pieces.append(self.own.rows(max(start, first) - first, min(stop, end) - first))
        if stop > end and self.below is not None:
            pieces.append(self._of(self.below, end, start, stop))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)

    def write(self, start: int, values: Tensor) -> None:
        """Set own lines, from `start` of the whole on."""
        self.own.write(start - self.first, values)

    def whole(self) -> Tensor:
        """All of it, gathered from all ranks."""
        if self.own.tensor is None and self.store.dry:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        cuts = [cut * self.line for cut in self.cuts]
        return self.ranks.join(self.own.whole(), self.axis, cuts)

    def _moved(self, start: int, stop: int) -> Tensor:
        """Own lines in front: [lines, line, ...]."""
        rows = self.own.rows(start - self.first, stop - self.first).movedim(self.axis, 0)
        return rows.unflatten(0, (stop - start, self.line))

    def _back(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1).movedim(0, self.axis)

    def _of(self, rows: Tensor, first: int, start: int, stop: int) -> Tensor:
        """What `rows`, lines from `first` on, have of lines start to stop."""
        low = max(start - first, 0) * self.line
        high = min((stop - first) * self.line, rows.shape[self.axis])
        return rows.narrow(self.axis, low, high - low)
