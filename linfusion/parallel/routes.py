"""Which rank scans which tokens, and how they get there.

A scan goes through all tokens in one order, and a rank has whole rows. Where rows are the slowest
axis of the order, each rank scans its own tokens and nothing moves. In any other order the tokens
go to ranks in runs of the order, and the results come back: two exchanges of a rank's share of the
tokens each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from linfusion.attention.mate.scan_orders import flatten, unflatten
from linfusion.parallel import collectives
from linfusion.parallel.ranks import Ranks, Run


@dataclass(frozen=True)
class Route:
    """The tokens of one order over ranks.

    The sequence is that of the review tokens, then of the tokens. A piece is a run of either.

    Attributes:
        lengths: of every rank's two pieces: (review tokens, tokens).
        send: to every rank, of this rank's own; None where nothing moves.
        receive: from every rank.
        arrange: of what was received, in the order of the sequence.
        back: of the tokens that were scanned here, to whom they belong in turn.
        give, take: tokens that go back to every rank and come back from each.
    """

    lengths: tuple[Run, ...]
    send: tuple[int, ...] | None = None
    receive: tuple[int, ...] = ()
    arrange: Tensor | None = None
    back: Tensor | None = None
    give: tuple[int, ...] = ()
    take: tuple[int, ...] = ()


@functools.lru_cache(maxsize=256)
def route(
    ranks: Ranks,
    order: str,
    grid: tuple[int, ...],
    cuts: tuple[int, ...],
    review: tuple[int, ...] | None,
    review_cuts: tuple[int, ...],
    device: torch.device,
) -> Route:
    """The route of a grid (t, h, w) cut by rows, with or without review tokens.

    Remembered, with its indices on `device`: nothing is copied there in a layer.
    """
    rows_first = all(_slowest(order, size) == "h" for size in (grid, review) if size is not None)
    own = _positions(order, grid, cuts)
    lead = 0
    if review is not None:
        first = _positions(order, review, review_cuts)
        lead = sum(map(len, first))
        own = [torch.cat([a, b + lead]) for a, b in zip(first, own, strict=True)]
    if rows_first:
        return Route(tuple((int((p < lead).sum()), int((p >= lead).sum())) for p in own))
    total = sum(map(len, own))
    ends = [total * rank // ranks.world for rank in range(ranks.world + 1)]
    chunks = list(pairwise(ends))
    me, mine = own[ranks.rank], chunks[ranks.rank]
    arrived = torch.cat([p[(p >= mine[0]) & (p < mine[1])] for p in own])
    arrange = arrived.argsort()
    owner = torch.cat([torch.full_like(p, rank) for rank, p in enumerate(own)])
    owner = owner[torch.cat(own).argsort()]  # of every position
    scanned = owner[max(mine[0], lead) : max(mine[1], lead)]
    tokens = me[me >= lead]
    return Route(
        lengths=tuple(
            (min(b, lead) - min(a, lead), max(b, lead) - max(a, lead)) for a, b in chunks
        ),
        send=tuple(_count(me, run) for run in chunks),
        receive=tuple(_count(p, mine) for p in own),
        arrange=arrange.to(device),
        back=scanned.argsort(stable=True).to(device),
        give=tuple(int((scanned == rank).sum()) for rank in range(ranks.world)),
        take=tuple(_count(tokens, run) for run in chunks),
    )


def _slowest(order: str, grid: tuple[int, ...]) -> str:
    sizes = dict(zip("thw", grid, strict=True))
    return next((axis for axis in order if sizes[axis] > 1), "h")


def _positions(order: str, grid: tuple[int, ...], cuts: tuple[int, ...]) -> list[Tensor]:
    """Places in the order of every rank's tokens, increasing."""
    t, h, w = grid
    places = unflatten(torch.arange(t * h * w)[None, :, None], (t, h, w), order)
    return [flatten(places[:, :, a:b], order).flatten() for a, b in pairwise(cuts)]


def _count(positions: Tensor, run: Run) -> int:
    return int(((positions >= run[0]) & (positions < run[1])).sum())


def carry(ranks: Ranks, way: Route, sequence: Tensor) -> Tensor:
    """This rank's own tokens in the order, review tokens first -> those it scans, [B, n, C]."""
    if way.send is None:
        return sequence
    assert way.arrange is not None
    moved = collectives.exchange(sequence.transpose(0, 1), ranks.group, way.send, way.receive)
    return moved.index_select(0, way.arrange).transpose(0, 1)


def carry_back(ranks: Ranks, way: Route, scanned: Tensor) -> Tensor:
    """The tokens that were scanned here, without review tokens -> this rank's own, in the order."""
    if way.send is None:
        return scanned
    assert way.back is not None
    rows = scanned.transpose(0, 1).index_select(0, way.back)
    return collectives.exchange(rows, ranks.group, way.give, way.take).transpose(0, 1)
