"""The scan in chunks (Dao & Gu 2024, Mamba-2, section 6): the production path without a GPU.

With s the running sum of the log-decays a inside a chunk, u = dt x, and h the state before it:

    y_i = Σ_{j≤i} (c_i·b_j) exp(s_i - s_j) u_j  +  exp(s_i) h c_i
    h ← exp(s_Q) h + Σ_j exp(s_Q - s_j) u_j b_jᵀ

A run of chunks of some heads is one batch of products. Nothing as long as the tokens is allocated
but the output, and one state a run for the backward pass, which computes the others again.

Sums of log-decays are float64: exp(s_i - s_j) near 1 is lost in float32 where s is in the
thousands. What the future must not see is set to -∞ before it is exponentiated, so that no product
meets an overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.pages import empty_output
from linfusion.kernels.ssd.common import (
    accumulator,
    before,
    chunk_of,
    chunks_of_a_run,
    kept_states,
)

# Elements of the largest temporary: 2 MB in float32, near L2.
BLOCK = 1 << 19
LOG2_E = 1 / math.log(2)  # powers of two take a third of the time of exp


class _Part(NamedTuple):
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


class _Run(NamedTuple):
    """`chunks` chunks of `size` tokens; `place` is that of the kept state before them."""

    tokens: slice
    chunks: int
    size: int
    place: int


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    seg: Tensor | None,
    chunk_size: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, L, H, P], last state [B, H, P, N] and kept states; arguments as `reference`."""
    dtype = accumulator(x, dt, b, c)
    batch, length, heads, channels = x.shape
    y = empty_output(x.shape, x.dtype, x.device)
    final = torch.empty(batch, heads, channels, b.shape[3], dtype=dtype, device=x.device)
    count = kept_states(length, chunk_size, "blocked")
    kept = final.new_empty(batch, count, *final.shape[1:])
    prev = None if seg is None else before(seg, reverse)
    chunk = chunk_of(chunk_size)
    for part in _parts(x, b, chunk):
        state = final.new_zeros(final[part.batch, part.heads].shape)
        if initial is not None:
            state.copy_(initial[part.batch, part.heads])
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        state = part.transposed(state)
        for run in _runs(length, chunk, reverse):
            kept[part.batch, run.place, part.heads] = part.restored(state)
            view = _View(part, run)
            x_, b_, c_ = view.tokens(x), view.group(b, dtype), view.group(c, dtype)
            decay, out, into, through = _decays(view, a, seg, prev, reverse, dtype)
            step = view.tokens(dt[..., None]).to(dtype)  # [k, b, g, Q, r, 1]
            wrote = torch.mul(x_, into.mul_(step))
            states = _states(_added(b_, wrote), through, state, reverse)
            o = _read(c_, _entering(states, reverse)).mul_(out)  # [k, b, g, Q, r, P]
            u = torch.mul(x_.transpose(3, 4), step.transpose(3, 4)).contiguous()
            decay *= (c_ @ b_.mT)[:, :, :, None]
            o += (decay @ u).transpose(3, 4)
            if weight is not None:
                o.addcmul_(x_.to(dtype), weight)
            view.tokens(y).copy_(o)
            state = states[0 if reverse else -1]
        final[part.batch, part.heads] = part.restored(state)
    return y, final, kept


def scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    seg: Tensor | None,
    kept: Tensor,
    chunk_size: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, skip and the initial state.

    A log-decay a_k lies between every j < k ≤ i, so its gradient is the sum over those pairs: sums
    of what passes over k, never differences of totals.
    """
    dtype = kept.dtype
    dx, ddt, da = (empty_output(t.shape, t.dtype, t.device) for t in (x, dt, a))
    db, dc = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (b, c))
    dskip = kept.new_zeros(x.shape[0], 0) if skip is None else torch.zeros_like(skip, dtype=dtype)
    dinitial = torch.empty_like(dfinal, memory_format=torch.contiguous_format)
    prev = None if seg is None else before(seg, reverse)
    chunk = chunk_of(chunk_size)
    for part in _parts(x, b, chunk):
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        dstate = part.transposed(dfinal[part.batch, part.heads].to(dtype))
        for run in reversed(list(_runs(x.shape[1], chunk, reverse))):
            view = _View(part, run)
            x_, dy_ = view.tokens(x).to(dtype), view.tokens(dy).to(dtype)
            b_, c_ = view.group(b, dtype), view.group(c, dtype)
            decay, out, into, through = _decays(view, a, seg, prev, reverse, dtype)
            step = view.tokens(dt[..., None]).to(dtype)  # [k, b, g, Q, r, 1]
            # Of tokens and states: what wrote, and what asks for a gradient.
            wrote, asks = torch.mul(x_, into * step), torch.mul(dy_, out)
            entered = part.transposed(kept[part.batch, run.place, part.heads])
            h = _entering(_states(_added(b_, wrote), through, entered, reverse), reverse)
            dstates = _states(_added(c_, asks), through, dstate, not reverse)
            dh = _entering(dstates, not reverse)  # gradients of the states after each chunk

            u = torch.mul(x_.transpose(3, 4), step.transpose(3, 4)).contiguous()
            g = dy_.transpose(3, 4).contiguous()  # [k, b, g, r, Q, P]
            between = g @ u.mT  # [k, b, g, r, Q, Q]
            between *= decay
            dcb = between.sum(3)
            cb = (c_ @ b_.mT)[:, :, :, None]
            between *= cb
            decay *= cb
            # A token reads itself without any decay.
            between.diagonal(dim1=-2, dim2=-1).zero_()
            da_ = (between.sum(-1) - between.sum(-2)).mT  # [k, b, g, Q, r]

            view.add_group(dc, asks.flatten(4) @ h.flatten(4).mT, dcb @ b_)
            view.add_group(db, wrote.flatten(4) @ dh.flatten(4).mT, dcb.mT @ c_)
            da_ += (asks * _read(c_, h)).sum(-1)
            du = _read(b_, dh)  # [k, b, g, Q, r, P]
            da_ = _running(da_, not reverse)
            da_ += _shifted(_running((wrote * du).sum(-1), reverse), reverse)
            da_ += (through * (dh * h).sum((3, 5)))[:, :, :, None]
            view.tokens(da[..., None]).copy_(da_[..., None])
            du *= into
            du += (decay.mT @ g).transpose(3, 4)
            view.tokens(ddt[..., None]).copy_((du * x_).sum(-1, keepdim=True))
            du *= step
            if weight is not None:
                mine = part.grouped(dskip)
                mine += (dy_ * x_).sum((0, 3))
                du.addcmul_(dy_, weight)
            view.tokens(dx).copy_(du)
            dstate = dstates[-1 if reverse else 0]
        dinitial[part.batch, part.heads] = part.restored(dstate)
    if skip is not None:
        dskip = dskip.to(skip.dtype)
    return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), dskip, dinitial


class _View:
    """A run of some heads in chunks; tensors as long as it are [k, b, g, Q, r, ...], and heads
    first, where every head has a matrix of its own, [k, b, g, r, Q, ...]."""

    def __init__(self, part: _Part, run: _Run) -> None:
        self.part, self.run = part, run
        self.chunked = (run.chunks, run.size)

    def tokens(self, x: Tensor) -> Tensor:
        """A view of [B, L, H, X]."""
        x = x[self.part.batch, self.run.tokens, self.part.heads]
        x = x.unflatten(2, (self.part.group_count, -1)).unflatten(
            1, self.chunked
        )  # [b, k, Q, g, r, X]
        return x.permute(1, 0, 3, 2, 4, 5)

    def packed(self, x: Tensor) -> Tensor:
        """[B, L] as a view [k, b, 1, 1, Q]."""
        x = x[self.part.batch, self.run.tokens].unflatten(1, self.chunked)
        return x.transpose(0, 1)[:, :, None, None]

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


def _parts(x: Tensor, b: Tensor, chunk_size: int) -> Iterator[_Part]:
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
                yield _Part(rows, slice(h, min(last * of_group, h + step)), slice(g, last))


def _runs(length: int, chunk_size: int, reverse: bool) -> Iterator[_Run]:
    """In the order of the scan."""
    whole, ragged = divmod(length, chunk_size)
    several = chunks_of_a_run(chunk_size)
    found = []
    for i, first in enumerate(range(0, whole, several)):
        chunks = min(several, whole - first)
        tokens = slice(first * chunk_size, (first + chunks) * chunk_size)
        found.append(_Run(tokens, chunks, chunk_size, i))
    if ragged:
        found.append(_Run(slice(length - ragged, length), 1, ragged, len(found)))
    return reversed(found) if reverse else iter(found)


def _decays(
    view: _View,
    a: Tensor,
    seg: Tensor | None,
    prev: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of token j at token i [k, b, g, r, Q, Q], of the state before the chunk at token
    i and of token j after the chunk [k, b, g, Q, r, 1], and of the state through the whole chunk
    [k, b, g, r]."""
    s = view.tokens(a[..., None]).to(torch.float64)[..., 0].mT * LOG2_E  # [k, b, g, r, Q]
    s = _cumulative(s, reverse)
    first, last = (-1, 0) if reverse else (0, -1)
    total = s[..., last, None]
    size = s.shape[-1]
    unseen = torch.full((size, size), float("-inf"), dtype=dtype, device=s.device)
    unseen = unseen.tril_(-1) if reverse else unseen.triu_(1)
    out, into, through = s.exp2(), (total - s).exp2_(), total[..., 0].exp2()
    if seg is not None and prev is not None:
        at, came = view.packed(seg), view.packed(prev)[..., first, None]  # [k, b, 1, 1, Q]
        unseen = unseen.masked_fill(at[..., :, None] != at[..., None, :], float("-inf"))
        out = out * (at == came)
        into = into * (at == at[..., last, None])
        through = through * (at[..., last] == came[..., 0])
    decay = torch.empty(*s.shape, size, dtype=dtype, device=s.device)
    torch.sub(s[..., :, None], s[..., None, :], out=decay)
    decay += unseen
    return decay.exp2_(), _by_token(out, dtype), _by_token(into, dtype), through.to(dtype)


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.mT[..., None].to(dtype)


