"""Both scans in chunks, the production path without a GPU.

With s and r the running sums of the log-decays a and a' of the two directions inside a chunk, each
in its order, h the state before the chunk and h' the one after it:

    y_i = Σ_j (c_i·b_j) m_ij x_j  +  exp(s_i) h c_i  +  exp(r_i) h' c_i
    m_ij = dt_j exp(s_i - s_j) for j < i,  dt'_j exp(r_i - r_j) for j > i,  dt_j + dt'_j for j = i

so that a chunk has one matrix, where two scans have two, of each of which half is zero. Channels of
states are those of the forward direction and then those of the backward one, so that both share
every product with keys and queries.

The states of the forward direction come with the runs of chunks from the first to the last; those
of the backward one are found before, from the last to the first, and kept once a run. The rest is
as in `linfusion.kernels.ssd.blocked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linfusion.kernels.pages import empty_output
from linfusion.kernels.ssd.chunks import (
    LOG2_E,
    Part,
    Run,
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
    """Output [B, L, H, P] and kept states [B, runs, H, 2·P, N]; arguments as `ops`."""
    dtype = accumulator(x, dt, b, c)
    batch, length, heads, channels = x.shape
    y = empty_output(x.shape, x.dtype, x.device)
    count = kept_states(length, chunk_size, "blocked")
    kept = x.new_empty(batch, count, heads, 2 * channels, b.shape[3], dtype=dtype)
    chunk = chunk_of(chunk_size)
    runs = list(runs_of(length, chunk, False))
    for part in parts_of(x, b, chunk):
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        behind = _backward_states(part, runs, b, x, dt, a, dtype)
        state = torch.zeros_like(behind[0])
        for run in runs:
            view = View(part, run)
            entered = torch.cat([state, behind[run.place]], -1)  # [b, g, N, r, 2·P]
            kept[part.batch, run.place, part.heads] = part.restored(entered)
            x_, b_, c_ = view.tokens(x).to(dtype), view.group(b, dtype), view.group(c, dtype)
            decay, out, into, through, step, steps = _decays(view, dt, a, dtype)
            wrote = _both(x_, into.mul_(step))
            h, state = _entering(added_by(b_, wrote), through, entered, False)
            forward, backward = read_from(c_, h).chunk(2, -1)  # [k, b, g, Q, r, P]
            o = torch.mul(forward, out[..., :1])
            o.addcmul_(backward, out[..., 1:])
            decay *= steps
            decay *= (c_ @ b_.mT)[:, :, :, None]
            o += (decay @ x_.transpose(3, 4).contiguous()).transpose(3, 4)
            if weight is not None:
                o.addcmul_(x_, weight)
            view.tokens(y).copy_(o)
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
    db, dc = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (b, c))
    dskip = kept.new_zeros(x.shape[0], 0) if skip is None else torch.zeros_like(skip, dtype=dtype)
    chunk = chunk_of(chunk_size)
    runs = list(runs_of(x.shape[1], chunk, False))
    for part in parts_of(x, b, chunk):
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        behind = _backward_states(part, runs, c, dy, None, a, dtype)
        dstate = torch.zeros_like(behind[0])
        for run in reversed(runs):
            view = View(part, run)
            x_, dy_ = view.tokens(x).to(dtype), view.tokens(dy).to(dtype)
            b_, c_ = view.group(b, dtype), view.group(c, dtype)
            decay, out, into, through, step, steps = _decays(view, dt, a, dtype)
            # Of tokens and states: what wrote, and what asks for a gradient.
            wrote, asks = _both(x_, into * step), _both(dy_, out)  # [k, b, g, Q, r, 2·P]
            entered = part.transposed(kept[part.batch, run.place, part.heads])
            h, _ = _entering(added_by(b_, wrote), through, entered, False)
            left = torch.cat([dstate, behind[run.place]], -1)
            dh, dstate = _entering(added_by(c_, asks), through, left, True)

            g = dy_.transpose(3, 4).contiguous()  # [k, b, g, r, Q, P]
            between = g @ x_.transpose(3, 4).contiguous().mT  # [k, b, g, r, Q, Q]
            between *= decay
            dcb = (between * steps).sum(3)
            cb = (c_ @ b_.mT)[:, :, :, None]
            between *= cb
            decay *= cb
            decay *= steps
            ddt_, da_ = _of_pairs(between, step)  # [k, b, g, Q, r, 2]

            view.add_group(dc, asks.flatten(4) @ h.flatten(4).mT, dcb @ b_)
            view.add_group(db, wrote.flatten(4) @ dh.flatten(4).mT, dcb.mT @ c_)
            da_ += _sum(asks.mul_(read_from(c_, h)))
            du = read_from(b_, dh)
            wrote = _sum(wrote.mul_(du))
            through *= dh.mul_(h).unflatten(-1, (2, -1)).sum((3, -1))  # [k, b, g, r, 2]
            for i, reverse in enumerate((False, True)):
                one = running(da_[..., i], not reverse)
                one += shifted(running(wrote[..., i], reverse), reverse)
                one += through[:, :, :, None, :, i]
                da_[..., i] = one
            view.tokens(da).copy_(da_)
            du = du.unflatten(-1, (2, -1))  # [k, b, g, Q, r, 2, P]
            du *= into[..., None]
            ddt_ += (du * x_[..., None, :]).sum(-1)
            view.tokens(ddt).copy_(ddt_)
            dx_ = torch.mul(du[..., 0, :], step[..., :1])
            dx_.addcmul_(du[..., 1, :], step[..., 1:])
            dx_ += (decay.mT @ g).transpose(3, 4)
            if weight is not None:
                mine = part.grouped(dskip)
                mine += (dy_ * x_).sum((0, 3))
                dx_.addcmul_(dy_, weight)
            view.tokens(dx).copy_(dx_)
    if skip is not None:
        dskip = dskip.to(skip.dtype)
    return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), dskip


class _Decays(NamedTuple):
    """Of a run, what is left

    between: of token j at token i, [k, b, g, r, Q, Q].
    out: of the state before the chunk at token i, [k, b, g, Q, r, 2].
    into: of token j after the chunk, [k, b, g, Q, r, 2].
    through: of the state through the whole chunk, [k, b, g, r, 2].
    step: and the steps, [k, b, g, Q, r, 2].
    steps: that j has towards i, [k, b, g, r, Q, Q].
    """

    between: Tensor
    out: Tensor
    into: Tensor
    through: Tensor
    step: Tensor
    steps: Tensor


def _decays(view: View, dt: Tensor, a: Tensor, dtype: torch.dtype) -> _Decays:
    sums = [_sums(view, a, i) for i in range(2)]
    edges = [_edges(s, bool(i), dtype) for i, s in enumerate(sums)]
    out, into, through = (torch.stack(pair, -1) for pair in zip(*edges, strict=True))
    step = view.tokens(dt).to(dtype)
    size = step.shape[3]
    lower = torch.ones(size, size, dtype=torch.bool, device=a.device).tril_()
    between, other = (
        torch.empty(*sums[0].shape, size, dtype=dtype, device=a.device) for _ in range(2)
    )
    for s, decay in zip(sums, (between, other), strict=True):
        torch.sub(s[..., :, None], s[..., None, :], out=decay)
    # Chosen before it is exponentiated: the other triangle overflows.
    torch.where(lower, between, other, out=between)
    forward, backward = (t.mT[..., None, :] for t in step.unbind(-1))  # [k, b, g, r, 1, Q]
    steps = torch.where(lower, forward, backward, out=other)
    steps.diagonal(dim1=-2, dim2=-1).add_(backward[..., 0, :])
    return _Decays(between.exp2_(), out, into, through, step, steps)


def _sums(view: View, a: Tensor, direction: int) -> Tensor:
    """Running sums of the log-decays, base 2, in float64, [k, b, g, r, Q]."""
    one = view.tokens(a[..., direction, None])[..., 0].to(torch.float64)
    return cumulative(one.mT * LOG2_E, bool(direction))


def _edges(s: Tensor, reverse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`out`, `into` and `through` of one direction."""
    total = s[..., 0 if reverse else -1, None]
    out, into = (by_token(t, dtype)[..., 0] for t in (s.exp2(), (total - s).exp2_()))
    return out, into, total[..., 0].exp2().to(dtype)


