"""What processors share: the way around a layer, softmax beside it, and what all of them refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linfusion.attention.method import unsupported

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class Processor:
    """Base of our attention processors: no arguments, no state, one instance for every layer.

    diffusers sets the two class attributes when a backend is chosen or a model is split over ranks.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def refuse_context_parallelism(self) -> None:
        """Refuse to attend to a share of the tokens as if it were all of them.

        Raises:
            ValueError: diffusers' context parallelism is on.
        """
        if self._parallel_config is not None:
            raise ValueError(
                f"_parallel_config: {type(self).__name__} does not run under diffusers'"
                " enable_parallelism, where it would see only its own share of the tokens; call"
                " linfusion.parallelize(pipe) instead"
            )

    def refuse_mask(self, attention_mask: Tensor | None, why: str) -> None:
        """Refuse a mask that the mechanism cannot honour.

        Raises:
            ValueError: there is one; the message says `why`.
        """
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask: got one of shape {tuple(attention_mask.shape)}; {why}"
            )

    def softmax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Softmax attention by the backend that the user chose, [B, N, H, D] in the dtype of q."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: Tensor = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            scale=scale,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out.to(q.dtype)


class SelfAttentionProcessor(Processor):
    """Processor of diffusers' class `Attention` whose self-attention is a mechanism's own.

    A subclass writes `attend`. Norms of the layer, pictures as [B, C, H, W], residual and rescaling
    are done here; cross-attention stays softmax and goes through diffusers' backends.
    """

    def attend(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """The mechanism, with the layer's projections before and after it.

        Args:
            attn: the layer.
            hidden_states: queries come from these [B, N, C].
            encoder_hidden_states: keys and values come from these [B, M, C]; None means from
                `hidden_states`.
            attention_mask: as diffusers hands it on.

        Returns:
            [B, N, C], after `to_out`.
        """
        raise NotImplementedError

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
            attention_mask: what the mechanism takes for self-attention; anything diffusers takes
                for cross-attention.
            temb: what the spatial norm of the layer is conditioned on, if it has one.

        Raises:
            ValueError: something that the mechanism cannot honour; the message names it.
        """
        name = type(self).__name__
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "encoder_hidden_states: got the tuple of an IP-Adapter, which needs its own"
                " processors on cross-attention; use linfusion.linearize(pipe), which leaves them"
                f" in place, instead of set_attn_processor({name}())"
            )
        reason = unsupported(attn)
        if reason is not None:
            raise ValueError(f"attn: {name} cannot serve this layer: {reason}")
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture = hidden_states.shape if hidden_states.ndim == 4 else None
        if picture is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if attn.is_cross_attention and encoder_hidden_states is not None:
            out = self._cross_attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        else:
            self.refuse_context_parallelism()
            out = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask)

        if picture is not None:
            out = out.transpose(1, 2).reshape(picture[0], -1, *picture[2:])
        return finished(attn, out, residual)

    def _cross_attend(
        self, attn: Attention, x: Tensor, context: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        batch, tokens, _ = context.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = projected(attn, x, context, context)
        return projected_out(attn, self.softmax(q, k, v, attention_mask=attention_mask))


def projected(
    attn: Attention, for_q: Tensor, for_k: Tensor, for_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, N, H, D] of what goes into each projection [B, N, C], normed a head at a time."""
    q, k, v = (
        linear(x).unflatten(-1, (attn.heads, -1))
        for linear, x in ((attn.to_q, for_q), (attn.to_k, for_k), (attn.to_v, for_v))
    )
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    return q, k, v


def projected_out(attn: Any, x: Tensor) -> Tensor:
    """[B, N, H, D] or [B, N, H·D] -> [B, N, C], by the layer's projection and dropout."""
    out: Tensor = attn.to_out[1](attn.to_out[0](x.flatten(2)))
    return out


def finished(attn: Attention, out: Tensor, residual: Tensor) -> Tensor:
    """With the layer's residual connection and rescaling, where it has them."""
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor if attn.rescale_output_factor != 1 else out


def untouched(module: Any, kind: type[nn.Module], x: Tensor) -> bool:
    """Whether a call of the module is what `kind` computes for x from its own weights, no more.

    It is not where something hooks, wraps, quantises or offloads it: then it has to be called.
    """
    if type(module) is not kind or "forward" in vars(module):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return False
    weights = list(module.parameters(recurse=False))
    return bool(weights) and all(
        type(w) is nn.Parameter and w.device == x.device and w.dtype == x.dtype for w in weights
    )
