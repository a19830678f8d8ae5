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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.pages import empty_output
from linfusion.kernels.ssd.common import accumulator, before, chunks_of_a_run, kept_states

# Elements of the largest temporary: 2 MB in float32, near L2.
BLOCK = 1 << 19


class _Part(NamedTuple):
    """Some sequences and some heads; either whole groups, or heads of one group."""

    batch: slice
    heads: slice
    groups: slice


class _Run(NamedTuple):
    """`chunks` chunks of `size` tokens, and which of the kept states comes before them."""

    tokens: slice
    chunks: int
    size: int
    index: int


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
    for part in _parts(x, b, chunk_size):
        state = final.new_zeros(())
        if initial is not None:
            state = initial[part.batch, part.heads].to(dtype)
        state = state.expand(final[part.batch, part.heads].shape)
        for run in _runs(length, chunk_size, reverse):
            kept[part.batch, run.index, part.heads] = state
            view = _View(part, run, b)
            u, b_, c_ = view.read(x, dtype), view.read_group(b, dtype), view.read_group(c, dtype)
            decay, out, into, through = _decays(view, a, seg, prev, reverse, dtype)
            x_ = None if skip is None else u
            u = u * view.read(dt[..., None], dtype)  # [b, g, r, k, Q, P]
            states = _states(_added(u, into, b_), through, view.grouped(state), reverse)
            o = decay.mul_(c_ @ b_.mT) @ u
            o += (c_ @ _entering(states, reverse).mT).mul_(out[..., None])
            if skip is not None and x_ is not None:
                o.addcmul_(x_, view.grouped(skip[part.batch, part.heads].to(dtype))[..., None, None, :])
            view.write(y, o)
            state = view.ungrouped(states[:, :, :, 0 if reverse else -1])
        final[part.batch, part.heads] = state
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
    for part in _parts(x, b, chunk_size):
        dstate = dfinal[part.batch, part.heads].to(dtype)
        for run in reversed(list(_runs(x.shape[1], chunk_size, reverse))):
            view = _View(part, run, b)
            x_, dy_ = view.read(x, dtype), view.read(dy, dtype)
            dt_ = view.read(dt[..., None], dtype)  # [b, g, r, k, Q, 1]
            b_, c_ = view.read_group(b, dtype), view.read_group(c, dtype)
            decay, out, into, through = _decays(view, a, seg, prev, reverse, dtype)
            u = x_ * dt_
            entered = view.grouped(kept[part.batch, run.index, part.heads])
            states = _states(_added(u, into, b_), through, entered, reverse)
            h = _entering(states, reverse)  # [b, g, r, k, P, N]
            added = _added(dy_, out, c_)
            dstates = _states(added, through, view.grouped(dstate), not reverse)
            dh = _entering(dstates, not reverse)  # gradients of the states after each chunk

            du = torch.matmul(b_, dh.mT).mul_(into[..., None])  # [b, g, r, k, Q, P]
            between = dy_ @ u.mT  # [b, g, r, k, Q, Q]
            between *= decay
            dcb = between.sum(2, keepdim=True)
            cb = c_ @ b_.mT
            between *= cb
            du += decay.mul_(cb).mT @ dy_
            # A token reads itself without any decay.
            between.diagonal(dim1=-2, dim2=-1).zero_()
            da_ = between.sum(-1) - between.sum(-2)

            read = (dy_ * out[..., None]) @ h  # [b, g, r, k, Q, N]
            wrote = (u * into[..., None]) @ dh
            view.add_group(dc, read.sum(2, keepdim=True).add_(dcb @ b_))
            view.add_group(db, wrote.sum(2, keepdim=True).add_(dcb.mT @ c_))
            da_ += (read * c_).sum(-1)
            da_ = _running(da_, not reverse)
            da_ += _shifted(_running((wrote * b_).sum(-1), reverse), reverse)
            da_ += (through * (dh * h).sum((-2, -1)))[..., None]
            view.write(da[..., None], da_[..., None])
            view.write(ddt[..., None], (du * x_).sum(-1, keepdim=True))
            du *= dt_
            if skip is not None:
                mine = dskip[part.batch, part.heads]
                mine += view.ungrouped((dy_ * x_).sum((3, 4)))
                weight = view.grouped(skip[part.batch, part.heads].to(dtype))
                du.addcmul_(dy_, weight[..., None, None, :])
            view.write(dx, du)
            dstate = view.ungrouped(dstates[:, :, :, -1 if reverse else 0])
        dinitial[part.batch, part.heads] = dstate
    if skip is not None:
        dskip = dskip.to(skip.dtype)
    return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), dskip, dinitial


