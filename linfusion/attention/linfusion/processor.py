"""LinFusion's attention (Liu et al. 2024, arXiv:2409.02097): its learned map and its processors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linfusion.attention.base import SelfAttentionProcessor, projected, projected_out
from linfusion.attention.linfusion.feature_map import NAME
from linfusion.kernels import linear_attention

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

FUSED = "linfusion_fused"
STALE = (
    "attn: its weights were changed after linfusion.fuse (a LoRA merged into them, or others"
    " loaded), which would have no effect; call linfusion.unfuse, then linfusion.fuse again"
)


_warned_undistilled = False


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


class LinFusionProcessor(SelfAttentionProcessor):
    """Attention processor of diffusers whose self-attention is linear in the number of tokens.

    o_i = φ(q_i)·S / (φ(q_i)·m + 1e-4),  S = mean_j φ(k_j)ᵀv_j,  m = mean_j φ(k_j),  φ = elu + 1,
    q = W_q(x + f(x)),  k = W_k(x + g(x)),  v = W_v x  (LinFusion, eq. 7), where f and g are the
    learned child `attn.linfusion` and 0 without it.

    Cross-attention stays softmax and goes through diffusers' backends. It has no state: one
    instance may serve every layer, as in `unet.set_attn_processor(LinFusionProcessor())`.
    """

    def attend(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Linear attention; `attention_mask` as `key_weight` takes it.

        Raises:
            ValueError: a mask that tells queries or heads apart, or what `fuse` cannot follow.
        """
        x, context = hidden_states, encoder_hidden_states
        tokens = (x if context is None else context).shape[1]
        weight = None if attention_mask is None else key_weight(attention_mask, tokens)
        fused = getattr(attn, FUSED, None)
        if fused is not None:
            _refuse_unfusable(attn, fused, context)
            return attn.to_out[1](fused(x, weight))
        context = x if context is None else context
        child = getattr(attn, NAME, None)
        if child is None:
            _warn_undistilled()
            x_q, x_k = x, context
        else:
            x_q, x_k = child(x, context)
        q, k, v = projected(attn, x_q, x_k, context)
        return projected_out(attn, linear_attention(q, k, v, key_weight=weight))


class LinFusionPAGProcessor(LinFusionProcessor):
    """Perturbed-attention guidance (Ahn et al. 2024): the last part of the batch attends to itself.

    The batch is [conditional, perturbed]; each perturbed token sees its own value alone.
    """

    _parts = 2

    def attend(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Linear attention for all but the last part of the batch.

        Raises:
            ValueError: as `LinFusionProcessor`, or a batch that does not have the parts.
        """
        x, context = hidden_states, encoder_hidden_states
        straight = x.shape[0] // self._parts * (self._parts - 1)
        if x.shape[0] % self._parts or context is not None:
            raise ValueError(
                f"hidden_states: perturbed-attention guidance expects {self._parts} equal parts"
                f" and no context, got a batch of {x.shape[0]}"
            )
        if attention_mask is not None and attention_mask.shape[0] != 1:
            attention_mask = attention_mask[:straight]
        out = super().attend(attn, x[:straight], None, attention_mask)
        perturbed = projected_out(attn, attn.to_v(x[straight:]))
        return torch.cat([out, perturbed])


class LinFusionPAGCFGProcessor(LinFusionPAGProcessor):
    """The same with classifier-free guidance: [unconditional, conditional, perturbed]."""

    _parts = 3


def _refuse_unfusable(attn: Attention, fused: Any, context: Tensor | None) -> None:
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
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        module = attn.get_submodule(name)
        if type(module) is not nn.Linear:
            raise ValueError(
                f"attn: {name} became a {type(module).__module__}.{type(module).__name__} after"
                " linfusion.fuse (a LoRA?),"
                " which would have no effect; call linfusion.unfuse first"
            )
    if not torch.compiler.is_compiling() and fused.is_stale(attn):
        raise ValueError(STALE)


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