def _added(keys: Tensor, values: Tensor) -> Tensor:
    """Σ_i keys_iᵀ values_i over a chunk, [k, b, g, N, r, P]."""
    return (keys.mT @ values.flatten(4)).unflatten(4, values.shape[4:])


def _read(keys: Tensor, states: Tensor) -> Tensor:
    """keys_i states, [k, b, g, Q, r, P]."""
    return (keys @ states.flatten(4)).unflatten(4, states.shape[4:])


def _states(added: Tensor, through: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """States before, between and after chunks, in the order of memory, [k + 1, b, g, N, r, P]."""
    count = len(added)
    states = added.new_empty(count + 1, *added.shape[1:])
    states[count if reverse else 0] = state
    through = through[:, :, :, None, :, None]
    for k in reversed(range(count)) if reverse else range(count):
        old, new = (k + 1, k) if reverse else (k, k + 1)
        torch.addcmul(added[k], states[old], through[k], out=states[new])
    return states


def _entering(states: Tensor, reverse: bool) -> Tensor:
    """Of each chunk, the state before it in the order of the scan."""
    return states[1:] if reverse else states[:-1]


def _cumulative(x: Tensor, reverse: bool) -> Tensor:
    """Sums up to and with each token of a chunk, along the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def _running(x: Tensor, reverse: bool) -> Tensor:
    """The same along the tokens of [k, b, g, Q, r]."""
    return x.flip(3).cumsum(3).flip(3) if reverse else x.cumsum(3)


def _shifted(x: Tensor, reverse: bool) -> Tensor:
    """Each token gets what the token scanned before it has, and the first one 0."""
    zero = torch.zeros_like(x[:, :, :, :1])
    return torch.cat([x[:, :, :, 1:], zero] if reverse else [zero, x[:, :, :, :-1]], 3)
