"""LinFusion's attention (Liu et al. 2024, arXiv:2409.02097): its learned map and its processors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention.base import Method, self_attention, unsupported
from linfusion.attention.fused import FusedLayer
from linfusion.kernels import linear_attention

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

NAME = "linfusion"
FUSED = "linfusion_fused"

_MLP = {0: "first", 1: "norm", 3: "last"}  # place in the authors' Sequential -> our name

_warned_undistilled = False


class ResidualMLP(nn.Module):
    """x + W₃ lrelu(LN(W₀x + b₀)) + b₃, or x + x where there is no MLP.

    Args:
        dim: channels of x.
        mid: hidden channels; -1 means no MLP, which the authors' code computes as x + x.
    """

    def __init__(self, dim: int, mid: int) -> None:
        super().__init__()
        self.mid = mid
        if mid == -1:
            return
        self.first = nn.Linear(dim, mid)
        self.norm = nn.LayerNorm(mid)
        self.last = nn.Linear(mid, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.mid == -1:
            return x + x
        t = self.norm(self.first(x))
        # Not in place where there are gradients: checkpointing runs it twice. What stands for a
        # tensor, as in `bounded`, may be a view.
        alone = type(t) is Tensor and not torch.is_grad_enabled()
        return x + self.last(F.leaky_relu(t, 0.01, inplace=alone))


class FeatureMap(nn.Module):
    """What LinFusion learns before the projections of a layer: one residual MLP each for q and k.

    A fresh one is the identity (its last Linear is zero) unless `projection_mid_dim` is -1.

    Args:
        dim: channels of the layer.
        projection_mid_dim: hidden channels of both MLPs; None means `dim`, -1 means no MLP.
    """

    def __init__(self, dim: int, projection_mid_dim: int | None = None) -> None:
        super().__init__()
        mid = dim if projection_mid_dim is None else projection_mid_dim
        if mid != -1 and mid < 1:
            raise ValueError(
                f"projection_mid_dim: got {projection_mid_dim}, expected None (= {dim}), -1 (no"
                " MLP) or a positive number of channels"
            )
        self.projection_mid_dim = projection_mid_dim
        self.map_q = ResidualMLP(dim, mid)
        self.map_k = ResidualMLP(dim, mid)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of `to_q` and `to_k`: [B, N, C] and [B, M, C]."""
        return self.map_q(x), self.map_k(context)


def key_weight(attention_mask: Tensor, tokens: int) -> Tensor:
    """Weights of the keys [B, M] that do what an attention mask does to softmax.

    A bias b_j that is added to every score of key j multiplies its exp(q·k_j) by exp(b_j).

    Args:
        attention_mask: bool (True keeps the key) or an additive bias; [B, M], [B, 1, M] or
            [B, 1, 1, M], where B may be 1.
        tokens: M.

    Raises:
        ValueError: the mask tells queries or heads apart, or has another length or dtype.
    """
    shape = tuple(attention_mask.shape)
    if attention_mask.ndim < 2 or any(n != 1 for n in shape[1:-1]) or shape[-1] != tokens:
        raise ValueError(
            f"attention_mask: got {shape}; linear attention takes one weight a key, so"
            f" [B, {tokens}], [B, 1, {tokens}] or [B, 1, 1, {tokens}]"
        )
    mask = attention_mask.reshape(shape[0], tokens)
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(
            f"attention_mask: got {mask.dtype}; expected bool (True keeps) or an additive float"
        )
    return mask.float().exp()


