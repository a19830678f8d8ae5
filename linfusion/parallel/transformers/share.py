"""Transformers: tokens are split where they are made and joined before they become a picture.

Between, every rank has whole rows of tokens and all of the text. Where grids travel with the
arguments of blocks, a `LocalGrid` does, so that what gradient checkpointing computes again knows
its rows; nothing that a call knows stays on the model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.layers.record import record_of
from linfusion.models import LinGenTransformer3DModel
from linfusion.parallel.hooks import put_around
from linfusion.parallel.mesh import Mesh
from linfusion.parallel.shard import Shard
from linfusion.parallel.transformers.hosts import HOSTS, Host
from linfusion.parallel.transformers.softmax import GatheredSoftmaxProcessor

# Of the call that is running, for the hooks at its entry and exit.
_SHARD: ContextVar[Shard | None] = ContextVar("shard", default=None)


def host_of(model: nn.Module) -> Host | None:
    """How the tokens of a model are split; None if that is not known."""
    return next((HOSTS[k.__name__] for k in type(model).__mro__ if k.__name__ in HOSTS), None)


def check_transformer(model: Any, order: str) -> None:
    """Refuse a model whose layers would see their own rank's tokens alone.

    Args:
        model: any.
        order: the message for one that is not linearized.

    Raises:
        ValueError: the model is of another kind, is not linearized, or with another method, or has
            layers left softmax.
    """
    host, kind = host_of(model), type(model).__name__
    if isinstance(model, LinGenTransformer3DModel):
        _check_own(model)
        return
    if host is None:
        raise ValueError(
            f"model_or_pipe: {kind} cannot be shared; accepted are UNets of pictures,"
            f" LinGenTransformer3DModel and {', '.join(HOSTS)}"
        )
    record = record_of(model)
    if record is None:
        raise ValueError(order)
    if record.method != host.method:
        raise ValueError(
            f"model_or_pipe: {kind} is linearized with {record.method!r}; it can be shared with"
            f" {host.method!r}"
        )
    left = left_softmax(model, host)
    if left and host.method != "lit":
        raise ValueError(
            f"model_or_pipe: {next(iter(left))} of {kind} is left softmax and would see its own"
            " rank's tokens alone; linearize all layers, or keep the model on one rank"
        )
    _check_processors(model, host.method)


def left_softmax(model: Any, host: Host) -> dict[str, Any]:
    """Layers over the tokens of the picture that the method did not take, by path."""
    record = record_of(model)
    assert record is not None
    found = get_method(host.method).layers(model)
    return {path: attn for path, attn in found.items() if path not in record.layers}


def _check_processors(model: Any, method: str) -> None:
    record = record_of(model)
    for path in () if record is None else record.layers:
        processor = model.get_submodule(path).processor
        if not isinstance(processor, get_method(method).processor):
            raise ValueError(
                f"model_or_pipe: {path} runs {type(processor).__name__}, which would see its own"
                " rank's tokens alone; call linfusion.linearize again, which puts the linear ones"
                " back"
            )


def _check_own(model: Any) -> None:
    if model.config.self_attention == "softmax" or model.config.bidirectional == "hydra":
        name = "self_attention" if model.config.self_attention == "softmax" else "bidirectional"
        raise ValueError(
            f"model_or_pipe: a LinGenTransformer3DModel with {name} {model.config[name]!r} cannot"
            " be shared; accepted are those with MATE, whose scan is 'flip_sum'"
        )


def share_transformer(model: Any, mesh: Mesh, around: Callable[..., Any]) -> Callable[[], None]:
    """Have the ranks of `mesh` share the tokens of a transformer.

    Args:
        model: that `check_transformer` passed.
        mesh: its ranks.
        around: (run, forward, inputs) -> output, what is done around every call.
    """
    undo = contextlib.ExitStack()
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    host = host_of(model)
    if host is None:  # a model of our own, which asks for its shard
        undo.callback(put_around(model, functools.partial(around, _as_it_is), names))
        return undo.close

    def run(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if record_of(model) is None:
            raise ValueError(
                f"{type(model).__name__}: it was restored while it is parallelized; call"
                " linfusion.unparallelize first, and linearize again before parallelize"
            )
        _check_processors(model, host.method)
        shard = host.shard(model, inputs, mesh.sp)
        with _calling(shard):
            return forward(**host.enter(model, inputs, shard))

    if host.method == "lit":
        for attn in left_softmax(model, host).values():
            undo.callback(attn.set_processor, attn.processor)
            attn.set_processor(GatheredSoftmaxProcessor())
    for take_off in host.attach(model):
        undo.callback(take_off)
    for name, split in host.entries.items():
        hook = functools.partial(_entered, split)
        undo.callback(model.get_submodule(name).register_forward_hook(hook).remove)
    undo.callback(model.get_submodule(host.exit).register_forward_hook(_left).remove)
    undo.callback(put_around(model, functools.partial(around, run), names))
    return undo.close


def _as_it_is(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return forward(**inputs)


@contextlib.contextmanager
def _calling(shard: Shard) -> Iterator[None]:
    token = _SHARD.set(shard)
    try:
        yield
    finally:
        _SHARD.reset(token)


def _entered(split: Callable[[Any, Shard], Any], module: Any, args: Any, output: Any) -> Any:
    shard = _SHARD.get()
    return output if shard is None else split(output, shard)


def _left(module: Any, args: Any, output: Tensor) -> Tensor:
    shard = _SHARD.get()
    return output if shard is None else shard.join(output)
