"""Mamba-2 over the tokens of all ranks: states are folded as affine maps of what comes before.

A piece of a scan takes a state S to e^l S + F, where F is its final state from none and l the sum
of its Δ A. Every rank scans its pieces from no state; one gather of (F, l) tells it what they began
with, and what that adds to every token is one product (as in fla's context parallelism). The same
for the reversed direction, and for the inputs that a piece's convolution reads before its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.attention.mamba2.causal import Mamba2State, decay
from linfusion.kernels import ssd_scan
from linfusion.kernels.library import without_autocast
from linfusion.kernels.ssd.arguments import steps_of
from linfusion.parallel.ranks import Ranks, Run

Place = tuple[int, int]  # rank, and 0 for review tokens or 1 for tokens


def fold(parts: Tensor, logs: Tensor, order: Sequence[Place], end: int) -> Tensor:
    """The state before the piece at `end` of an order, from none.

    S = Σ_{j < end} exp(Σ_{j < i < end} l_i) F_j

    Args:
        parts: F of every piece, [W, 2, B, H, P·N].
        logs: l, [W, 2, B, H].
        order: the pieces in the order they are scanned.
        end: of those that count; all of them for the state after the last.
    """
    lasting = torch.stack([logs[place] for place in order])  # [pieces, B, H]
    reached = lasting.cumsum(0)
    seen = (reached[end - 1] - reached[:end]).exp() if end else reached[:0]
    # All ranks' graphs contain all pieces, so that all take part in the gather's backward.
    shares = torch.cat([seen, torch.zeros_like(reached[end:])])
    position = {place: i for i, place in enumerate(order)}
    natural = [(r, p) for r in range(parts.shape[0]) for p in range(parts.shape[1])]
    shares = torch.stack([shares[position[place]] for place in natural])
    return (shares[..., None] * parts.flatten(0, 1)).sum(0)


def tails_before(
    tails: Tensor, lengths: Sequence[Run], order: Sequence[Place], end: int
) -> tuple[Tensor, int]:
    """The last inputs before the piece at `end` of an order.

    Args:
        tails: the last inputs of every piece, [W, 2, B, taps - 1, C], zeros before short ones.
        lengths: of every rank's pieces.
        order, end: as for `fold`.

    Returns:
        [B, taps - 1, C], zeros where there are none, and how many there are.
    """
    reach = tails.shape[3]
    if not reach:
        return tails[0, 0], 0
    found: list[Tensor] = []
    for rank, part in reversed(order[:end]):
        for back in range(1, min(lengths[rank][part], reach) + 1):
            if len(found) < reach:
                found.append(tails[rank, part, :, reach - back])
    # Of zeros that all ranks' graphs contain, as for `fold`.
    none = (tails[0, 0] * 0)[:, len(found) :]
    return torch.cat([none, *(rows[:, None] for rows in reversed(found))], 1), len(found)


def bidirectional(
    ranks: Ranks,
    layer: Any,
    u: Tensor,
    lengths: Sequence[Run],
    lead_first: bool,
    past: Mamba2State | None = None,
) -> tuple[Tensor, Mamba2State]:
    """A `BiMamba2` ("flip_sum") over pieces of all ranks.

    Args:
        ranks: that have the other pieces.
        layer: the BiMamba2.
        u: this rank's pieces, [B, review + tokens, C].
        lengths: of every rank's pieces.
        lead_first: whether the backward direction, too, reads the review tokens first.
        past: of the tokens before, the same on all ranks.

    Returns:
        Its tokens [B, tokens, C], and the state after the last token of all, on all ranks.
    """
    world, heads = ranks.world, layer.heads
    review = [(r, 0) for r in range(world)]
    tokens = [(r, 1) for r in range(world)]
    forward = review + tokens
    backward = review[::-1] + tokens[::-1] if lead_first else forward[::-1]
    orders = (forward, backward)

    z, xbc, dt, bc_b, dt_b = layer.in_proj(u).split(layer.rows, -1)
    dt_b = dt_b if layer.rows[-1] else dt
    xbc_b = torch.cat([xbc[..., : layer.d_inner], bc_b], -1) if layer.rows[3] else xbc
    own = lengths[ranks.rank]
    inputs = [
        (a, b.flip(1))
        for a, b in zip(xbc.split(list(own), 1), xbc_b.split(list(own), 1), strict=True)
    ]
    steps = [
        torch.cat([a, b.flip(1)], -1)
        for a, b in zip(dt.split(list(own), 1), dt_b.split(list(own), 1), strict=True)
    ]
    reach = layer.conv1d.taps - 1
    ends = torch.stack([torch.stack([_last(x, reach) for x in pair]) for pair in inputs])
    tails = ranks.gather(ends)  # [W, part, direction, B, taps - 1, C]
    tail, known = tails_before(tails[:, :, 0], lengths, forward, len(forward))
    if past is not None:
        tail = _after(past.conv.transpose(1, 2).to(tail), tail, known)

    places = [part for part in (0, 1) if own[part]]
    scans = {}
    for part in places:
        before = []
        for way, order in enumerate(orders):
            seen, known = tails_before(
                tails[:, :, way], lengths, order, order.index((ranks.rank, part))
            )
            if past is not None and way == 0:
                seen = _after(past.conv.transpose(1, 2).to(seen), seen, known)
            before.append(seen)
        scans[part] = _scan(layer, inputs[part], before, steps[part])

    like = scans[places[0]]
    zeros = torch.zeros_like(like.final), torch.zeros_like(like.log[:, -1])
    finals, logs = zip(
        *((scans[p].final, scans[p].log[:, -1]) if p in scans else zeros for p in (0, 1)),
        strict=True,
    )
    packed = torch.cat([torch.stack(finals).flatten(3), torch.stack(logs)[..., None]], -1)
    states = ranks.gather(packed)  # [W, part, B, 2·heads, P·N + 1]
    parts, totals = states[..., :-1], states[..., -1]

    def state_at(way: int, end: int) -> Tensor:
        """[B, heads, P·N] before a piece of one direction."""
        chosen = slice(way * heads, (way + 1) * heads)
        found = fold(parts[..., chosen, :], totals[..., chosen], orders[way], end)
        if past is not None and way == 0:
            lasting = torch.zeros_like(totals[0, 0, :, chosen])
            for place in orders[0][:end]:
                lasting = lasting + totals[place][:, chosen]
            found = found + lasting.exp()[..., None] * past.ssm.flatten(2).to(found)
        return found

    out = []
    for part in places:
        began = torch.cat(
            [state_at(way, order.index((ranks.rank, part))) for way, order in enumerate(orders)], 1
        )
        y = scans[part].with_state(began)
        ahead, behind = y.split(heads, 2)
        out.append(ahead + behind.flip(1))
    y = torch.cat(out, 1)[:, own[0] :]
    y = (y / 2 if layer.average else y).flatten(2)
    z = z[:, own[0] :]
    y = layer.out_proj(y * F.silu(z) if layer.norm is None else layer.norm(y, z))
    ssm = state_at(0, len(forward)).view_as(like.final[:, :heads])
    return y, Mamba2State(tail.transpose(1, 2), ssm)


class _Scan:
    """One piece of both directions, scanned from no state.

    Attributes:
        y: [B, L, 2·heads, P].
        final: [B, 2·heads, P, N].
        log: Σ Δ A up to every token, [B, L, 2·heads].
    """

    def __init__(self, y: Tensor, final: Tensor, log: Tensor, C: Tensor) -> None:
        self.y, self.final, self.log, self.C = y, final, log, C

    def with_state(self, state: Tensor) -> Tensor:
        """y had the scan begun with `state` [B, 2·heads, P·N]."""
        groups = self.C.shape[2]
        wide = state.view_as(self.final).unflatten(1, (groups, -1))
        with without_autocast(state.device):  # as the scan itself
            read = torch.einsum("blgn,bgrpn->blgrp", self.C.to(wide.dtype), wide).flatten(2, 3)
        return (self.y + read * self.log.exp()[..., None]).to(self.y.dtype)


def _scan(layer: Any, inputs: Sequence[Tensor], before: Sequence[Tensor], dt: Tensor) -> _Scan:
    sizes = [layer.d_inner, layer.features, layer.features]
    convolved = [
        conv(torch.cat([tail.to(x.dtype), x], 1)).split(sizes, -1)
        for conv, tail, x in zip((layer.conv1d, layer.conv1d_b), before, inputs, strict=True)
    ]
    x, B, C = (layer._activated(torch.cat(pair, -1)) for pair in zip(*convolved, strict=True))
    x = x.unflatten(-1, (2 * layer.heads, layer.headdim))
    B = layer._normed(layer.norm_k, B.unflatten(-1, (2 * layer.ngroups, layer.d_state)))
    C = layer._normed(layer.norm_q, C.unflatten(-1, (2 * layer.ngroups, layer.d_state)))
    if layer.qk_norm is not None:
        C = C * layer.d_state**-0.5
    A = decay(torch.cat([layer.A_log, layer.A_log_b]))
    bias = torch.cat([layer.dt_bias, layer.dt_bias_b])
    y, final = ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=layer.chunk_size,
        D=torch.cat([layer.D, layer.D_b]),
        dt_bias=bias,
        dt_softplus=True,
        return_final_states=True,
    )
    limit = (0.0, float("inf"))
    log = (steps_of(dt, bias, True, limit, final.dtype) * A.to(final.dtype)).cumsum(1)
    return _Scan(y, final, log, C)


def _last(x: Tensor, reach: int) -> Tensor:
    """The last inputs of a piece [B, L, C], after zeros where there are fewer."""
    x = x[:, max(x.shape[1] - reach, 0) :]
    return F.pad(x, (0, 0, reach - x.shape[1], 0))


def _after(past: Tensor, tail: Tensor, known: int) -> Tensor:
    """A tail of which `known` inputs are there, and before them those of `past`."""
    reach = tail.shape[1]
    return torch.cat([past[:, known:], tail[:, reach - known :]], 1)
