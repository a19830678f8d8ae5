"""Both scans in chunks, the production path without a GPU.

With s and r the running sums of the log-decays a and a' of the two directions inside a chunk, each
in its order, h the state before the chunk and h' the one after it:

    y_i = Σ_j (c_i·b_j) m_ij x_j  +  exp(s_i) h c_i  +  exp(r_i) h' c_i
    m_ij = dt_j exp(s_i - s_j) for j < i,  dt'_j exp(r_i - r_j) for j > i,  dt_j + dt'_j for j = i

so that a chunk has one matrix, where two scans have two, of each of which half is zero. What comes
by the states of the backward direction is written first, from the last token to the first; the
forward direction then adds its own and the pairs of tokens of each chunk. In half precision that
sum is kept in float32 until it is whole. The rest is as in `linfusion.kernels.ssd.blocked`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.pages import empty_output
from linfusion.kernels.ssd.chunks import (
    LOG2_E,
    View,
    added_by,
    by_token,
    cumulative,
    entering,
    parts_of,
    read_from,
    running,
    runs_of,
    shifted,
    states_between,
)
from linfusion.kernels.ssd.common import accumulator, chunk_of, kept_states


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, P] and kept states [B, runs, H, 2, P, N]; arguments as `ops`."""
    dtype = accumulator(x, dt, b, c)
    batch, length, heads, channels = x.shape
    y = empty_output(x.shape, x.dtype, x.device)
    total = y if y.dtype == dtype else empty_output(x.shape, dtype, x.device)
    count = kept_states(length, chunk_size, "blocked")
    kept = x.new_empty(batch, count, heads, 2, channels, b.shape[3], dtype=dtype)
    chunk = chunk_of(chunk_size)
    for part in parts_of(x, b, chunk):
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        for i in (1, 0):
            state = part.transposed(torch.zeros_like(kept[part.batch, 0, part.heads, i]))
            for run in runs_of(length, chunk, bool(i)):
                kept[part.batch, run.place, part.heads, i] = part.restored(state)
                view = View(part, run)
                x_, b_, c_ = view.tokens(x), view.group(b, dtype), view.group(c, dtype)
                s, steps = _sums(view, a, i), view.tokens(dt)
                out, into, through = _edges(s, bool(i), dtype)
                wrote = torch.mul(x_, into.mul_(steps[..., i, None]))
                states = states_between(added_by(b_, wrote), through, state, bool(i))
                state = states[0 if i else -1]
                o = read_from(c_, entering(states, bool(i))).mul_(out)  # [k, b, g, Q, r, P]
                if not i:
                    o += view.tokens(total)
                    pairs = _pairs(s, _sums(view, a, 1), steps)
                    pairs.decay.mul_(pairs.steps).mul_((c_ @ b_.mT)[:, :, :, None])
                    u = x_.to(dtype).transpose(3, 4).contiguous()
                    o += (pairs.decay @ u).transpose(3, 4)
                    if weight is not None:
                        o.addcmul_(x_.to(dtype), weight)
                view.tokens(total if i else y).copy_(o)
    return y, kept


