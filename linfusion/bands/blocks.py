"""Run the blocks of FLUX and Stable Diffusion 3 in bands of tokens, one block after the other.

Between blocks the tokens are whole. Within one, only what has to be is: keys and values, with CLEAR
also queries and what comes of them, and the block's result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from linfusion.bands.around import around
from linfusion.bands.hollow import hollow
from linfusion.bands.rows import Engine, Rows
from linfusion.bands.token_rules import held

_SEQUENCES = ("hidden_states", "encoder_hidden_states")


def call_in_blocks(
    model: Any, forward: Callable[..., Any], inputs: dict[str, Any], engine: Engine
) -> Any:
    """The model's forward, with what is large in each of its blocks left to the engine."""
    before = [model.x_embedder] if hasattr(model, "x_embedder") else []
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    with contextlib.ExitStack() as stack:
        for block in [*before, *blocks, model.norm_out, model.proj_out]:
            stack.enter_context(around(block, functools.partial(_in_bands, engine)))
        stack.enter_context(engine.store.beside(_beside(model, inputs)))
        return forward(**inputs)


def _in_bands(engine: Engine, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block on Rows; its result is whole, and plain tensors."""
    names = [name for name in _SEQUENCES if isinstance(kwargs.get(name), Tensor)]
    sequences = [*args[:1], *(kwargs[name] for name in names)]
    with engine.store.beside(sum(t.nbytes for t in sequences)):
        wrapped = {name: engine.wrap(kwargs[name], axis=1) for name in names}
        given = [engine.wrap(args[0], axis=1), *args[1:]] if args else []
        out = forward(*given, **{**kwargs, **wrapped})
        return tree_map(functools.partial(_plain, engine), out)


def _plain(engine: Engine, value: Any) -> Any:
    if not isinstance(value, Rows):
        return value
    whole = held(value)
    return hollow(whole.shape, whole.dtype, value.device) if whole.is_meta else whole


def _beside(model: Any, inputs: dict[str, Any]) -> int:
    """What the model holds throughout: latents in and out, FLUX's table of rotations."""
    latents = inputs["hidden_states"]
    held = 3 * latents.nbytes
    if "img_ids" in inputs:
        tokens = latents.shape[1] + inputs["encoder_hidden_states"].shape[1]
        held += 2 * 4 * tokens * sum(model.config.axes_dims_rope)
    return held
