"""Softmax attention of layers that stay softmax, over the tokens of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linfusion.attention.base import Processor, finished, projected_out


class GatheredSoftmaxProcessor(Processor):
    """Self-attention of diffusers' `Attention` where each rank has some of the tokens.

    Own queries read the keys and values of all ranks, gathered in one buffer (LASP-2H, Sun et al.
    2025, arXiv:2502.07563, algorithm 7). What is sent grows with the picture.
    """

    takes_grid = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the layer.
            hidden_states: this rank's tokens [B, N, C].
            encoder_hidden_states, attention_mask: must be None.
            temb: not used.
            grid: `LocalGrid` of the tokens.

        Raises:
            ValueError: a mask, tokens to attend to, or no grid of one rank.
        """
        shard = getattr(grid, "shard", None)
        given = (("encoder_hidden_states", encoder_hidden_states), ("mask", attention_mask))
        wrong = [name for name, value in given if value is not None]
        if wrong or shard is None:
            raise ValueError(
                f"{wrong[0] if wrong else 'grid'}: a layer whose tokens are on several ranks takes"
                " the grid of its own, and neither a mask nor other tokens"
            )
        residual = x = hidden_states
        q, k, v = (
            to(x).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        k, v = shard.gathered(k, v)
        return finished(attn, projected_out(attn, self.softmax(q, k, v)), residual)
