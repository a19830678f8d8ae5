"""The scan in chunks (Dao & Gu 2024, Mamba-2, section 6): the production path without a GPU.

With s the running sum of the log-decays a inside a chunk, u = dt x, and h the state before it:

    y_i = Σ_{j≤i} (c_i·b_j) exp(s_i - s_j) u_j  +  exp(s_i) h c_i
    h ← exp(s_Q) h + Σ_j exp(s_Q - s_j) u_j b_jᵀ

A run of chunks of some heads is one batch of products. Nothing as long as the tokens is allocated
but the output, and one state a run for the backward pass, which computes the others again.

Sums of log-decays have two parts: exp(s_i - s_j) near 1 is lost in float32 where s is in the
thousands. What is not finite reaches the tokens that see it and no others: no product with 0 meets
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator
from linfusion.kernels.pages import empty_output
from linfusion.kernels.ssd.chunks import (
    View,
    add_seen,
    added_by,
    by_token,
    entering,
    parts_of,
    read_from,
    running,
    runs_of,
    seen,
    shifted,
    states_between,
    sums_of,
)
from linfusion.kernels.ssd.common import Choices, chunk_of, kept_states


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    choices: Choices,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, L, H, P], last state [B, H, P, N] and kept states; arguments as `reference`."""
    dtype = accumulator(x, dt, b, c)
    batch, length, heads, channels = x.shape
    y = empty_output(x.shape, x.dtype, x.device)
    final = torch.empty(batch, heads, channels, b.shape[3], dtype=dtype, device=x.device)
    count = kept_states(length, choices.chunk_size, "blocked")
    kept = final.new_empty(batch, count, *final.shape[1:])
    chunk, reverse = chunk_of(choices.chunk_size), choices.reverse
    for part in parts_of(x, b, chunk):
        state = final.new_zeros(final[part.batch, part.heads].shape)
        if initial is not None:
            state.copy_(initial[part.batch, part.heads])
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        state = part.transposed(state)
        for run in runs_of(length, chunk, reverse):
            kept[part.batch, run.place, part.heads] = part.restored(state)
            view = View(part, run)
            x_, b_, c_ = view.tokens(x), view.group(b, dtype), view.group(c, dtype)
            decay, out, into, through = _decays(view, a, reverse, dtype)
            step = view.tokens(dt[..., None]).to(dtype)  # [k, b, g, Q, r, 1]
            wrote = torch.mul(x_, into.mul_(step))
            states = states_between(added_by(b_, wrote), through, state, reverse)
            o = read_from(c_, entering(states, reverse)).mul_(out)  # [k, b, g, Q, r, P]
            u = torch.mul(x_.transpose(3, 4), step.transpose(3, 4)).contiguous()
            decay *= (c_ @ b_.mT)[:, :, :, None]
            add_seen(o.transpose(3, 4), decay, u, reverse)
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
    kept: Tensor,
    choices: Choices,
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
    chunk, reverse = chunk_of(choices.chunk_size), choices.reverse
    for part in parts_of(x, b, chunk):
        weight = None if skip is None else part.grouped(skip).to(dtype)[:, :, None]
        dstate = part.transposed(dfinal[part.batch, part.heads].to(dtype))
        for run in reversed(list(runs_of(x.shape[1], chunk, reverse))):
            view = View(part, run)
            x_, dy_ = view.tokens(x).to(dtype), view.tokens(dy).to(dtype)
            b_, c_ = view.group(b, dtype), view.group(c, dtype)
            decay, out, into, through = _decays(view, a, reverse, dtype)
            step = view.tokens(dt[..., None]).to(dtype)  # [k, b, g, Q, r, 1]
            # Of tokens and states: what wrote, and what asks for a gradient.
            wrote, asks = torch.mul(x_, into * step), torch.mul(dy_, out)
            entered = part.transposed(kept[part.batch, run.place, part.heads])
            h = entering(states_between(added_by(b_, wrote), through, entered, reverse), reverse)
            dstates = states_between(added_by(c_, asks), through, dstate, not reverse)
            dh = entering(dstates, not reverse)  # gradients of the states after each chunk

            u = torch.mul(x_.transpose(3, 4), step.transpose(3, 4)).contiguous()
            g = dy_.transpose(3, 4).contiguous()  # [k, b, g, r, Q, P]
            between = g @ u.mT  # [k, b, g, r, Q, Q]
            between *= seen(decay, reverse)
            dcb = between.sum(3)
            cb = (c_ @ b_.mT)[:, :, :, None]
            between *= cb
            decay *= cb
            # A token reads itself without any decay.
            between.diagonal(dim1=-2, dim2=-1).zero_()
            da_ = (between.sum(-1) - between.sum(-2)).mT  # [k, b, g, Q, r]

            view.add_group(dc, asks.flatten(4) @ h.flatten(4).mT, dcb @ b_)
            view.add_group(db, wrote.flatten(4) @ dh.flatten(4).mT, dcb.mT @ c_)
            da_ += (asks * read_from(c_, h)).sum(-1)
            du = read_from(b_, dh)  # [k, b, g, Q, r, P]
            da_ = running(da_, not reverse)
            da_ += shifted(running((wrote * du).sum(-1), reverse), reverse)
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


def _decays(
    view: View, a: Tensor, reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of token j at token i [k, b, g, r, Q, Q], of which `seen` holds; of the state
    before the chunk at token i and of token j after the chunk [k, b, g, Q, r, 1]; and of the state
    through the whole chunk [k, b, g, r]."""
    high, low = sums_of(view.tokens(a[..., None])[..., 0].mT.to(dtype), reverse)  # [k, b, g, r, Q]
    end = 0 if reverse else -1
    out = (high + low).exp2_()
    into = ((high[..., end, None] - high) + (low[..., end, None] - low)).exp2_()
    decay = high[..., :, None] - high[..., None, :]
    decay += low[..., :, None]
    decay -= low[..., None, :]
    return decay.exp2_(), by_token(out), by_token(into), out[..., end].contiguous()
