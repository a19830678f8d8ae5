"""How the blocked forms cut tokens and heads into batches of products, and what they do in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.ssd.common import chunks_of_a_run

# Elements of the largest temporary: 2 MB in float32, near L2.
BLOCK = 1 << 19
LOG2_E = 1 / math.log(2)  # powers of two take a third of the time of exp
# Nothing is left after so small a log-decay, in units of log 2, and sums of them stay finite: of 64
# in float32, exact to a multiple of GRAIN, which takes 24 bits.
FORGET = {torch.float32: -256.0, torch.float64: -2048.0}
GRAIN = 2.0**-9


class Part(NamedTuple):
    """Some sequences and some heads; either whole groups, or heads of one group."""

    batch: slice
    heads: slice
    groups: slice

    @property
    def group_count(self) -> int:
        return self.groups.stop - self.groups.start

    def grouped(self, x: Tensor) -> Tensor:
        """[B, H, P] as a view [b, g, r, P]."""
        return x[self.batch, self.heads].unflatten(1, (self.group_count, -1))

    def transposed(self, state: Tensor) -> Tensor:
        """[b, h, P, N] as [b, g, N, r, P], so that the heads of a group share a product."""
        return state.unflatten(1, (self.group_count, -1)).permute(0, 1, 4, 2, 3)

    def restored(self, state: Tensor) -> Tensor:
        return state.permute(0, 1, 3, 4, 2).flatten(1, 2)


class Run(NamedTuple):
    """`chunks` chunks of `size` tokens; `place` is that of the kept state before them."""

    tokens: slice
    chunks: int
    size: int
    place: int


class View:
    """A run of some heads in chunks; tensors as long as it are [k, b, g, Q, r, ...], and heads
    first, where every head has a matrix of its own, [k, b, g, r, Q, ...]."""

    def __init__(self, part: Part, run: Run) -> None:
        self.part, self.run = part, run
        self.chunked = (run.chunks, run.size)

    def tokens(self, x: Tensor) -> Tensor:
        """A view of [B, L, H, X]."""
        x = x[self.part.batch, self.run.tokens, self.part.heads]
        x = x.unflatten(2, (self.part.group_count, -1)).unflatten(
            1, self.chunked
        )  # [b, k, Q, g, r, X]
        return x.permute(1, 0, 3, 2, 4, 5)

    def _group(self, x: Tensor) -> Tensor:
        x = x[self.part.batch, self.run.tokens, self.part.groups].unflatten(1, self.chunked)
        return x.permute(1, 0, 3, 2, 4)

    def group(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, L, G, N] as [k, b, g, Q, N]."""
        return self._group(x).to(dtype).contiguous()

    def add_group(self, into: Tensor, *parts: Tensor) -> None:
        view = self._group(into)
        for x in parts:
            view += x


def parts_of(x: Tensor, b: Tensor, chunk_size: int) -> Iterator[Part]:
    batch, length, heads, channels = x.shape
    groups, features = b.shape[2:]
    of_group = heads // groups
    size = min(length, chunk_size)
    tokens = min(length, size * chunks_of_a_run(chunk_size))
    fit = max(1, BLOCK // (tokens * max(size, channels, features)))  # heads
    # The states of short chunks outweigh their tokens.
    fit = max(1, min(fit, BLOCK * size // (tokens * channels * features)))
    if fit >= of_group:
        step, group_step = min(heads, fit // of_group * of_group), max(1, fit // of_group)
    else:
        step, group_step = fit, 1
    together = max(1, fit // heads)  # sequences
    for i in range(0, batch, together):
        rows = slice(i, min(batch, i + together))
        for g in range(0, groups, group_step):
            last = min(groups, g + group_step)
            for h in range(g * of_group, last * of_group, step):
                yield Part(rows, slice(h, min(last * of_group, h + step)), slice(g, last))


def runs_of(length: int, chunk_size: int, reverse: bool) -> Iterator[Run]:
    """In the order of the scan."""
    whole, ragged = divmod(length, chunk_size)
    several = chunks_of_a_run(chunk_size)
    found = []
    for i, first in enumerate(range(0, whole, several)):
        chunks = min(several, whole - first)
        tokens = slice(first * chunk_size, (first + chunks) * chunk_size)
        found.append(Run(tokens, chunks, chunk_size, i))
    if ragged:
        found.append(Run(slice(length - ragged, length), 1, ragged, len(found)))
    return reversed(found) if reverse else iter(found)


def by_token(x: Tensor) -> Tensor:
    return x.mT[..., None]


def added_by(keys: Tensor, values: Tensor) -> Tensor:
    """Σ_i keys_iᵀ values_i over a chunk, [k, b, g, N, r, P]."""
    return (keys.mT @ values.flatten(4)).unflatten(4, values.shape[4:])


def read_from(keys: Tensor, states: Tensor) -> Tensor:
    """keys_i states, [k, b, g, Q, r, P]."""
    return (keys @ states.flatten(4)).unflatten(4, states.shape[4:])


def states_between(added: Tensor, through: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """States before, between and after chunks, in the order of memory, [k + 1, b, g, N, r, P]."""
    count = len(added)
    states = added.new_empty(count + 1, *added.shape[1:])
    states[count if reverse else 0] = state
    through = through[:, :, :, None, :, None]
    for k in reversed(range(count)) if reverse else range(count):
        old, new = (k + 1, k) if reverse else (k, k + 1)
        torch.addcmul(added[k], states[old], through[k], out=states[new])
    return states


def entering(states: Tensor, reverse: bool) -> Tensor:
    """Of each chunk, the state before it in the order of the scan."""
    return states[1:] if reverse else states[:-1]


def sums_of(a: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Sums of log-decays up to and with each token of a chunk, along the last axis, high and low.

    In units of log 2. The high part of a log-decay is a multiple of `GRAIN`, so that sums and
    differences of high parts are exact, and those of low parts are small.
    """
    a = (a * LOG2_E).clamp_(min=FORGET[a.dtype])  # NaN stays
    high = torch.round(a / GRAIN).mul_(GRAIN)
    high, low = (x.flip(-1) if reverse else x for x in (high, a - high))
    high, low = high.cumsum(-1), low.cumsum(-1)
    return (high.flip(-1), low.flip(-1)) if reverse else (high, low)


def seen(weights: Tensor, reverse: bool) -> Tensor:
    """Of each token i and token j [..., Q, Q], 0 where j comes after i, whatever was there."""
    return weights.triu_() if reverse else weights.tril_()


def add_seen(o: Tensor, weights: Tensor, u: Tensor, reverse: bool) -> None:
    """Add weights [..., Q, Q] u [..., Q, P] of the tokens that each one sees to o.

    A product with 0 would carry what is not finite to all tokens: such u are set to 0, and o is NaN
    from their token on in the order of the scan.
    """
    if not u.is_cpu or not u.sum().isfinite():  # elsewhere, to ask would be to wait for the device
        lost = u * 0
        u.masked_fill_(lost != 0, 0)
        o += lost.flip(-2).cumsum(-2).flip(-2) if reverse else lost.cumsum(-2)
    o += seen(weights, reverse) @ u


def running(x: Tensor, reverse: bool) -> Tensor:
    """The same along the tokens of [k, b, g, Q, r]."""
    return x.flip(3).cumsum(3).flip(3) if reverse else x.cumsum(3)


def shifted(x: Tensor, reverse: bool) -> Tensor:
    """Each token gets what the token scanned before it has, and the first one 0."""
    zero = torch.zeros_like(x[:, :, :, :1])
    return torch.cat([x[:, :, :, 1:], zero] if reverse else [zero, x[:, :, :, :-1]], 3)
