"""Full softmax self-attention over a video in the place of MATE, to compare its cost with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from linfusion.attention.mate.layer import LayerState


class SoftmaxAttention(nn.Module):
    """Every token attends to every other or, with `blocks`, to its own and all earlier blocks.

    Args:
        width: channels C.
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

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        *,
        blocks: Sequence[int] | None = None,
        past: LayerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """As `MATE`; the `halo` of the state are keys and values of all frames, [B, F, H, W, 2C].

        Block by block instead of under a mask, so that every backend of diffusers serves it.

        Args:
            x: [B, T·H·W, C], frame by frame, row by row.
            grid: (T, H, W).
            blocks: frames of each block, T in all. None: every token sees every other.
            past: of the blocks before; not written to.
            return_state: also return the state after the last block.

        Returns:
            [B, T·H·W, C], or that and the state.

        Raises:
            ValueError: there is a state without blocks.
        """
        if blocks is None and (past is not None or return_state):
            raise ValueError("blocks: got None with a state, expected the frames of each block")
        frames, height, width = grid
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        before = 0
        if past is not None and past.halo is not None:
            before = past.halo.shape[1] * height * width
            old = past.halo.to(x.dtype).flatten(1, 3).unflatten(-1, (self.heads, -1))
            k, v = (torch.cat(pair, 1) for pair in zip(old.chunk(2, -1), (k, v), strict=True))
        parts, end = [], before
        for part in q.split([n * height * width for n in blocks or [frames]], 1):
            end += part.shape[1]
            parts.append(dispatch_attention_fn(part, k[:, :end], v[:, :end]))
        out: Tensor = self.to_out[0](torch.cat(parts, 1).flatten(2))
        if not return_state:
            return out
        halo = torch.cat([k, v], -1).flatten(2).unflatten(1, (-1, height, width))
        seen = frames if past is None else past.frames + frames
        return out, LayerState(seen, None, None, halo, None)
