"""One layer of LinGen's transformer: tokens mixed, the text read, a feed-forward layer."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from linfusion.attention.mate.layer import MATE, RUN, LayerState
from linfusion.models.softmax import SoftmaxAttention


class LinGenBlock(nn.Module):
    """MATE, cross-attention to the text and a feed-forward layer, the first and last modulated.

    Positions enter the first norm of every block, and the residual stream never.

    Args:
        width: C.
        heads: of cross-attention.
        mlp_ratio: inner channels of the feed-forward layer, of C.
        qk_norm: of cross-attention.
        mate: what mixes the tokens; softmax attention may take its place.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        mate: MATE | SoftmaxAttention,
    ) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mate = mate
        self.attn2 = CrossAttention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(
            width, inner_dim=int(mlp_ratio * width), activation_fn="gelu-approximate"
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        modulation: Tensor,
        text: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int, int],
        blocks: tuple[int, ...] | None,
        past: LayerState | None,
        keep: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, N, C], positions [1, N, C], modulation [B, F, 6, C] -> x, the state if `keep`."""
        table = self.scale_shift_table + modulation
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.unbind(2)
        h = modulated(self.norm1(x + positions), shift, scale)
        after = None
        if blocks is None:
            h = self.mate(h, grid)
        elif keep:
            h, after = self.mate(h, grid, blocks=blocks, past=past, return_state=True)
        else:
            h = self.mate(h, grid, blocks=blocks, past=past)
        x = x + _scaled(h, gate)
        frames, tokens = grid[0], grid[1] * grid[2]
        step = max(1, RUN // (len(x) * tokens))
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or step >= frames:
            return self._each(x, text, mask, shift_ff, scale_ff, gate_ff), after
        for first in range(0, frames, step):  # what is between stays in the caches
            n = slice(first * tokens, (first + step) * tokens)
            f = slice(first, first + step) if gate.shape[1] > 1 else slice(None)
            x[:, n] = self._each(x[:, n], text, mask, shift_ff[:, f], scale_ff[:, f], gate_ff[:, f])
        return x, after

    def _each(
        self,
        x: Tensor,
        text: Tensor,
        mask: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
    ) -> Tensor:
        """What sees no other token: cross-attention and feed-forward."""
        x = x + self.attn2(x, text, mask)
        h = self.ff(modulated(self.norm2(x), shift, scale))
        return x + _scaled(h, gate)


class CrossAttention(nn.Module):
    """Softmax attention from tokens to text, with the keys of diffusers' Attention.

    Args:
        width: C of both.
        heads: that divide it.
        qk_norm: root-mean-square norm of queries and keys of each head.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, C], text [B, M, C], mask [B, M] -> [B, N, C]."""
        q, k, v = (
            project(t).unflatten(-1, (self.heads, -1))
            for project, t in ((self.to_q, x), (self.to_k, text), (self.to_v, text))
        )
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        seen = None if mask is None else mask[:, None, None]
        out: Tensor = dispatch_attention_fn(q, k, v, attn_mask=seen)
        return self.to_out[0](out.flatten(2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, C], shift and scale [B, F, C] of the frames."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def _scaled(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