class LinFusionProcessor:
    """Attention processor of diffusers whose self-attention is linear in the number of tokens.

    o_i = φ(q_i)·S / (φ(q_i)·m + 1e-4),  S = mean_j φ(k_j)ᵀv_j,  m = mean_j φ(k_j),  φ = elu + 1,
    q = W_q(x + f(x)),  k = W_k(x + g(x)),  v = W_v x  (LinFusion, eq. 7), where f and g are the
    learned child `attn.linfusion` and 0 without it.

    Cross-attention stays softmax and goes through diffusers' backends. It has no state: one
    instance may serve every layer, as in `unet.set_attn_processor(LinFusionProcessor())`.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the layer.
            hidden_states: [B, N, C] or [B, C, H, W].
            encoder_hidden_states: text [B, M, C'] for cross-attention, further pixels [B, M, C] for
                self-attention, or None.
            attention_mask: see `key_weight` for self-attention; anything diffusers takes for
                cross-attention.
            temb: what the spatial norm of the layer is conditioned on, if it has one.

        Raises:
            ValueError: something that linear attention cannot honour; the message names it.
        """
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "encoder_hidden_states: got the tuple of an IP-Adapter, which needs its own"
                " processors on cross-attention; use linfusion.linearize(pipe), which leaves them"
                " in place, instead of set_attn_processor(LinFusionProcessor())"
            )
        reason = unsupported(attn)
        if reason is not None:
            raise ValueError(f"attn: LinFusionProcessor cannot serve this layer: {reason}")
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture = hidden_states.shape if hidden_states.ndim == 4 else None
        if picture is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if attn.is_cross_attention and encoder_hidden_states is not None:
            out = self._softmax(attn, hidden_states, encoder_hidden_states, attention_mask)
        else:
            out = self._linear(attn, hidden_states, encoder_hidden_states, attention_mask)

        if picture is not None:
            out = out.transpose(1, 2).reshape(picture[0], -1, *picture[2:])
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor if attn.rescale_output_factor != 1 else out

    def _linear(
        self, attn: Attention, x: Tensor, context: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        if self._parallel_config is not None:
            raise ValueError(
                "_parallel_config: LinFusionProcessor does not run under diffusers' context"
                " parallelism; it would see only its own share of the tokens"
            )
        tokens = (x if context is None else context).shape[1]
        weight = None if attention_mask is None else key_weight(attention_mask, tokens)
        fused = getattr(attn, FUSED, None)
        if fused is not None:
            _refuse_unfusable(attn, context)
            return attn.to_out[1](fused(x, weight))
        context = x if context is None else context
        child = getattr(attn, NAME, None)
        if child is None:
            _warn_undistilled()
            x_q, x_k = x, context
        else:
            x_q, x_k = child(x, context)
        q, k, v = (_heads(attn, t) for t in (attn.to_q(x_q), attn.to_k(x_k), attn.to_v(context)))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        out = linear_attention(q, k, v, key_weight=weight).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))

    def _softmax(
        self, attn: Attention, x: Tensor, context: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        batch, tokens, _ = context.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (_heads(attn, t) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2).to(q.dtype)))


