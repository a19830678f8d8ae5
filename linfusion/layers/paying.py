"""From how many tokens on a layer pays, where its model is: by time on a GPU, else by products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linfusion.attention import cost
from linfusion.attention.cost import H100, RTX_4090, Card
from linfusion.attention.method import head_dim_of, heads_of

if TYPE_CHECKING:
    from linfusion.attention.method import Method

NEVER = 1 << 30  # tokens: no picture has them


def card_of(model: nn.Module) -> Card | None:
    """The card whose balance of bandwidth and products is that of the GPU a model is on.

    An H100 stands for GPUs with stacked memory (compute capability 8.0, 9.0 and 10.0, AMD's
    Instinct), an RTX 4090 for others. None: the model is on no GPU.
    """
    found = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if found is None:
        return None
    stacked = torch.version.hip is not None
    stacked = stacked or torch.cuda.get_device_capability(found) in ((8, 0), (9, 0), (10, 0))
    return H100 if stacked else RTX_4090


def tokens_from(mechanism: Method, attn: Any, setting: Any, card: Card | None) -> int:
    """Tokens from which on a layer takes less than softmax, `NEVER` if it does not.

    Args:
        mechanism: of the layer.
        attn: the layer.
        setting: of the layer.
        card: by whose bytes and products time is computed; None counts multiplications.
    """
    if card is None or mechanism.passes is None:
        return mechanism.break_even_tokens(attn, setting)
    low, high = 0, 1

    def saves(tokens: int) -> bool:
        softmax, linear = times(mechanism, attn, setting, card, tokens)
        return linear < softmax

    while not saves(high):
        low, high = high, 2 * high
        if high >= NEVER:
            return NEVER
    while high - low > 1:
        middle = (low + high) // 2
        if saves(middle):
            high = middle
        else:
            low = middle
    return high


def times(
    mechanism: Method, attn: Any, setting: Any, card: Card, tokens: int
) -> tuple[float, float]:
    """Computed seconds of softmax and of the layer, one picture, without the projections."""
    assert mechanism.passes is not None
    softmax = cost.softmax_of_any(tokens, heads_of(attn), head_dim_of(attn))
    linear = mechanism.passes(attn, setting, tokens)
    return cost.seconds(softmax, card), cost.seconds(linear, card)
