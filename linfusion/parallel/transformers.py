"""Transformers: tokens are split where they are made and joined before they become a picture.

Between, every rank has whole rows of tokens and all of the text. Where grids travel with the
arguments of blocks, a `LocalGrid` does, so that what gradient checkpointing computes again knows
its rows; nothing that a call knows stays on the model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.attention.grids import dit, joint
from linfusion.layers.record import record_of
from linfusion.parallel.hooks import put_around
from linfusion.parallel.mesh import Mesh
from linfusion.parallel.ranks import Ranks, cut_rows
from linfusion.parallel.shard import Shard
from linfusion.parallel.softmax import GatheredSoftmaxProcessor

# Of the call that is running, for the hooks at its entry and exit.
_SHARD: ContextVar[Shard | None] = ContextVar("shard", default=None)


@dataclass(frozen=True)
class Host:
    """How the tokens of one kind of model are split.

    Attributes:
        method: that it has to be linearized with, or None for a model of our own.
        shard: (model, inputs, ranks) -> the `Shard` of a call.
        enter: (model, inputs, shard) -> the inputs of the forward on this rank.
        entries: names of modules, and what becomes of their outputs: (output, shard) -> output.
        exit: name of the module whose output is joined.
    """

    method: str | None
    shard: Callable[[Any, dict[str, Any], Ranks], Shard]
    enter: Callable[[Any, dict[str, Any], Shard], dict[str, Any]]
    entries: dict[str, Callable[[Any, Shard], Any]]
    exit: str


def host_of(model: nn.Module) -> Host | None:
    """How the tokens of a model are split; None if that is not known."""
    return next((HOSTS[k.__name__] for k in type(model).__mro__ if k.__name__ in HOSTS), None)


def check(model: Any, order: str) -> None:
    """Refuse a model whose layers would see their own rank's tokens alone.

    Args:
        model: any.
        order: the message for one that is not linearized.

    Raises:
        ValueError: the model is of another kind, is not linearized, or with another method, or has
            layers left softmax.
    """
    host, kind = host_of(model), type(model).__name__
    if host is None:
        raise ValueError(
            f"model_or_pipe: {kind} cannot be shared; accepted are UNets of pictures and"
            f" {', '.join(HOSTS)}"
        )
    if host.method is None:
        _check_own(model)
        return
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
    assert host.method is not None
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


def share_model(model: Any, mesh: Mesh, around: Callable[..., Any]) -> Callable[[], None]:
    """Have the ranks of `mesh` share the tokens of a transformer.

    Args:
        model: that `check` passed.
        mesh: its ranks.
        around: (run, forward, inputs) -> output, what is done around every call.
    """
    host = host_of(model)
    assert host is not None
    undo = contextlib.ExitStack()

    def run(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if host.method is not None:
            _check_processors(model, host.method)
        shard = host.shard(model, inputs, mesh.sp)
        with _calling(shard):
            return forward(**host.enter(model, inputs, shard))

    if host.method == "lit":
        for attn in left_softmax(model, host).values():
            undo.callback(attn.set_processor, attn.processor)
            attn.set_processor(GatheredSoftmaxProcessor())
    for name, split in host.entries.items():
        hook = functools.partial(_entered, split)
        undo.callback(model.get_submodule(name).register_forward_hook(hook).remove)
    undo.callback(model.get_submodule(host.exit).register_forward_hook(_left).remove)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    undo.callback(put_around(model, functools.partial(around, run), names))
    return undo.close


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


def _tokens(output: Tensor, shard: Shard) -> Tensor:
    return shard.take(output)


# ---- FLUX and Stable Diffusion 3


def _joint_shard(model: Any, inputs: dict[str, Any], ranks: Ranks) -> Shard:
    grids = model.pos_embed.__dict__.get(joint._PENDING)
    if grids is None:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} was called without its hooks, as"
            " model.forward(...); call model(...)"
        )
    if len(grids.sizes) != 1:
        raise ValueError(
            f"img_ids: got {len(grids.sizes)} pictures, {grids.sizes}; pictures to look at see each"
            " other as a whole, and a model that is shared takes one"
        )
    unit = math.lcm(*getattr(model, joint._FACTORS))
    cuts = cut_rows(grids.sizes[0][0], ranks.world, unit)
    return Shard(ranks, grids.sizes[0], cuts)


def _local_grids(shard: Shard) -> joint.Grids:
    height, width = shard.local
    return joint.Grids(((height, width),), (None,), shard)


def _enter_flux(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    setattr(model.pos_embed, joint._PENDING, _local_grids(shard))
    model.proj_out.__dict__.pop(joint._PENDING, None)  # rows need no other order back
    given = dict(inputs)
    given["hidden_states"] = shard.take(inputs["hidden_states"])
    given["img_ids"] = shard.take(inputs["img_ids"], 0)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if given.get(name) is not None:
            given[name] = [shard.take(sample) for sample in given[name]]
    return given


def _enter_sd3(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    model.pos_embed.__dict__.pop(joint._PENDING, None)
    model.proj_out.__dict__.pop(joint._PENDING, None)
    given = dict(inputs)
    arguments = inputs["joint_attention_kwargs"]
    given["joint_attention_kwargs"] = {**arguments, joint.ARGUMENT: _local_grids(shard)}
    if given.get("block_controlnet_hidden_states") is not None:
        samples = given["block_controlnet_hidden_states"]
        given["block_controlnet_hidden_states"] = [shard.take(sample) for sample in samples]
    return given


# ---- DiT and PixArt


def _picture_shard(model: Any, inputs: dict[str, Any], ranks: Ranks) -> Shard:
    height, width = inputs[dit._ARGUMENTS][dit.ARGUMENT]
    return Shard(ranks, (height, width), cut_rows(height, ranks.world))


def _enter_picture(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    if inputs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask: got one over the picture, whose rows are on several ranks; one over"
            " the text is encoder_attention_mask"
        )
    return {**inputs, dit._ARGUMENTS: {**inputs[dit._ARGUMENTS], dit.ARGUMENT: shard.local}}


HOSTS: dict[str, Host] = {
    "FluxTransformer2DModel": Host("clear", _joint_shard, _enter_flux, {}, "proj_out"),
    "SD3Transformer2DModel": Host(
        "clear", _joint_shard, _enter_sd3, {"pos_embed": _tokens}, "proj_out"
    ),
    "DiTTransformer2DModel": Host(
        "lit", _picture_shard, _enter_picture, {"pos_embed": _tokens}, "proj_out_2"
    ),
    "PixArtTransformer2DModel": Host(
        "lit", _picture_shard, _enter_picture, {"pos_embed": _tokens}, "proj_out"
    ),
}