def scan_backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    kept: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c and skip."""
    dtype = kept.dtype
    dx, ddt, da = (empty_output(t.shape, t.dtype, t.device) for t in (x, dt, a))
    total = dx if dx.dtype == dtype else empty_output(x.shape, dtype, x.device)
    db, dc = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (b, c))
    dskip = kept.new_zeros(x.shape[0], 0) if skip is None else torch.zeros_like(skip, dtype=dtype)
    chunk = chunk_of(chunk_size)
    for part in parts_of(x, b, chunk):
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        for i in (1, 0):
            reverse = bool(i)
            dstate = part.transposed(torch.zeros_like(kept[part.batch, 0, part.heads, i]))
            for run in runs_of(x.shape[1], chunk, not reverse):
                view = View(part, run)
                x_, dy_ = view.tokens(x).to(dtype), view.tokens(dy).to(dtype)
                b_, c_ = view.group(b, dtype), view.group(c, dtype)
                s, steps = _sums(view, a, i), view.tokens(dt)
                out, into, through = _edges(s, reverse, dtype)
                step = steps[..., i, None]  # [k, b, g, Q, r, 1]
                # Of tokens and states: what wrote, and what asks for a gradient.
                wrote, asks = torch.mul(x_, into * step), torch.mul(dy_, out)
                entered = part.transposed(kept[part.batch, run.place, part.heads, i])
                states = states_between(added_by(b_, wrote), through, entered, reverse)
                h = entering(states, reverse)
                dstates = states_between(added_by(c_, asks), through, dstate, not reverse)
                dh = entering(dstates, not reverse)  # gradients of the states after each chunk
                dstate = dstates[-1 if reverse else 0]

                view.add_group(dc, asks.flatten(4) @ h.flatten(4).mT)
                view.add_group(db, wrote.flatten(4) @ dh.flatten(4).mT)
                da_ = running(asks.mul_(read_from(c_, h)).sum(-1), not reverse)  # [k, b, g, Q, r]
                du = read_from(b_, dh).mul_(into)  # [k, b, g, Q, r, P]
                ddt_ = torch.mul(du, x_, out=wrote).sum(-1)
                da_ += shifted(running(ddt_ * step[..., 0], reverse), reverse)
                da_ += (through * dh.mul_(h).sum((3, 5)))[:, :, :, None]
                view.tokens(da)[..., i] = da_
                view.tokens(ddt)[..., i] = ddt_
                du *= step
                if not i:
                    du += view.tokens(total)
                    pairs = _pairs(s, _sums(view, a, 1), steps)
                    du += _gradients_of_pairs(view, x_, dy_, b_, c_, pairs, steps, ddt, da, db, dc)
                    if weight is not None:
                        mine = part.grouped(dskip)
                        mine += (dy_ * x_).sum((0, 3))
                        du.addcmul_(dy_, weight)
                view.tokens(total if i else dx).copy_(du)
    if skip is not None:
        dskip = dskip.to(skip.dtype)
    return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), dskip


def _gradients_of_pairs(
    view: View,
    x: Tensor,
    dy: Tensor,
    b: Tensor,
    c: Tensor,
    pairs: _Pairs,
    steps: Tensor,
    ddt: Tensor,
    da: Tensor,
    db: Tensor,
    dc: Tensor,
) -> Tensor:
    """What the pairs of tokens give dx [k, b, g, Q, r, P]; what they give the other gradients is
    added to those."""
    g = dy.transpose(3, 4).contiguous()  # [k, b, g, r, Q, P]
    between = g @ x.transpose(3, 4).contiguous().mT  # [k, b, g, r, Q, Q]
    between *= pairs.decay
    half = torch.mul(between, pairs.steps)
    dcb = half.sum(3)
    view.add_group(dc, dcb @ b)
    view.add_group(db, dcb.mT @ c)
    cb = (c @ b.mT)[:, :, :, None]
    between *= cb
    pairs.decay.mul_(cb).mul_(pairs.steps)

    own = between.diagonal(dim1=-2, dim2=-1)  # without any decay
    for i, seen in enumerate(pairs.seen):
        torch.mul(between, seen, out=half)
        wrote = half.sum(-2)  # [k, b, g, r, Q]
        view.tokens(ddt)[..., i] += (wrote + own).mT
        half *= pairs.steps
        passed = half.sum(-1) - wrote * steps[..., i].mT
        view.tokens(da)[..., i] += running(passed.mT, not i)
    return (pairs.decay.mT @ g).transpose(3, 4)


class _Pairs(NamedTuple):
    """What is left of token j at token i, and the step that j has towards i, [k, b, g, r, Q, Q];
    of each direction, 1 where i sees j and is not j, [Q, Q]."""

    decay: Tensor
    steps: Tensor
    seen: tuple[Tensor, Tensor]


def _pairs(forward: Tensor, backward: Tensor, steps: Tensor) -> _Pairs:
    """Of the sums of log-decays and the steps of both directions."""
    size, dtype, device = steps.shape[3], steps.dtype, steps.device
    decay, other = (torch.empty(*forward.shape, size, dtype=dtype, device=device) for _ in range(2))
    unseen = torch.full((size, size), float("-inf"), dtype=dtype, device=device)
    torch.sub(forward[..., :, None], forward[..., None, :], out=decay).add_(unseen.triu(1))
    torch.sub(backward[..., :, None], backward[..., None, :], out=other).add_(unseen.tril(-1))
    torch.maximum(decay, other, out=decay).exp2_()
    ones = torch.ones(size, size, dtype=dtype, device=device)
    step, step_b = (t.mT[..., None, :] for t in steps.unbind(-1))  # [k, b, g, r, 1, Q]
    both = torch.mul(step, ones.tril(), out=other).addcmul_(step_b, ones.triu())
    return _Pairs(decay, both, (ones.tril(-1), ones.triu(1)))


def _sums(view: View, a: Tensor, direction: int) -> Tensor:
    """Running sums of the log-decays of a direction, base 2, in float64, [k, b, g, r, Q]."""
    one = view.tokens(a)[..., direction].to(torch.float64)
    return cumulative(one.mT * LOG2_E, bool(direction))


def _edges(s: Tensor, reverse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of the state before the chunk at token i and of token j after the chunk
    [k, b, g, Q, r, 1], and of the state through the whole chunk [k, b, g, r]."""
    total = s[..., 0 if reverse else -1, None]
    out, into = by_token(s.exp2(), dtype), by_token((total - s).exp2_(), dtype)
    return out, into, total[..., 0].exp2().to(dtype)
