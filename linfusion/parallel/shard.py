"""One picture's or video's tokens over ranks: what attention does that needs those of others.

Processors find a `Shard` in the grid that comes with their arguments and let it do what is beyond
this rank's tokens. Every rank has whole rows (of every frame, in a video); text is on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from linfusion.attention.grids.local import LocalGrid
from linfusion.attention.mate.layer import LayerState
from linfusion.attention.mate.scan_orders import flatten, unflatten
from linfusion.kernels import linear_read, linear_state, window_attention
from linfusion.parallel.ranks import Ranks, Run
from linfusion.parallel.routes import carry, carry_back, route
from linfusion.parallel.scan import bidirectional

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shard:
    """Which rows of a grid this rank has.

    Attributes:
        ranks: that have the others.
        grid: (h, w) or (t, h, w) of the whole.
        cuts: where each rank's rows begin, and the end.
        review_rows: rows that a video's review tokens are pooled of, where a state has some.
    """

    ranks: Ranks
    grid: tuple[int, ...]
    cuts: tuple[int, ...]
    review_rows: int = 1

    @property
    def tokens(self) -> int:
        """Of the whole."""
        return int(torch.Size(self.grid).numel())

    @property
    def axis(self) -> int:
        """Which of the grid is that of rows."""
        return len(self.grid) - 2

    @property
    def own(self) -> Run:
        """First and end of this rank's rows."""
        return self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1]

    @property
    def local(self) -> LocalGrid:
        """Grid of this rank's tokens."""
        return LocalGrid(self._with_rows(self.own), self)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of the whole along `dim`."""
        first, end = self.own
        parts = x.unflatten(dim, self.grid).narrow(dim + self.axis, first, end - first)
        return parts.flatten(dim, dim + len(self.grid) - 1)

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of all ranks along `dim`, what `take` undoes."""
        rows = x.unflatten(dim, self._with_rows(self.own))
        whole = self.ranks.join(rows, dim + self.axis, self.cuts)
        return whole.flatten(dim, dim + len(self.grid) - 1)

    def extend(self, x: Tensor, wanted: list[Run]) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens [B, N, ...] with rows of others: those that every rank wants.

        Returns:
            [B, N', ...] and the grid of these tokens.
        """
        rows = x.unflatten(1, self._with_rows(self.own))
        extended = self.ranks.fetch(rows, 1 + self.axis, self.cuts, wanted)
        grid = self._with_rows(wanted[self.ranks.rank])
        return extended.flatten(1, len(self.grid)), grid

    def crop(self, x: Tensor, had: Run) -> Tensor:
        """Own tokens of [B, N', ...] that has the rows `had`."""
        first, end = self.own
        rows = x.unflatten(1, self._with_rows(had))
        own = rows.narrow(1 + self.axis, first - had[0], end - first)
        return own.flatten(1, len(self.grid))

    def _with_rows(self, run: Run) -> tuple[int, ...]:
        return (*self.grid[: self.axis], run[1] - run[0], self.grid[-1])

    def take_state(self, layer: LayerState) -> LayerState:
        """This rank's rows of what a layer carries from block to block."""
        return self._each_row(layer, lambda x, cuts: _narrow(x, cuts, self.ranks.rank))

    def join_state(self, layer: LayerState) -> LayerState:
        """The rows of all ranks: the state that one process has."""
        return self._each_row(layer, lambda x, cuts: self.ranks.join(x, 2, cuts))

    def _each_row(
        self, layer: LayerState, change: Callable[[Tensor, tuple[int, ...]], Tensor]
    ) -> LayerState:
        """The halo and review tokens [B, F, H, W, C] changed; scans have one state for all rows."""
        pooled = tuple(-(-cut // self.review_rows) for cut in self.cuts)
        halo = None if layer.halo is None else change(layer.halo, self.cuts)
        review = None if layer.review is None else change(layer.review, pooled)
        return layer._replace(halo=halo, review=review)

    # ---- what processors ask for

    def mean(self, x: Tensor) -> Tensor:
        """Over the tokens of all ranks: [B, N, C] -> [B, 1, C]."""
        return self.ranks.gather(x.sum(1, keepdim=True)).sum(0) / self.tokens

    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        feature_map: str = "elu1",
        normalizer: str = "mean",
        eps: float = 1e-4,
    ) -> Tensor:
        """`linfusion.linear_attention` to the keys of all ranks: one gather of states."""
        state = self.ranks.merge_states(linear_state(k, v, feature_map=feature_map))
        out = linear_read(q, state, feature_map=feature_map, normalizer=normalizer, eps=eps)
        return out.to(v.dtype)

    def around(self, x: Tensor, reach: int, local: Callable[..., Tensor]) -> Tensor:
        """`local(tokens, grid)` of own tokens, which sees so many rows to either side.

        Args:
            x: own tokens [B, N, C].
            reach: rows.
            local: also run on the rows that were fetched, whose result is dropped.
        """
        wanted = self.ranks.reach(self.cuts, reach, reach)
        extended, grid = self.extend(x, wanted)
        return self.crop(local(extended, grid), wanted[self.ranks.rank])

    def window_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, radius: float, **options: Any
    ) -> Tensor:
        """`linfusion.window_attention` of own queries [B, N, H, D]; windows reach over the cuts.

        Keys and values of `ceil(radius) - 1` rows to either side are fetched in one exchange. The
        kernel takes as many queries as keys; those of the rows of others are zeros and are dropped.
        """
        reach = min(int(-(-radius // 1)) - 1, self.cuts[-1])
        wanted = self.ranks.reach(self.cuts, reach, reach)
        kv, grid = self.extend(torch.cat([k, v], -1), wanted)
        k, v = kv.split(k.shape[-1], -1)
        had, (first, end) = wanted[self.ranks.rank], self.own
        if had != (first, end):
            rows = q.unflatten(1, self._with_rows(self.own)).movedim(1 + self.axis, 0)
            above = rows.new_zeros(first - had[0], *rows.shape[1:])
            below = rows.new_zeros(had[1] - end, *rows.shape[1:])
            rows = torch.cat([above, rows, below]).movedim(0, 1 + self.axis)
            q = rows.flatten(1, len(self.grid))
        size: Any = grid
        out: Tensor = window_attention(q, k, v, grid=size, radius=radius, **options)
        return self.crop(out, had)

    def softmax(self, q: Tensor, context: Pair, own: Pair, scale: float | None = None) -> Tensor:
        """Softmax attention of queries that all ranks have, such as those of text.

        Each rank attends to its own tokens, the first also to what all have, and the parts are
        merged by their sums of exponentials.

        Args:
            q: [B, T, H, D].
            context: keys and values that all ranks have, [B, M, H, D].
            own: this rank's keys and values, [B, N, H, D].
            scale: of the scores; None is D^-½.
        """
        k, v = own
        if self.ranks.rank == 0:
            k, v = (torch.cat(pair, 1) for pair in zip(context, own, strict=True))
        parts = [softmax_parts(some, k, v, scale) for some in q.split(k.shape[1], 1)]
        out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return self.ranks.merge_softmax(out, lse).to(v.dtype)

    def coarser(self, factor: int) -> Shard:
        """Of the same picture with f by f tokens pooled to one; f divides the cuts."""
        grid = tuple(n // factor for n in self.grid)
        return Shard(self.ranks, grid, tuple(cut // factor for cut in self.cuts))

    def scan(
        self,
        layer: Any,
        video: Tensor,
        order: str,
        review: Tensor | None,
        review_rows: int,
        *,
        lead_first: bool,
        past: Any = None,
    ) -> tuple[Tensor, Any]:
        """A bidirectional Mamba-2 over the tokens of all ranks, in any order.

        Args:
            layer: the `BiMamba2`.
            video: own tokens [B, T, h, W, C].
            order: that they are scanned in, as for `RotaryMajorScan`.
            review: own review tokens [B, T', h', W', C], scanned first; or None.
            review_rows: rows that were pooled to one; it divides the cuts.
            lead_first: whether the backward direction reads the review tokens first, too.
            past: `Mamba2State` of the tokens before, the same on all ranks.

        Returns:
            [B, T, h, W, C], and the state after the last token of all, on all ranks.
        """
        sequence = flatten(video, order)
        grid: tuple[int, ...] | None = None
        cuts: tuple[int, ...] = ()
        if review is not None:
            cuts = tuple(-(-cut // review_rows) for cut in self.cuts)
            grid = (review.shape[1], cuts[-1], review.shape[3])
            sequence = torch.cat([flatten(review, order), sequence], 1)
        whole = (video.shape[1], *self.grid[1:])
        way = route(self.ranks, order, whole, self.cuts, grid, cuts, video.device)
        u = carry(self.ranks, way, sequence)
        y, state = bidirectional(self.ranks, layer, u, way.lengths, lead_first, past)
        frames, height, width = video.shape[1:4]
        y = carry_back(self.ranks, way, y)
        return unflatten(y, (frames, height, width), order), state

    def whole_windows(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, outside: int
    ) -> tuple[Tensor, Tensor, Tensor, int, Callable[[Tensor], Tensor]]:
        """Own rows with those of others that the same windows contain.

        Queries of others' rows are zeros; what comes of them is dropped.

        Args:
            q, k, v: [B, T, h, W, ...]; k and v may have more frames.
            window: rows of one.
            outside: rows of the first that lie before the grid.

        Returns:
            All three, how much of their first window lies before them, and what crops a result.
        """
        rows = self.cuts[-1]
        first = window - outside if outside else window

        def begins(row: int) -> int:
            return 0 if row < first else first + (row - first) // window * window

        def ends(row: int) -> int:  # of the window that the row before is in
            return min(first if row <= first else begins(row - 1) + window, rows)

        wanted = [(begins(a), ends(b)) for a, b in pairwise(self.cuts)]
        if rows <= window:  # one window is cut to the grid
            wanted = [(0, rows)] * self.ranks.world
        low, high = wanted[self.ranks.rank]
        start, end = self.own
        width = k.shape[-1]
        kv = self.ranks.fetch(torch.cat([k, v], -1), 2, self.cuts, wanted)
        if (low, high) != (start, end):
            before, after = (
                q.new_zeros(*q.shape[:2], n, *q.shape[3:]) for n in (start - low, high - end)
            )
            q = torch.cat([before, q, after], 2)
        k, v = kv.split(width, -1)

        def crop(x: Tensor) -> Tensor:
            return x.narrow(2, start - low, end - start)

        return q, k, v, outside if low == 0 else 0, crop

    def gathered(self, k: Tensor, v: Tensor) -> Pair:
        """Keys and values of all ranks, for layers left softmax (LASP-2H, algorithm 7)."""
        both = self.join(torch.cat([k, v], -1))
        k, v = both.split([k.shape[-1], v.shape[-1]], -1)
        return k, v


def _narrow(x: Tensor, cuts: tuple[int, ...], rank: int) -> Tensor:
    return x.narrow(2, cuts[rank], cuts[rank + 1] - cuts[rank])


def softmax_parts(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Pair:
    """Softmax attention of at most as many queries as keys, and its log-sum-exp.

    As a window that reaches over all of a grid, whose kernel is blocked and gives both.
    """
    queries = q.shape[1]
    rest = (k[:, queries:], v[:, queries:]) if k.shape[1] > queries else None
    out, lse = window_attention(
        q,
        k[:, :queries],
        v[:, :queries],
        grid=(1, queries),
        radius=float("inf"),
        context=rest,
        scale=scale,
        return_lse=True,
    )
    return out, lse