class LinFusionPAGProcessor(LinFusionProcessor):
    """Perturbed-attention guidance (Ahn et al. 2024): the last part of the batch attends to itself.

    The batch is [conditional, perturbed]; each perturbed token sees its own value alone.
    """

    _parts = 2

    def _linear(
        self, attn: Attention, x: Tensor, context: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        straight = x.shape[0] // self._parts * (self._parts - 1)
        if x.shape[0] % self._parts or context is not None:
            raise ValueError(
                f"hidden_states: perturbed-attention guidance expects {self._parts} equal parts"
                f" and no context, got a batch of {x.shape[0]}"
            )
        if attention_mask is not None and attention_mask.shape[0] != 1:
            attention_mask = attention_mask[:straight]
        out = super()._linear(attn, x[:straight], None, attention_mask)
        perturbed = attn.to_out[1](attn.to_out[0](attn.to_v(x[straight:])))
        return torch.cat([out, perturbed])


class LinFusionPAGCFGProcessor(LinFusionPAGProcessor):
    """The same with classifier-free guidance: [unconditional, conditional, perturbed]."""

    _parts = 3


def _heads(attn: Attention, t: Tensor) -> Tensor:
    return t.unflatten(-1, (attn.heads, -1))


def _refuse_unfusable(attn: Attention, context: Tensor | None) -> None:
    """A fused layer computes from copies; what these cannot follow is an error."""
    if context is not None:
        raise ValueError(
            "encoder_hidden_states: a fused layer attends to its own input alone; call"
            " linfusion.unfuse first"
        )
    if attn.training and torch.is_grad_enabled():
        raise ValueError(
            "attn: a fused layer cannot be trained; call linfusion.unfuse, or model.eval()"
        )
    for name in ("to_q", "to_k", "to_v"):
        module = getattr(attn, name)
        if type(module) is not nn.Linear:
            raise ValueError(
                f"attn: {name} became a {type(module).__module__}.{type(module).__name__} after"
                " linfusion.fuse (a LoRA?),"
                " which would have no effect; call linfusion.unfuse first"
            )


def _warn_undistilled() -> None:
    global _warned_undistilled
    if _warned_undistilled or torch.compiler.is_compiling():
        return
    _warned_undistilled = True
    warnings.warn(
        "LinFusionProcessor runs on a layer without learned weights: pictures will be wrong until"
        " the weights of a distilled student are loaded, as in"
        ' linfusion.linearize(pipe, weights="Yuanshi/LinFusion-1-5").',
        UserWarning,
        stacklevel=3,
    )


def _mid(attn: Attention, projection_mid_dim: int | None) -> int:
    mid = attn.query_dim if projection_mid_dim is None else projection_mid_dim
    return max(mid, 0)


def _is_fresh(child: nn.Module) -> bool:
    lasts = [m.last for m in child.modules() if isinstance(m, ResidualMLP) and m.mid != -1]
    # Offloaded layer by layer, it cannot be looked at, and was not trained either.
    return all(p.is_meta or not p.any() for last in lasts for p in last.parameters())


def break_even_tokens(attn: Attention, projection_mid_dim: int | None) -> int:
    """Tokens N at which 8·C·mid + 4·C·D (two MLPs, linear core) equals 4·N·C (softmax core)."""
    return 2 * _mid(attn, projection_mid_dim) + attn.inner_dim // attn.heads


def state_bytes(attn: Attention) -> int:
    """fp32 S [H, D, D] and m [H, D]."""
    head_dim = attn.inner_dim // attn.heads
    return 4 * attn.heads * head_dim * (head_dim + 1)


# One layer of the authors' checkpoints: their names -> ours, below `attn1`.
_NUMBERED = {
    **{f"to_{x}_.{i}.": f"{NAME}.map_{x}.{ours}." for x in "qk" for i, ours in _MLP.items()},
    **{f"to_{x}.": f"to_{x}." for x in "qkv"},
    "to_out.0.": "to_out.0.",
}


def from_numbered(name: str) -> str:
    """`to_q_.0.weight` of the authors' files -> `linfusion.map_q.first.weight`."""
    head, _, leaf = name.rpartition(".")
    return _NUMBERED[f"{head}."] + leaf


def to_numbered(name: str) -> str:
    head, _, leaf = name.rpartition(".")
    return {ours: theirs for theirs, ours in _NUMBERED.items()}[f"{head}."] + leaf


def numbered_layer(dim: int, inner_dim: int, mid: int | None, bias: bool) -> nn.Module:
    """Holder of the tensors of one layer under the authors' names."""

    def mlp() -> nn.Module:
        hidden = dim if mid is None else mid
        if hidden == -1:
            return nn.Identity()
        return nn.Sequential(
            nn.Linear(dim, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, dim),
        )

    layer = nn.Module()
    for x in "qkv":
        layer.add_module(f"to_{x}", nn.Linear(dim, inner_dim, bias=bias))
    layer.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(0.0)])
    layer.to_q_, layer.to_k_ = mlp(), mlp()
    return layer


def _settings(
    paths: Iterable[str], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Hidden channels of the two MLPs of every layer."""
    unknown = sorted(set(options) - {"projection_mid_dim"})
    if unknown:
        raise ValueError(
            f"{unknown[0]}: method 'linfusion' has no such option; it has projection_mid_dim"
        )
    mid = options.get("projection_mid_dim")
    if stored is None:
        return dict.fromkeys(paths, mid)
    if mid is not None:
        raise ValueError(f"projection_mid_dim: got {mid}, but the weights say what it is")
    return dict(stored)


METHOD = Method(
    name=NAME,
    processor=LinFusionProcessor,
    layers=lambda model: self_attention(model, processor=LinFusionProcessor),
    setting_key="projection_mid_dim",
    settings=_settings,
    child=lambda attn, mid: FeatureMap(attn.query_dim, mid),
    is_fresh=_is_fresh,
    break_even_tokens=break_even_tokens,
    state_bytes=state_bytes,
    student='weights="Yuanshi/LinFusion-1-5"',
    fused_name=FUSED,
    fused=lambda attn, child, dtype: FusedLayer(attn, cast(FeatureMap | None, child), dtype),
    pag_processors=lambda: (LinFusionPAGCFGProcessor(), LinFusionPAGProcessor()),
)