class _View:
    """Reads and writes a run of some heads, heads first and in chunks: [b, g, r, k, Q, ...]."""

    def __init__(self, part: _Part, run: _Run, b: Tensor) -> None:
        self.part, self.run = part, run
        self.groups = part.groups.stop - part.groups.start
        self.chunked = (run.chunks, run.size)

    def grouped(self, x: Tensor) -> Tensor:
        """[b, h, ...] as [b, g, r, ...]."""
        return x.unflatten(1, (self.groups, -1))

    def ungrouped(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def _of(self, x: Tensor) -> Tensor:
        x = x[self.part.batch, self.run.tokens, self.part.heads]
        x = x.unflatten(2, (self.groups, -1)).unflatten(1, self.chunked)  # [b, k, Q, g, r, ...]
        return x.permute(0, 3, 4, 1, 2, 5)

    def _of_group(self, x: Tensor) -> Tensor:
        x = x[self.part.batch, self.run.tokens, self.part.groups].unflatten(1, self.chunked)
        return x.permute(0, 3, 1, 2, 4)[:, :, None]  # [b, g, 1, k, Q, N]

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._of(x).to(dtype).contiguous()

    def read_group(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._of_group(x).to(dtype).contiguous()

    def read_tokens(self, x: Tensor) -> Tensor:
        """[B, L] as [b, 1, 1, k, Q]."""
        return x[self.part.batch, self.run.tokens].unflatten(1, self.chunked)[:, None, None]

    def write(self, into: Tensor, x: Tensor) -> None:
        self._of(into).copy_(x)

    def add_group(self, into: Tensor, x: Tensor) -> None:
        self._of_group(into).add_(x)


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
    view: _View, a: Tensor, seg: Tensor | None, prev: Tensor | None, reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of token j at token i [.., Q, Q], of the state before the chunk at token i and
    of token j after the chunk [.., Q], and of the state through the whole chunk [..]."""
    s = _running(view.read(a[..., None], torch.float64)[..., 0], reverse)
    first, last = (-1, 0) if reverse else (0, -1)
    total = s[..., last, None]
    size = s.shape[-1]
    unseen = torch.ones(size, size, dtype=torch.bool, device=s.device)
    unseen = unseen.tril_(-1) if reverse else unseen.triu_(1)
    out, into, through = s.exp(), (total - s).exp_(), total[..., 0].exp()
    if seg is not None and prev is not None:
        at = view.read_tokens(seg)  # [b, 1, 1, k, Q]
        came = view.read_tokens(prev)[..., first, None]
        unseen = unseen | (at[..., :, None] != at[..., None, :])
        out = out * (at == came)
        into = into * (at == at[..., last, None])
        through = through * (at[..., last] == came[..., 0])
    decay = (s[..., :, None] - s[..., None, :]).to(dtype).masked_fill_(unseen, float("-inf"))
    return decay.exp_(), out.to(dtype), into.to(dtype), through.to(dtype)


def _added(values: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """Σ_i weight_i values_i keys_iᵀ over a chunk, [b, g, r, k, P, N]."""
    return (values * weight[..., None]).mT @ keys


def _states(added: Tensor, through: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """The states before, between and after chunks in the order of memory, [b, g, r, k + 1, P, N]."""
    count = added.shape[3]
    states = added.new_empty(*added.shape[:3], count + 1, *added.shape[4:])
    states[:, :, :, count if reverse else 0] = state
    through = through[..., None, None]
    for k in reversed(range(count)) if reverse else range(count):
        old, new = (k + 1, k) if reverse else (k, k + 1)
        torch.mul(states[:, :, :, old], through[:, :, :, k], out=states[:, :, :, new])
        states[:, :, :, new] += added[:, :, :, k]
    return states


def _entering(states: Tensor, reverse: bool) -> Tensor:
    """Of each chunk, the state before it in the order of the scan."""
    return states[:, :, :, 1:] if reverse else states[:, :, :, :-1]


def _running(x: Tensor, reverse: bool) -> Tensor:
    """Sums up to and with each token of a chunk."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def _shifted(x: Tensor, reverse: bool) -> Tensor:
    """Each token gets what the token scanned before it has, and the first one 0."""
    if reverse:
        return torch.nn.functional.pad(x[..., 1:], (0, 1))
    return torch.nn.functional.pad(x[..., :-1], (1, 0))
