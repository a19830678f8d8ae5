"""SANA-Video's feed-forward, whose convolution reads the rows above and below a token's."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from linfusion.parallel.shard import Shard

_HEIGHT, _ROTARY = 6, 8  # places of the arguments of a block

# Of the block that is running: its feed-forward gets tokens alone.
_SHARD: ContextVar[Shard | None] = ContextVar("sana_shard", default=None)


def attach(model: Any) -> list[Callable[[], None]]:
    """Have every block's feed-forward read a row to either side; returns what takes that off."""
    handles = []
    for block in model.transformer_blocks:
        handles += [
            block.register_forward_pre_hook(_begin, with_kwargs=True),
            block.register_forward_hook(_end, always_call=True),
            block.ff.register_forward_pre_hook(_extend),
            block.ff.register_forward_hook(_crop),
        ]
    return [handle.remove for handle in handles]


def _begin(block: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Before a block: rows are those of this rank, as its rotary table knows."""
    rotary = kwargs["rotary_emb"] if "rotary_emb" in kwargs else args[_ROTARY]
    shard = getattr(getattr(rotary, "grid", None), "shard", None)
    _SHARD.set(shard)
    if shard is None:
        return args, kwargs
    height = shard.local[1]
    if "height" in kwargs:
        return args, {**kwargs, "height": height}
    return (*args[:_HEIGHT], height, *args[_HEIGHT + 1 :]), kwargs


def _end(block: Any, args: Any, output: Any) -> None:
    _SHARD.set(None)


def _extend(ff: Any, args: Any) -> Any:
    """[B, T, h, W, C] with the rows next to it."""
    shard = _SHARD.get()
    if shard is None:
        return None
    wanted = shard.ranks.reach(shard.cuts, 1, 1)
    return (shard.ranks.fetch(args[0], 2, shard.cuts, wanted), *args[1:])


def _crop(ff: Any, args: Any, output: Tensor) -> Tensor:
    shard = _SHARD.get()
    if shard is None:
        return output
    first, end = shard.own
    return output.narrow(2, 1 if first else 0, end - first)
