"""Mamba-2 over tokens that have no first one, in its two bidirectional forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention.mamba2.causal import (
    DepthwiseConv,
    Float32Decays,
    GatedRMSNorm,
    Mamba2State,
    check_sizes,
    check_tokens,
    continued,
    decay,
    first_steps,
    head_count,
    inner_channels,
    spare_decay,
    tail_of,
)
from linfusion.attention.mamba2.one_pass import both_ways, both_ways_in_one_pass, joined
from linfusion.attention.mamba2.qk_norms import QK_NORMS, make_qk_norm
from linfusion.kernels import ssd_scan

if TYPE_CHECKING:
    pass

DIRECTIONS = ("flip_sum", "hydra")
OPTIONS = ("d_conv", "chunk_size", "share_bc", "share_dt", "average")  # of `like_attention`


class BiMamba2(Float32Decays):
    """Mamba-2 over tokens that have no first one: two scans, in opposite directions, in one call.

    "flip_sum" (Zhu et al. 2024, Vision Mamba, arXiv:2401.09417) adds a second scan of the reversed
    tokens; both contain the token itself. The forward direction has the parameters of `Mamba2`, the
    backward one its own convolution, A, D, Δ (`conv1d_b`, `A_log_b`, `D_b`, `dt_bias_b`, and the
    last rows of in_proj), and z, x, B, C are shared. A checkpoint of `Mamba2` loads: what the
    backward direction lacks is copied from the forward one.

    "hydra" (Hwang et al. 2024, Hydra, arXiv:2407.09941, section 3) is a quasiseparable matrix, with
    the keys of the authors' module: B, C, Δ of each direction, a centred convolution, shared A,
    each scan shifted by one token, and a diagonal x · (fc_D(x) + D).

    Args:
        d_model: channels C of the tokens.
        d_state: features N of the state.
        d_conv: taps of the convolution; odd for "hydra", whose authors take 7.
        expand: inner channels are expand · d_model.
        headdim: channels P of a head; it divides the inner channels.
        ngroups: G, of heads that share B and C; it divides the heads.
        bidirectional: "flip_sum" or "hydra".
        conv_act: "silu" after the convolution, or None (layers made from attention).
        rmsnorm: whether y is normalised, or only gated.
        bias: whether the projections have one.
        chunk_size: of the scan; changes time and rounding only. None is what `ssd_scan` takes.
        norm_eps: of the norm.
        qk_norm: of B and C after the convolution, for layers made from attention that norms its
            keys and queries: one of `QK_NORMS`, as diffusers calls them, or None. C is then scaled
            by 1/√N, as scores are there.
        qk_norm_eps: of that; None is PyTorch's default.
        share_bc, share_dt: of "flip_sum", whether both directions have the same rows of in_proj for
            B and C, and for Δ (the bias of Δ is never shared). "hydra" shares neither.
        average: of "flip_sum", halve the sum of the directions, so that a token's own share, which
            both have, counts once.

    Raises:
        ValueError: a value that is out of range; the message names it and what is accepted.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        bidirectional: str = "flip_sum",
        conv_act: str | None = "silu",
        rmsnorm: bool = True,
        bias: bool = False,
        chunk_size: int | None = None,
        norm_eps: float = 1e-5,
        qk_norm: str | None = None,
        qk_norm_eps: float | None = 1e-6,
        share_bc: bool = True,
        share_dt: bool = False,
        average: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv)
        if chunk_size is not None:
            check_sizes(chunk_size=chunk_size)
        if bidirectional not in DIRECTIONS:
            raise ValueError(f"bidirectional: got {bidirectional!r}, expected one of {DIRECTIONS}")
        if conv_act not in ("silu", None):
            raise ValueError(f"conv_act: got {conv_act!r}, expected 'silu' or None")
        hydra = bidirectional == "hydra"
        if hydra and d_conv % 2 == 0:
            raise ValueError(f"d_conv: got {d_conv}, expected an odd number for 'hydra'")
        for name, value, usual in (
            ("qk_norm", qk_norm, None),
            ("share_bc", share_bc, True),
            ("share_dt", share_dt, False),
            ("average", average, False),
        ):
            if name != "qk_norm" and type(value) is not bool:
                raise ValueError(f"{name}: got {value!r}, expected True or False")
            if hydra and value != usual:
                raise ValueError(f"{name}: got {value!r}, expected {usual} for 'hydra'")
        if qk_norm is not None and qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm: got {qk_norm!r}, expected one of {QK_NORMS} or None")
        d_inner = inner_channels(d_model, expand)
        self.heads = head_count(d_inner, headdim, ngroups)
        self.d_inner, self.headdim = d_inner, headdim
        self.ngroups, self.d_state, self.features = ngroups, d_state, ngroups * d_state
        self.bidirectional, self.conv_act, self.chunk_size = bidirectional, conv_act, chunk_size
        self.average = average

        conv_dim = d_inner + (4 if hydra else 2) * self.features
        # Rows of in_proj: z, x B C, dt, then those of the backward direction alone.
        self.rows = [
            d_inner,
            conv_dim,
            self.heads,
            0 if share_bc else 2 * self.features,
            0 if share_dt else self.heads,
        ]
        self.in_proj = nn.Linear(d_model, sum(self.rows), bias=bias)
        self.conv1d = DepthwiseConv(conv_dim, d_conv)
        self.dt_bias = first_steps(self.heads, 0.001, 0.1, 1e-4)
        if hydra:
            self.A_log = nn.Parameter(torch.zeros(self.heads))
            self.D = nn.Parameter(torch.ones(self.heads))
            self.fc_D = nn.Linear(d_inner, self.heads, bias=False)
        else:
            self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
            self.D = nn.Parameter(torch.ones(self.heads))
            self.conv1d_b = DepthwiseConv(conv_dim, d_conv)
            self.conv1d_b.load_state_dict(self.conv1d.state_dict())
            self.dt_bias_b = nn.Parameter(self.dt_bias.detach().clone())
            self.A_log_b = nn.Parameter(self.A_log.detach().clone())
            self.D_b = nn.Parameter(self.D.detach().clone())
            spare_decay(self.dt_bias_b, self.A_log_b, self.D_b)
            self.register_load_state_dict_pre_hook(_complete)
        spare_decay(self.dt_bias, self.A_log, self.D)
        self.norm = GatedRMSNorm(d_inner, ngroups, norm_eps, hydra) if rmsnorm else None
        self.qk_norm = qk_norm
        self.norm_q = make_qk_norm(qk_norm, qk_norm_eps, d_state, self.features)
        self.norm_k = make_qk_norm(qk_norm, qk_norm_eps, d_state, self.features)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    @classmethod
    def like_attention(
        cls,
        width: int,
        heads: int,
        *,
        qk_norm: str | None,
        qk_norm_eps: float | None,
        **options: Any,
    ) -> BiMamba2:
        """A layer of the shape that takes over attention of `heads` heads over `width` channels.

        Args:
            width: channels outside and inside; the heads divide it.
            heads: of the attention.
            qk_norm, qk_norm_eps: as `qk_norm_of` finds them.
            options: `d_conv`, `chunk_size`, `share_bc`, `share_dt` and `average` of the layer.

        Raises:
            ValueError: an option there is not, or a value that is out of range.
        """
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"{unknown[0]}: expected only {', '.join(OPTIONS)} as options")
        head = width // heads
        return cls(
            width,
            d_state=head,
            expand=1,
            headdim=head,
            ngroups=heads,
            conv_act=None,
            rmsnorm=False,
            bias=True,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            **options,
        )

    def forward(
        self,
        u: Tensor,
        state: Mamba2State | None = None,
        return_state: bool = False,
        *,
        lead: int = 0,
        lead_first: bool = True,
    ) -> Tensor | tuple[Tensor, Mamba2State]:
        """Tokens in, tokens out; every token sees all of them.

        Args:
            u: [B, L, C].
            state: that the forward direction takes over from the tokens before; the backward one
                starts afresh. "flip_sum" alone has one. It is not written to.
            return_state: also return the state after the last token.
            lead: so many tokens come before the others and are read, but not returned.
            lead_first: whether both directions read those first, each in its own order, or the
                backward direction last.

        Returns:
            [B, L - lead, C], or that and the state of the forward direction.

        Raises:
            ValueError: u or the state has another shape, `lead` leaves no token, or there is a
                state for "hydra".
        """
        check_tokens(u, self.in_proj.in_features)
        if not 0 <= lead < u.shape[1]:
            raise ValueError(f"lead: got {lead}, expected 0 to {u.shape[1] - 1}")
        first = lead if lead_first else 0
        z, xbc, dt, bc_b, dt_b = self.in_proj(u).split(self.rows, -1)
        if not self.rows[-1]:
            dt_b = dt
        y_b = None
        if self.bidirectional == "flip_sum" and both_ways_in_one_pass(self, u):
            bc_b = bc_b if self.rows[3] else None
            y, y_b, carried = both_ways(self, xbc, bc_b, (dt, dt_b), state, first, lead)
        elif self.bidirectional == "flip_sum":
            xbc_b = torch.cat([xbc[..., : self.d_inner], bc_b], -1) if self.rows[3] else xbc
            y, carried = self._flip_sum((xbc, xbc_b), (dt, dt_b), state, first, lead)
        elif state is not None or return_state:
            raise ValueError("state: 'hydra' has none, its convolution sees what is to come")
        else:
            y = self._hydra(xbc, dt, dt_b, first, lead)
        y, z = y.flatten(2), z[:, lead:]
        if y_b is not None:
            y = joined(self, y, y_b.flatten(2), z)
        else:
            y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        out = self.out_proj(y)
        return (out, carried) if return_state else out

    def _flip_sum(
        self,
        xbc: tuple[Tensor, Tensor],
        dt: tuple[Tensor, Tensor],
        state: Mamba2State | None,
        first: int,
        lead: int,
    ) -> tuple[Tensor, Mamba2State]:
        """y [B, L - lead, H, P]; the two directions are heads of one scan."""
        padded = continued(xbc[0], None if state is None else state.conv, self.conv1d.taps)
        padded_b = continued(_flipped(xbc[1], first), None, self.conv1d_b.taps)
        sizes = [self.d_inner, self.features, self.features]
        x, B, C = (
            self._activated(torch.cat(pair, -1))
            for pair in zip(
                self.conv1d(padded).split(sizes, -1),
                self.conv1d_b(padded_b).split(sizes, -1),
                strict=True,
            )
        )
        x = x.unflatten(-1, (2 * self.heads, self.headdim))
        B = self._normed(self.norm_k, B.unflatten(-1, (2 * self.ngroups, self.d_state)))
        C = self._normed(self.norm_q, C.unflatten(-1, (2 * self.ngroups, self.d_state)))
        if self.qk_norm is not None:
            C = C * self.d_state**-0.5
        initial = None
        if state is not None:
            initial = torch.cat([state.ssm, torch.zeros_like(state.ssm)], 1)
        y, h = ssd_scan(
            x,
            torch.cat([dt[0], _flipped(dt[1], first)], -1),
            decay(torch.cat([self.A_log, self.A_log_b])),
            B,
            C,
            chunk_size=self.chunk_size,
            D=torch.cat([self.D, self.D_b]),
            dt_bias=torch.cat([self.dt_bias, self.dt_bias_b]),
            dt_softplus=True,
            initial_states=initial,
            return_final_states=True,
        )
        forward, backward = y.split(self.heads, 2)
        y = forward[:, lead:] + _flipped(backward, first)[:, lead:]
        if self.average:
            y = y / 2
        return y, Mamba2State(tail_of(padded, self.conv1d.taps), h[:, : self.heads])

    def _hydra(self, xbc: Tensor, dt: Tensor, dt_b: Tensor, first: int, lead: int) -> Tensor:
        """y [B, L - lead, H, P]."""
        around = self.conv1d.taps // 2
        xbc = self._activated(self.conv1d(F.pad(xbc, (0, 0, around, around))))
        x, bc, bc_b = xbc.split([self.d_inner, 2 * self.features, 2 * self.features], -1)
        heads = x.unflatten(-1, (self.heads, self.headdim))
        B, C = (
            torch.cat([a, b], -1).unflatten(-1, (2 * self.ngroups, self.d_state))
            for a, b in zip(bc.chunk(2, -1), _flipped(bc_b, first).chunk(2, -1), strict=True)
        )
        y = ssd_scan(
            torch.cat([heads, _flipped(heads, first)], 2),
            torch.cat([dt, _flipped(dt_b, first)], -1),
            decay(self.A_log).repeat(2),
            B,
            C,
            chunk_size=self.chunk_size,
            dt_bias=self.dt_bias.repeat(2),
            dt_softplus=True,
        )
        # One step later each: a scan is then strictly before the token, and the diagonal is apart.
        y = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0))
        forward, backward = y.split(self.heads, 2)
        y = forward[:, lead:] + _flipped(backward, first)[:, lead:]
        diagonal = self.fc_D(x[:, lead:])
        diagonal = diagonal + self.D.to(diagonal.dtype)
        return y + heads[:, lead:] * diagonal[..., None]

    def _activated(self, x: Tensor) -> Tensor:
        return x if self.conv_act is None else F.silu(x)

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """[B, L, 2·G, N] of both directions, normed as queries or keys are."""
        if norm is None:
            return x
        if self.qk_norm is not None and self.qk_norm.endswith("across_heads"):
            x = x.unflatten(2, (2, self.ngroups)).flatten(-2)
            return norm(x).unflatten(-1, (self.ngroups, self.d_state)).flatten(2, 3)
        normed: Tensor = norm(x)
        return normed


def _complete(
    layer: nn.Module, state: dict[str, Any], prefix: str, *args: object, **kwargs: object
) -> None:
    """Before loading: the backward direction of a `Mamba2` checkpoint is a copy of the forward."""
    assert isinstance(layer, BiMamba2)
    for name in ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"):
        head, dot, leaf = name.partition(".")
        backward = f"{prefix}{head}_b{dot}{leaf}"
        if prefix + name in state and backward not in state:
            state[backward] = state[prefix + name]
    z, xbc, dt, bc_b, dt_b = layer.rows
    for name in ("in_proj.weight", "in_proj.bias"):
        rows = state.get(prefix + name)
        if rows is not None and rows.shape[0] == z + xbc + dt and (bc_b or dt_b):
            both = rows[z + xbc - bc_b : z + xbc], rows[z + xbc + dt - dt_b :]
            state[prefix + name] = torch.cat([rows, *both])


def _flipped(x: Tensor, first: int) -> Tensor:
    """The leading `first` tokens of [B, L, ...] reversed, and the others; its own inverse."""
    if not first:
        return x.flip(1)
    return torch.cat([x[:, :first].flip(1), x[:, first:].flip(1)], 1)
