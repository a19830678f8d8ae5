"""CLEAR's attention (Liu et al. 2024, arXiv:2412.16112): a window around each token, and the text.

For the joint attention of FLUX and Stable Diffusion 3, where text and image attend to one another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import RMSNorm

from linfusion.attention.base import Processor, projected_out, untouched
from linfusion.attention.clear.window import NAME, LocalWindow
from linfusion.attention.grids.joint import Grids
from linfusion.kernels import window_attention
from linfusion.kernels.elementwise import one_pass, rotary_rms_norm


class CLEARProcessor(Processor):
    """Attention processor of diffusers for the joint layers of FLUX and Stable Diffusion 3.

    An image token attends to the text and to the image tokens within a radius of its own, with
    pooling also to the whole picture at low resolution; a text token attends to all text and image
    tokens (CLEAR, eq. 4). Cost and memory are linear in the image tokens, but for the pooled part,
    which is 1/f² of full attention.

    Pictures that FLUX Kontext appends to look at are grids of their own: a token sees the text, its
    window in its own picture, and all of the other pictures. What is being copied may come from
    anywhere, so this part stays as large as in full attention.

    It has no state: one instance serves every layer. Windows hang on the layers as `attn.clear`;
    grids come with the arguments, from hooks that `linfusion.linearize` puts on the model.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        image_grids: Grids | None = None,
    ) -> Any:
        """Attend.

        Args:
            attn: the layer.
            hidden_states: image tokens [B, N, C]; in a single block of FLUX [B, T + N, C], text
                first.
            encoder_hidden_states: text tokens [B, T, C], or None.
            attention_mask: must be None.
            image_rotary_emb: (cos, sin), each [T + N, D], for FLUX.
            image_grids: of the image tokens, where the table does not say it.

        Returns:
            Image and text tokens where there are `encoder_hidden_states`, else tokens as they came.

        Raises:
            ValueError: something that this attention cannot honour; the message names it.
        """
        child = getattr(attn, NAME, None)
        grids = image_grids or getattr(image_rotary_emb, "grids", None)
        if child is None or grids is None:
            missing = "a window" if child is None else "the grid of its tokens"
            raise ValueError(
                f"attn: CLEARProcessor misses {missing} on this layer; use"
                ' linfusion.linearize(model, "clear", radius=8), which gives both'
            )
        self.refuse_mask(attention_mask, "CLEAR's attention has a window and takes no further mask")
        self.refuse_context_parallelism()
        joint, tokens = encoder_hidden_states is not None, hidden_states.shape[1]
        text = tokens - grids.tokens
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
        if tokens != grids.tokens if joint else text < 0:
            raise ValueError(
                f"hidden_states: got {tokens} tokens, expected {grids.tokens} of"
                f" the grids {grids.sizes}" + ("" if joint else " and those of the text")
            )
        q, k, v, text_q, text_k, text_v = _projected(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb
        )
        if joint:
            k, v = torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)
        else:
            text_q, q = q[:, :text], q[:, text:]
        shard = grids.shard
        tokens = k.shape[1] if shard is None else text + shard.tokens
        scale = child.window.scale(tokens, k.shape[3])
        image_out = _image(child, grids, q, k, v, scale)
        # The text that the last block of Stable Diffusion 3 returns is not read.
        unread = joint and attn.context_pre_only
        text_out = text_q
        if text and not unread:
            if shard is None:
                text_out = self.softmax(text_q, k, v, scale=scale)
            else:
                seen = (k[:, :text], v[:, :text]), (k[:, text:], v[:, text:])
                text_out = shard.softmax(text_q, *seen, scale)
        if not joint:
            out = image_out if text == 0 else torch.cat([text_out, image_out], 1)
            return _projected_out(attn, out.flatten(2))
        text_out = text_out.flatten(2)
        return (
            _projected_out(attn, image_out.flatten(2)),
            text_out if unread else attn.to_add_out(text_out),
        )


def _image(
    child: LocalWindow, grids: Grids, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Image queries [B, N, H, D] over keys and values of text and image [B, T + N, H, D]."""
    text = k.shape[1] - grids.tokens
    start = text
    out: list[Tensor] = []
    for size, order in zip(grids.sizes, grids.orders, strict=True):
        end = start + size[0] * size[1]
        own_k, own_v = k[:, start:end], v[:, start:end]
        others = [(k[:, :start], v[:, :start]), (k[:, end:], v[:, end:])]
        others = [pair for pair in others if pair[0].shape[1]]
        context = others[0] if len(others) == 1 else None
        if len(others) == 2:
            context = torch.cat([p[0] for p in others], 1), torch.cat([p[1] for p in others], 1)
        pooled = None
        if child.pool is not None:
            cells = (own_k, own_v) if order is None else (order.undo(own_k), order.undo(own_v))
            pooled = child.pool(cells[0], size), child.pool(cells[1], size)
        seen: Any = {"radius": child.window.radius, "context": context, "scale": scale}
        own_q = q[:, start - text : end - text]
        if grids.shard is not None:
            if pooled is not None:
                factor = child.window.down_factor
                seen["pooled"] = grids.shard.coarser(factor).gathered(*pooled)
            out.append(grids.shard.window_attention(own_q, own_k, own_v, **seen))
        else:
            seen |= {"pooled": pooled, "grid": size, "order": order}
            out.append(window_attention(own_q, own_k, own_v, **seen))
        start = end
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _projected(attn: Any, x: Tensor, text: Tensor | None, rotary: Any) -> tuple[Any, ...]:
    """q, k, v of the image and of the text (or None), normed and turned, [B, N, H, D]."""
    # FLUX may have one GEMM instead of three; Stable Diffusion 3 keeps stale copies of that.
    fused = hasattr(attn, "unfuse_projections") and attn.fused_projections
    image_parts = (
        attn.to_qkv(x).chunk(3, -1) if fused else [attn.to_q(x), attn.to_k(x), attn.to_v(x)]
    )
    text_parts: Any = [None] * 3
    if text is not None:
        text_parts = (
            attn.to_added_qkv(text).chunk(3, -1)
            if fused
            else [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]
        )
    start = 0 if text is None else text.shape[1]
    norms = ("norm_q", "norm_k", None, "norm_added_q", "norm_added_k", None)
    found = []
    for i, (part, name) in enumerate(zip([*image_parts, *text_parts], norms, strict=True)):
        if part is not None:
            part = part.unflatten(-1, (attn.heads, -1))
        if part is not None and name:
            place = slice(start, None) if i < 3 else slice(start)
            table = None if rotary is None else [t[place] for t in rotary]
            part = _turned(part, getattr(attn, name, None), table)
        found.append(part)
    return tuple(found)


def _turned(x: Tensor, norm: Any, table: list[Tensor] | None) -> Tensor:
    """Queries or keys [B, N, H, D], normed and, where there is a rotary table [N, D], turned."""
    if table is None:
        return x if norm is None else norm(x)
    if norm is not None and norm.eps is not None and one_pass(x) and untouched(norm, RMSNorm, x):
        cos, sin = (t.to(x.device) for t in table)
        return rotary_rms_norm(x, norm.weight, cos, sin, eps=norm.eps)
    from diffusers.models.embeddings import apply_rotary_emb

    x = x if norm is None else norm(x)
    turned: Tensor = apply_rotary_emb(x, (table[0], table[1]), sequence_dim=1)
    return turned


def _projected_out(attn: Any, x: Tensor) -> Tensor:
    if getattr(attn, "to_out", None) is None:  # a single block of FLUX has its own
        return x
    return projected_out(attn, x)