def _backward_states(
    part: Part,
    runs: Sequence[Run],
    keys: Tensor,
    values: Tensor,
    dt: Tensor | None,
    a: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Of the backward direction, the state that comes into each run [b, g, N, r, P]; without `dt`,
    which the gradients of states do not have, the gradient of the one that leaves it."""
    reverse = dt is not None
    batch, heads = (s.stop - s.start for s in (part.batch, part.heads))
    state = keys.new_zeros(batch, heads, values.shape[3], keys.shape[3], dtype=dtype)
    state = part.transposed(state)
    found = [state] * len(runs)
    order = runs[::-1] if reverse else runs
    for run in order:
        found[run.place] = state.clone()  # without those of its other chunks
        if run is order[-1]:
            break  # what comes after it nobody asks for
        view = View(part, run)
        out, into, through = _edges(_sums(view, a, 1), True, dtype)
        scale = out if dt is None else into * view.tokens(dt)[..., 1].to(dtype)
        wrote = torch.mul(view.tokens(values), scale[..., None])
        added = added_by(view.group(keys, dtype), wrote)
        state = states_between(added, through, state, reverse)[0 if reverse else -1]
    return found


def _entering(
    added: Tensor, through: Tensor, entered: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """States before each chunk in the order of each direction [k, b, g, N, r, 2·P], of gradients in
    the opposite orders, and the one that the forward direction leaves the run with."""
    orders = (gradient, not gradient)
    states = [
        states_between(*one)
        for one in zip(
            added.chunk(2, -1), through.unbind(-1), entered.chunk(2, -1), orders, strict=True
        )
    ]
    both = [entering(s, reverse) for s, reverse in zip(states, orders, strict=True)]
    return torch.cat(both, -1), states[0][0 if gradient else -1]


def _of_pairs(between: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """What the pairs of tokens give the steps, and the log-decays before they are summed up; each
    [k, b, g, Q, r, 2]."""
    own = between.diagonal(dim1=-2, dim2=-1)  # without any decay
    steps, decays = [], []
    for i, half in enumerate((between.tril(-1), between.triu(1))):
        one = step[..., i].mT  # [k, b, g, r, Q]
        written = half.sum(-2)
        steps.append((written + own).mT)
        decays.append(((half @ one[..., None])[..., 0] - written * one).mT)
    return torch.stack(steps, -1), torch.stack(decays, -1)


def _both(x: Tensor, scale: Tensor) -> Tensor:
    """x [k, b, g, Q, r, P] times the scale [k, b, g, Q, r, 2] of each direction, [..., 2·P]."""
    return torch.mul(x[..., None, :], scale[..., None]).flatten(-2)


def _sum(x: Tensor) -> Tensor:
    """Of each direction, over its channels; [k, b, g, Q, r, 2]."""
    return x.unflatten(-1, (2, -1)).sum(-1)
