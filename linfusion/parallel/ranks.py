"""The ranks that share a model call, and what they do with rows and sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from linfusion.kernels import LinearState
from linfusion.parallel import collectives

Run = tuple[int, int]


def cut_rows(rows: int, world: int, unit: int = 1) -> tuple[int, ...]:
    """Where each rank's rows begin, and the end: world + 1 numbers.

    Args:
        rows: of the picture.
        world: ranks.
        unit: rows that stay together; only the last rank may have others left over.

    Raises:
        ValueError: a rank would have no row.
    """
    units = math.ceil(rows / unit)
    if units < world:
        together = f", of which {unit} stay together" if unit > 1 else ""
        raise ValueError(
            f"sp: got {world} ranks for {rows} rows of tokens{together}; accepted are at most"
            f" {units} ranks for this size"
        )
    return (*(min(rows, unit * (rank * units // world)) for rank in range(world)), rows)


@dataclass(frozen=True)
class Ranks:
    """A process group and this process' place in it.

    Attributes:
        group: name of the process group.
        rank: of this process.
        world: ranks.
    """

    group: str
    rank: int
    world: int

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, all of one shape: [world, *x.shape]."""
        if self.world == 1:
            return x[None]
        return collectives.gather(x, self.group, self.world)

    def join(self, x: Tensor, dim: int, cuts: Sequence[int]) -> Tensor:
        """The whole of a tensor whose rows `cuts[rank]` to `cuts[rank + 1]` of `dim` are x."""
        if self.world == 1:
            return x
        sizes = [b - a for a, b in pairwise(cuts)]
        most = max(sizes)
        rows = x.movedim(dim, 0)
        if len(rows) < most:  # the wire takes one size
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = self.gather(rows)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, dim)

    def fetch(self, x: Tensor, dim: int, cuts: Sequence[int], wanted: Sequence[Run]) -> Tensor:
        """The rows that this rank wants, of whichever rank has them, in one exchange.

        Args:
            x: rows `cuts[rank]` to `cuts[rank + 1]` of the whole along `dim`.
            dim: of the rows.
            cuts: where each rank's rows begin, and the end.
            wanted: of every rank, first row and end; they contain the rank's own.

        Returns:
            Rows `wanted[rank]` along `dim`; x itself where nobody wants another's.
        """
        if all(run == own for run, own in zip(wanted, pairwise(cuts), strict=True)):
            return x
        rows, first = x.movedim(dim, 0), cuts[self.rank]
        above, below = self.beyond(lambda a, b: rows[a - first : b - first], cuts, wanted)
        return torch.cat([above, rows, below]).movedim(0, dim)

    def beyond(
        self, rows: Callable[[int, int], Tensor], cuts: Sequence[int], wanted: Sequence[Run]
    ) -> tuple[Tensor, Tensor]:
        """What `fetch` adds before and after this rank's own rows.

        Args:
            rows: (first, end), of the whole and among this rank's own -> [end - first, ...].
            cuts, wanted: as for `fetch`.
        """
        own = list(pairwise(cuts))
        others = [r != self.rank for r in range(self.world)]
        send = [_shared(own[self.rank], run) for run in wanted]
        receive = [_shared(run, wanted[self.rank]) for run in own]
        first = own[self.rank][0]
        out = [rows(a, b) for (a, b), other in zip(send, others, strict=True) if other and a < b]
        got = collectives.exchange(
            torch.cat(out) if out else rows(first, first),
            self.group,
            [(b - a) * other for (a, b), other in zip(send, others, strict=True)],
            [(b - a) * other for (a, b), other in zip(receive, others, strict=True)],
        )
        before = sum(b - a for a, b in receive[: self.rank])
        return got[:before], got[before:]

    def reach(self, cuts: Sequence[int], before: int, after: int) -> list[Run]:
        """What every rank wants that sees so many rows beyond its own, inside the picture."""
        return [(max(a - before, 0), min(b + after, cuts[-1])) for a, b in pairwise(cuts)]

    def merge_states(self, state: LinearState) -> LinearState:
        """The state of all ranks' keys: one gather, and a sum in the order of ranks (LASP-2).

        LASP-2 (Sun et al. 2025, arXiv:2502.07563), algorithm 1. Its algorithm 3 sums gradients
        from the next rank on, as the masked form does; without a mask every rank reads the state,
        and the gradient sums all of them.
        """
        if self.world == 1:
            return state
        kv, k_mean, count = state
        packed = torch.cat([kv.flatten(1), k_mean.flatten(1), count[:, None]], 1)
        parts = self.gather(packed)
        counts = parts[..., -1]  # [W, B]
        total = counts.sum(0)
        shares = counts / torch.where(total == 0, torch.ones_like(total), total)
        mean = (parts[..., :-1] * shares[..., None]).sum(0)
        size = math.prod(kv.shape[1:])
        return LinearState(mean[:, :size].view_as(kv), mean[:, size:].view_as(k_mean), total)

    def merge_softmax(self, out: Tensor, lse: Tensor) -> Tensor:
        """Softmax attention over the keys of all ranks from that over each rank's own.

        O = Σ_r e^(l_r - l) O_r,  l = log Σ_r e^(l_r), in the dtype of l. Each rank merges some of
        the queries and hands them to all: that is less than all parts to all.

        Args:
            out: [B, T, H, D] of the same queries on every rank.
            lse: logarithm of the sum of exponentials, [B, T, H].
        """
        if self.world == 1:
            return out
        queries = out.shape[1]
        cuts = [queries * rank // self.world for rank in range(self.world + 1)]
        sizes = [b - a for a, b in pairwise(cuts)]
        packed = torch.cat([out.to(lse.dtype), lse[..., None]], -1).transpose(0, 1)
        own = sizes[self.rank]
        parts = collectives.exchange(packed, self.group, sizes, [own] * self.world)
        parts = parts.unflatten(0, (self.world, own))
        shares = parts[..., -1].softmax(0)
        merged = (parts[..., :-1] * shares[..., None]).sum(0).to(out.dtype)
        return self.join(merged.transpose(0, 1), 1, cuts)

    def merge_moments(self, count: int, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over the elements of all ranks (Chan et al. 1979).

        Args:
            count: elements of this rank.
            mean: their mean, any shape.
            m2: Σ (x - mean)², of that shape.
        """
        if self.world == 1:
            return mean, m2 / max(count, 1)
        counted = torch.full_like(mean, count)
        counts, means, m2s = self.gather(torch.stack([counted, mean, m2])).unbind(1)
        total = counts.sum(0)
        centre = (counts * means).sum(0) / total
        spread = m2s + counts * (means - centre).square()
        return centre, spread.sum(0) / total


def _shared(a: Run, b: Run) -> Run:
    """What two runs have in common; the end is not below the beginning."""
    low = max(a[0], b[0])
    return low, max(low, min(a[1], b[1]))
