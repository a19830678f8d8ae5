"""Mamba-2 in both directions where kernels do what operators do: nothing is turned around.

The forward direction scans the tokens as they are. The backward one is scanned from its end, in the
order that `directional_conv` writes: with the leading tokens that it reads first behind the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linfusion.attention.base import untouched
from linfusion.attention.mamba2.causal import DepthwiseConv, GatedRMSNorm, Mamba2State, decay
from linfusion.attention.mamba2.qk_norms import normed
from linfusion.kernels import ssd_scan
from linfusion.kernels.elementwise import directional_conv, gated_rms_norm, one_pass

if TYPE_CHECKING:
    from linfusion.attention.mamba2.bidirectional import BiMamba2

Parts = tuple[Tensor, Tensor, Tensor]


def both_ways_in_one_pass(layer: BiMamba2, u: Tensor) -> bool:
    """Whether the kernels do what the convolutions of a layer do."""
    convs = (layer.conv1d, layer.conv1d_b)
    return one_pass(u) and all(untouched(conv, DepthwiseConv, u) for conv in convs)


def both_ways(
    layer: BiMamba2,
    xbc: Tensor,
    bc_b: Tensor | None,
    dt: tuple[Tensor, Tensor],
    state: Mamba2State | None,
    first: int,
    lead: int,
) -> tuple[Tensor, Tensor, Mamba2State]:
    """Both scans of "flip_sum".

    Args:
        layer: the layer.
        xbc: inputs of the convolutions, [B, L, channels].
        bc_b: those for B and C of the backward direction, or None if they are the same.
        dt: steps of each direction, [B, L, H].
        state: of the tokens before, for the forward direction.
        first: leading tokens that the backward direction reads first.
        lead: leading tokens that are not returned; `first` is that or 0.

    Returns:
        Results of each direction, [B, L - lead, H, P], and the state after the last token.
    """
    ahead, behind, tail = _convolved(layer, xbc, bc_b, state, first)
    y, h = _scanned(layer, ahead, layer.A_log, layer.D, layer.dt_bias, dt[0], state, False)
    step = dt[1]
    if first:
        step = torch.cat([step[:, first:], step[:, :first]], 1)
    y_b, _ = _scanned(layer, behind, layer.A_log_b, layer.D_b, layer.dt_bias_b, step, None, True)
    y_b = y_b[:, lead - first : y_b.shape[1] - first]
    return y[:, lead:], y_b, Mamba2State(tail, h)


def joined(layer: BiMamba2, y: Tensor, y_b: Tensor, z: Tensor) -> Tensor:
    """The sum of both directions, gated and normed: [B, L, C] each."""
    scale = 0.5 if layer.average else 1.0
    if layer.norm is None:
        y, y_b, z = (t.unflatten(-1, (1, -1)) for t in (y, y_b, z))
        return gated_rms_norm(y, None, other=y_b, z=z, scale=scale).flatten(2)
    if untouched(layer.norm, GatedRMSNorm, y):
        return layer.norm.of_sum(y, y_b, z, scale)
    out: Tensor = layer.norm((y + y_b) * scale, z)
    return out


def _convolved(
    layer: BiMamba2, xbc: Tensor, bc_b: Tensor | None, state: Mamba2State | None, first: int
) -> tuple[Parts, Parts, Tensor]:
    """x, B and C of each direction, and the tail of the forward one."""
    silu = layer.conv_act is not None
    weight, bias = layer.conv1d_b.filters
    sizes = [layer.d_inner, layer.features, layer.features]
    if state is None and bc_b is None:
        ahead, behind = directional_conv(
            xbc, layer.conv1d.filters, (weight, bias), first=first, silu=silu
        )
        assert ahead is not None and behind is not None
        return _parts(ahead, sizes), _parts(behind, sizes), layer.conv1d.tail(xbc)
    ahead, tail = layer.conv1d.along(xbc, None if state is None else state.conv, silu)
    if bc_b is None:
        bc_b = xbc[..., layer.d_inner :]
    pieces = []
    for part, rows in (
        (xbc[..., : layer.d_inner], slice(layer.d_inner)),
        (bc_b, slice(layer.d_inner, None)),
    ):
        own = weight[rows], None if bias is None else bias[rows]
        _, behind = directional_conv(part, None, own, first=first, silu=silu)
        assert behind is not None
        pieces.append(behind)
    B, C = pieces[1].chunk(2, -1)
    return _parts(ahead, sizes), (pieces[0], B, C), tail


def _parts(x: Tensor, sizes: list[int]) -> Parts:
    a, b, c = x.split(sizes, -1)
    return a, b, c


def _scanned(
    layer: BiMamba2,
    parts: Parts,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt: Tensor,
    state: Mamba2State | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    x, B, C = parts
    heads, groups = (layer.heads, layer.headdim), (layer.ngroups, layer.d_state)
    across = (layer.qk_norm or "").endswith("across_heads")
    if not across:
        B, C = B.unflatten(-1, groups), C.unflatten(-1, groups)
    B = normed(layer.norm_k, B)
    C = normed(layer.norm_q, C, 1.0 if layer.qk_norm is None else layer.d_state**-0.5)
    if across:
        B, C = B.unflatten(-1, groups), C.unflatten(-1, groups)
    return ssd_scan(
        x.unflatten(-1, heads),
        dt,
        decay(A_log),
        B,
        C,
        chunk_size=layer.chunk_size,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        initial_states=None if state is None else state.ssm,
        return_final_states=True,
        reverse=reverse,
    )
