"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), the causal layer.

Tokens go through one projection, a short depthwise convolution and the scan of
`linfusion.kernels.ssd_scan`; x, B and C of the scan are what values, keys and queries are to
attention. State keys are those of `mamba_ssm`, so that its weights, and those of transformers'
Mamba-2, load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention.base import untouched
from linfusion.kernels import ssd_scan, ssd_step
from linfusion.kernels.elementwise import directional_conv, gated_rms_norm, one_pass

_FLOAT32 = ("A_log", "A_log_b", "dt_bias", "dt_bias_b", "D", "D_b")


class Mamba2State(NamedTuple):
    """What a causal scan carries from one run of tokens to the next.

    Attributes:
        conv: the last inputs of the convolution, [B, conv_dim, d_conv - 1].
        ssm: state after the last token, [B, H, P, N], float32 (float64 for float64 inputs).
    """

    conv: Tensor
    ssm: Tensor


class GatedRMSNorm(nn.Module):
    """Root-mean-square norm of groups of channels, with a gate before or after it.

    norm(y · silu(z)) · w, or norm(y) · w · silu(z), in float32 (float64 for float64).

    Args:
        channels: of y and z.
        groups: that are normalised apart.
        eps: added to the mean square.
        before_gate: whether the norm comes first.
    """

    def __init__(self, channels: int, groups: int, eps: float, before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps, self.before_gate = groups, eps, before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[B, L, channels] twice -> the same shape in the dtype of y."""
        if one_pass(y) and untouched(self, GatedRMSNorm, y):
            return self.of_sum(y, None, z)
        dtype = torch.promote_types(y.dtype, torch.float32)
        gate, wide = F.silu(z.to(dtype)), y.to(dtype)
        wide = wide if self.before_gate else wide * gate
        grouped = wide.unflatten(-1, (self.groups, -1))
        wide = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2)
        wide = wide * self.weight.to(dtype)
        return (wide * gate if self.before_gate else wide).to(y.dtype)

    def of_sum(self, y: Tensor, other: Tensor | None, z: Tensor, scale: float = 1.0) -> Tensor:
        """The norm of (y + other) · scale, by one kernel; as `forward`."""
        split = (self.groups, -1)
        return gated_rms_norm(
            y.unflatten(-1, split),
            self.weight.unflatten(0, split),
            other=None if other is None else other.unflatten(-1, split),
            z=z.unflatten(-1, split),
            eps=self.eps,
            scale=scale,
            gate_last=self.before_gate,
        ).flatten(-2)


class DepthwiseConv(nn.Conv1d):
    """A filter for each channel, over tokens whose channels come last.

    Args:
        channels: filters, [channels, 1, taps].
        taps: of each.
        bias: whether there is one.
    """

    def __init__(self, channels: int, taps: int, bias: bool = True) -> None:
        # The padding is where mamba_ssm has it; here tokens come padded.
        super().__init__(channels, channels, taps, groups=channels, padding=taps - 1, bias=bias)
        self.taps = taps

    def forward(self, x: Tensor) -> Tensor:
        """[B, L + taps - 1, C] -> [B, L, C].

        As a picture of one row, which is channels-last already: a third of the time of conv1d.
        """
        row = x.transpose(1, 2)[:, :, None]
        out = F.conv2d(row, self.weight[:, :, None], self.bias, groups=self.groups)
        return out[:, :, 0].transpose(1, 2)

    def along(self, x: Tensor, before: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
        """Of x [B, L, C] after a tail, with SiLU, by one kernel; and the tail after it."""
        known = 0
        if before is not None:
            x, known = continued(x, before, self.taps), self.taps - 1
        out, _ = directional_conv(x, self.filters, None, silu=silu)
        assert out is not None
        return out[:, known:], self.tail(x)

    def tail(self, x: Tensor) -> Tensor:
        """The last inputs [B, C, taps - 1] of x [B, L, C], after zeros where there are fewer."""
        short = x.shape[1] < self.taps - 1
        return tail_of(continued(x, None, self.taps) if short else x, self.taps)

    @property
    def filters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [C, taps] and bias [C], as `directional_conv` takes them."""
        return self.weight[:, 0], self.bias


class Float32Decays(nn.Module):
    """A module whose decays, steps and skip weights stay float32 where the rest is cast to less.

    They are a number a head, and a rounded one acts at every token: above 2, where bfloat16 is off
    by up to 0.008, A_log gives rates of decay that are off by 0.8 %.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {n: self._parameters[n] for n in _FLOAT32 if self._parameters.get(n) is not None}
        values = {n: p.data for n, p in before.items() if p is not None}
        super()._apply(fn, recurse)
        for name, value in values.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if value.dtype == torch.float32 and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = value.to(parameter.device)
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.data.float()
        return self


class Mamba2(Float32Decays):
    """The causal layer (Dao & Gu 2024, section 7; eq. 2 for the scan).

    [z0 | x0 | z | x B C | dt] = in_proj(u),  x B C = silu(conv(x B C)),
    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,  y_t = h_t C_t + D x_t,  out_proj(norm(y · silu(z)))

    Args:
        d_model: channels C of the tokens.
        d_state: features N of the state.
        d_conv: taps of the convolution.
        conv_init: its weights are drawn from (-conv_init, conv_init); None is PyTorch's default.
        expand: inner channels are expand · d_model.
        headdim: channels P of a head; it divides the channels of the scan.
        d_ssm: channels of the scan; what is left of the inner ones is a gated MLP. None is all.
        ngroups: G, of heads that share B and C; it divides the heads.
        A_init_range: -A is drawn from it.
        D_has_hdim: whether each channel, not each head, has its skip weight.
        rmsnorm: whether y is normalised, or only gated.
        norm_before_gate: whether the gate comes after the norm.
        dt_min, dt_max, dt_init_floor: range of the first steps Δ, drawn log-uniformly.
        dt_limit: smallest and largest Δ.
        bias, conv_bias: whether projections and convolution have one.
        chunk_size: of the scan; changes time and rounding only. None is what `ssd_scan` takes.
        norm_eps: of the norm.

    Raises:
        ValueError: a value that is out of range; the message names it and what is accepted.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv)
        if chunk_size is not None:
            check_sizes(chunk_size=chunk_size)
        d_inner = inner_channels(d_model, expand)
        d_ssm = d_inner if d_ssm is None else d_ssm
        check_sizes(d_ssm=d_ssm)
        if d_ssm > d_inner:
            raise ValueError(f"d_ssm: got {d_ssm}, expected at most {d_inner} inner channels")
        self.heads = head_count(d_ssm, headdim, ngroups)
        low, high = A_init_range
        if not 0 < low <= high:
            raise ValueError(f"A_init_range: got {A_init_range!r}, expected 0 < low <= high")
        self.d_mlp, self.d_ssm, self.conv_dim = (
            d_inner - d_ssm,
            d_ssm,
            d_ssm + 2 * ngroups * d_state,
        )
        self.headdim, self.ngroups, self.d_state = headdim, ngroups, d_state
        self.dt_limit, self.chunk_size = dt_limit, chunk_size

        rows = 2 * d_inner + 2 * ngroups * d_state + self.heads
        self.in_proj = nn.Linear(d_model, rows, bias=bias)
        self.conv1d = DepthwiseConv(self.conv_dim, d_conv, conv_bias)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = first_steps(self.heads, dt_min, dt_max, dt_init_floor)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(low, high).log())
        self.D = nn.Parameter(torch.ones(d_ssm if D_has_hdim else self.heads))
        spare_decay(self.dt_bias, self.A_log, self.D)
        self.norm = GatedRMSNorm(d_ssm, ngroups, norm_eps, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(
        self, u: Tensor, state: Mamba2State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Mamba2State]:
        """Tokens in, tokens out; token t sees tokens up to t.

        Args:
            u: [B, L, C].
            state: of the tokens before; not written to. None: there are none.
            return_state: also return the state after the last token.

        Returns:
            [B, L, C], or that and the state. Runs that carry the state are one run.

        Raises:
            ValueError: u or the state has another shape.
        """
        check_tokens(u, self.in_proj.in_features)
        features = self.ngroups * self.d_state
        z0, x0, z, xbc, dt = self.in_proj(u).split(
            [self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.heads], -1
        )
        taps, before = self.conv1d.taps, None if state is None else state.conv
        if one_pass(xbc) and untouched(self.conv1d, DepthwiseConv, xbc):
            xbc, tail = self.conv1d.along(xbc, before, True)
        else:
            padded = continued(xbc, before, taps)
            xbc, tail = F.silu(self.conv1d(padded)), tail_of(padded, taps)
        x, B, C = xbc.split([self.d_ssm, features, features], -1)
        x = x.unflatten(-1, (self.heads, self.headdim))
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        settings: dict[str, Any] = {
            "D": self.D.view(self.heads, -1) if self.D.numel() > self.heads else self.D,
            "dt_bias": self.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
        }
        A = decay(self.A_log)
        if state is not None and u.shape[1] == 1:
            y, h = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state.ssm, **settings)
            y = y[:, None]
        else:
            y, h = ssd_scan(
                x,
                dt,
                A,
                B,
                C,
                chunk_size=self.chunk_size,
                initial_states=None if state is None else state.ssm,
                return_final_states=True,
                **settings,
            )
        y = y.flatten(2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        out = self.out_proj(y)
        return (out, Mamba2State(tail, h)) if return_state else out


def continued(x: Tensor, tail: Tensor | None, taps: int) -> Tensor:
    """x [B, L, C] after the tail [B, C, taps - 1], or after zeros."""
    if tail is None:
        return F.pad(x, (0, 0, taps - 1, 0))
    expected = (x.shape[0], x.shape[2], taps - 1)
    if tail.shape != expected:
        raise ValueError(f"state: expected conv of shape {expected}, got {tuple(tail.shape)}")
    return torch.cat([tail.transpose(1, 2).to(x.dtype), x], 1)


def tail_of(padded: Tensor, taps: int) -> Tensor:
    return padded[:, padded.shape[1] - taps + 1 :].transpose(1, 2)


def decay(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def spare_decay(*parameters: nn.Parameter) -> None:
    """Ask optimisers not to decay them.

    Once they are registered: accelerate, which makes models without memory, knows no attribute.
    """
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def first_steps(heads: int, low: float, high: float, floor: float) -> nn.Parameter:
    """dt_bias whose softplus is log-uniform in (low, high)."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min: got {low} with dt_max {high}, expected 0 < dt_min <= dt_max")
    step = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return nn.Parameter(step + torch.log(-torch.expm1(-step)))


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive whole number")


def inner_channels(d_model: int, expand: float) -> int:
    inner = int(expand * d_model)
    if inner < 1:
        raise ValueError(f"expand: got {expand!r}, which leaves no inner channel of {d_model}")
    return inner


def head_count(channels: int, headdim: int, ngroups: int) -> int:
    check_sizes(headdim=headdim, ngroups=ngroups)
    if channels % headdim:
        divisors = (d for d in range(channels, 0, -1) if channels % d == 0)
        nearest = min(divisors, key=lambda d: abs(d - headdim))
        raise ValueError(
            f"headdim: got {headdim}, which does not divide {channels} channels; {nearest} does"
        )
    heads = channels // headdim
    if heads % ngroups:
        raise ValueError(f"ngroups: got {ngroups}, which does not divide {heads} heads")
    return heads


def check_tokens(u: Tensor, width: int) -> None:
    if u.dim() != 3 or u.shape[-1] != width:
        raise ValueError(f"u: expected [B, L, {width}], got {tuple(u.shape)}")
