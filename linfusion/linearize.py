"""Put a method on a model, and take it off exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linfusion.attention import get_method, names
from linfusion.layers.difference import Difference
from linfusion.layers.displaced import look, put_back
from linfusion.layers.find import compute_dtype, model_of
from linfusion.layers.offload import lifted
from linfusion.layers.parts import guard, unguard
from linfusion.layers.projections import (
    all_or_nothing,
    changed_since,
    projections,
    put_in,
    refuse_copied,
    set_processor,
    swap,
)
from linfusion.layers.record import RECORD, Record, TakenLayer, mark, marker_of, record_of
from linfusion.students.loading import method_of, student_of
from linfusion.students.wanted import Wanted, layers_for

if TYPE_CHECKING:
    from pathlib import Path

    from linfusion.attention.method import Method
    from linfusion.students.student import LinFusion

_PAG = "_linfusion_pag_processors"  # on a pipeline: the pair it had


def linearize(
    model_or_pipe: Any,
    method: str | None = None,
    *,
    weights: str | Path | LinFusion | None = None,
    layers: str | Iterable[str] | None = None,
    size: int | tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    """Make the self-attention of a model linear in the number of pixels, in place.

    Called again with the same arguments it does nothing; after something else has replaced the
    processors (attention slicing, `fuse_qkv_projections`, xformers), it puts them back and keeps
    the weights. A model that was saved linearized with `save_pretrained` and loaded again gets its
    weights from where it was loaded.

    Args:
        model_or_pipe: a pipeline (its `unet` or `transformer` is taken; pass `pipe.controlnet` to
            take that), or a model: for "linfusion" one whose self-attention is diffusers'
            `Attention`, for "clear" a FLUX or Stable Diffusion 3 transformer, for "lit" a DiT or
            PixArt transformer, for "mate" that of Wan, SANA-Video or CogVideoX.
        method: name of the mechanism: "linfusion", "clear", "lit" or "mate"; None is that of the
            weights, and "linfusion" without weights.
        weights: a distilled student: a folder or hub name in our form or the authors', a
            `.safetensors` file of CLEAR's authors (a path, or "user/repository/file.safetensors" on
            the hub), or a `LinFusion`. Where it holds attention projections they replace the
            model's own until `restore`. None attaches a fresh learned part, which is for training;
            that of "mate" starts from the model's own projections.
        layers: None takes every layer the weights are for, or every one there is; else a level
            ("down_blocks.0", "mid_block"), a regular expression over layer paths, several of
            those, or "auto": those that cost less than softmax at `size`.
        size: for "auto", height and width of the picture in pixels, or one number for both, of a
            video frames, height and width. A bare model counts 8 pixels to a latent, and 4 frames
            after the first.
        **options: of the method; None is as if it were not given. "linfusion":
            `projection_mid_dim`, hidden channels of a fresh learned part (None: as many as the
            layer has, -1: none). "clear": those of `linfusion.attention.clear.Window`, as
            `radius=8, down_factor=1, proportional=False`; what is not given is as the weights say.
            "lit": those of `linfusion.attention.lit.Form`, as `heads=2, conv="value_shared"`, and
            `softmax_every=n`, which leaves every n-th layer as it is. "mate": those of
            `linfusion.attention.mate.processor.Mixture`, as `window=(8, 4, 4)`.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is linearized already, otherwise; nothing to take; weights that do not fit
            or are for another method; a selector that selects nothing; quantised weights that
            would be replaced. The model is as it was, as after any other error.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if method is None:
        method = record.method if record else method_of(weights, model)
    mechanism = get_method(method)
    if hasattr(model_or_pipe, "set_pag_applied_layers") and mechanism.pag_processors is None:
        raise ValueError(
            f"model_or_pipe: {type(model_or_pipe).__name__} guides with perturbed attention, which"
            f" method {method!r} does not have; use the pipeline without PAG"
        )
    wanted = Wanted(model_or_pipe, method, layers, size, options)
    if record is not None:
        plain = weights is None and layers is None and not options and method == record.method
        if plain and put_back(record) + _take_pag(model_or_pipe, mechanism):
            return model_or_pipe
        if method == record.method and wanted.is_there(record, weights):
            put_back(record)
            _take_pag(model_or_pipe, mechanism)
            return model_or_pipe
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is linearized already ({record.method},"
            f" {len(record.layers)} layers); call linfusion.restore first"
        )
    found = layers_for(model, method, weights)
    side = student_of(model, found, weights, method)
    chosen, learned = wanted.of(found, side)
    _put_on(model_or_pipe, found, chosen, learned, side is None, mechanism)
    return model_or_pipe


def _put_on(
    model_or_pipe: Any,
    found: dict[str, Any],
    chosen: dict[str, Any],
    learned: dict[str, dict[str, Tensor | Difference]],
    fresh: bool,
    mechanism: Method,
) -> None:
    """Make the chosen layers linear, all of them or none."""
    model = model_of(model_or_pipe)
    dtype = compute_dtype(model)
    children = {}
    for path, setting in chosen.items():
        child = mechanism.child(found[path], setting)
        own = {
            name.removeprefix(f"{mechanism.name}."): tensor
            for name, tensor in learned[path].items()
            if name.startswith(f"{mechanism.name}.")
        }
        if own:
            child.load_state_dict(own)
        children[path] = child.to(dtype).train(found[path].training)

    record = Record(mechanism.name, {}, chosen, fresh=fresh)
    with lifted(model), all_or_nothing() as undo:
        undo.callback(mechanism.detach, model)
        mechanism.attach(model, chosen)
        processor = mechanism.processor()
        for path in chosen:
            attn = found[path]
            taken = record.layers[path] = TakenLayer(attn, attn.processor)
            if fresh and mechanism.inherit is not None:
                mechanism.inherit(attn, children[path])
            put_in(learned[path], taken, undo)
            device = projections(attn)["to_q"].weight.device
            child = children[path].to(device)
            undo.callback(attn._modules.pop, mechanism.name, None)
            attn.add_module(mechanism.name, child)
            set_processor(attn, processor, undo)
        undo.callback(_strip, model)
        setattr(model, RECORD, record)
        model.register_forward_pre_hook(look)
        guard(record)
        mark(
            model,
            {
                "method": mechanism.name,
                "layers": chosen,
                "attention_weights": any(t.base_weights for t in record.layers.values()),
            },
        )
        undo.callback(_leave_pag, model_or_pipe)
        _take_pag(model_or_pipe, mechanism)


def restore(model_or_pipe: Any) -> Any:
    """Undo `linearize`: processors, weights and outputs are those from before, to the bit.

    Args:
        model_or_pipe: what was linearized, or the model in it.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not linearized, or a LoRA is merged into weights that would be swapped.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        _forget(model)
        return model_or_pipe
    for path, taken in record.layers.items():
        if taken.base_weights:
            refuse_copied(path, taken.layer)
    mechanism = get_method(record.method)
    with lifted(model), all_or_nothing() as undo:
        changed = [path for path, taken in record.layers.items() if changed_since(taken)]
        undo.callback(_attach_again, model, record)
        mechanism.detach(model)
        for taken in record.layers.values():
            swap(taken, undo)
            set_processor(taken.layer, taken.processor, undo)
        # What fuse_qkv_projections laid aside would bring our processors back.
        stash = getattr(model, "original_attn_processors", None) or {}
        for path, taken in record.layers.items():
            if isinstance(stash.get(f"{path}.processor"), mechanism.processor):
                undo.callback(stash.__setitem__, f"{path}.processor", stash[f"{path}.processor"])
                stash[f"{path}.processor"] = taken.processor
        undo.callback(_hang, model, record, _hanging(record), model.__dict__.get("_internal_dict"))
        _strip(model)
        if hasattr(model_or_pipe, _PAG):
            undo.callback(_take_pag, model_or_pipe, mechanism)
            _leave_pag(model_or_pipe)
    if changed:
        warnings.warn(
            f"model_or_pipe: the projections of {len(changed)} linear layers were changed after"
            " linfusion.linearize (a LoRA merged and unloaded, or training); they are again what"
            " they were before it, and other layers keep what was merged into them. For a softmax"
            " model with the LoRA: restore first, then merge",
            UserWarning,
            stacklevel=2,
        )
    return model_or_pipe


@contextmanager
def as_softmax(model_or_pipe: Any) -> Iterator[Any]:
    """For a while, the model as it was before `linearize`: the teacher of its own student.

    Args:
        model_or_pipe: linearized before.

    Raises:
        ValueError: it is not linearized.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        raise ValueError(f"model_or_pipe: {type(model).__name__} is not linearized")
    taken = list(record.layers.values())
    ours = [one.layer.processor for one in taken]
    swaps = any(one.base_weights for one in taken)
    for path, one in record.layers.items():
        if one.base_weights:
            refuse_copied(path, one.layer)
    mechanism = get_method(record.method)

    with ExitStack() as end:
        end.callback(_strip_where_softmax, model, record)
        end.callback(_linear_again, model, record, ours)
        with lifted(model) if swaps else nullcontext(), all_or_nothing() as undo:
            undo.callback(_attach_again, model, record)
            mechanism.detach(model)
            for one in taken:
                swap(one, undo)
                set_processor(one.layer, one.processor, undo)
            # So that nothing says our processors are missing.
            undo.callback(setattr, model, RECORD, record)
            delattr(model, RECORD)
        yield model_or_pipe


def _linear_again(model: nn.Module, record: Record, processors: list[Any]) -> None:
    """The end of `as_softmax`, if it began."""
    if record_of(model) is not None:
        return
    swaps = any(taken.base_weights for taken in record.layers.values())
    mechanism = get_method(record.method)
    with lifted(model) if swaps else nullcontext(), all_or_nothing() as undo:
        for taken, processor in zip(record.layers.values(), processors, strict=True):
            swap(taken, undo)
            set_processor(taken.layer, processor, undo)
        undo.callback(mechanism.detach, model)
        mechanism.attach(model, record.settings)
        undo.callback(model.__dict__.pop, RECORD, None)
        setattr(model, RECORD, record)


def _strip_where_softmax(model: nn.Module, record: Record) -> None:
    """Where `as_softmax` could not come back, the model stays softmax, and altogether."""
    if record_of(model) is None:
        setattr(model, RECORD, record)
        _strip(model)


def _attach_again(model: nn.Module, record: Record) -> None:
    mechanism = get_method(record.method)
    mechanism.detach(model)
    mechanism.attach(model, record.settings)


def _hanging(record: Record) -> dict[str, dict[str, nn.Module]]:
    """The modules of ours on every layer, by path and name."""
    mechanism = get_method(record.method)
    ours = (mechanism.name, mechanism.fused_name or "")
    return {
        path: {name: taken.layer._modules[name] for name in ours if name in taken.layer._modules}
        for path, taken in record.layers.items()
    }


def _hang(
    model: nn.Module, record: Record, children: dict[str, dict[str, nn.Module]], config: Any
) -> None:
    """Undo `_strip`."""
    for path, taken in record.layers.items():
        taken.layer._modules.update(children[path])
    setattr(model, RECORD, record)
    guard(record)
    if not any(hook is look for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(look)
    if config is not None:
        model.__dict__["_internal_dict"] = config


def _strip(model: nn.Module) -> None:
    """Take off what hangs on a model whose processors and weights are its own again."""
    record = record_of(model)
    if record is not None:
        mechanism = get_method(record.method)
        unguard(record)
        for taken in record.layers.values():
            for name in (mechanism.name, mechanism.fused_name or ""):
                taken.layer._modules.pop(name, None)
    model.__dict__.pop(RECORD, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is look:
            del model._forward_pre_hooks[key]
    mark(model, None)


def _forget(model: nn.Module) -> None:
    """Of a model that was saved linearized: that it was.

    Raises:
        ValueError: it was not.
    """
    marker = marker_of(model)
    if marker is None:
        ours = {get_method(name).processor for name in names()}
        put = sorted({type(p).__name__ for p in _processors(model) if type(p) in ours})
        why = (
            f" by linfusion.linearize, but given {', '.join(put)} by set_attn_processor; give it"
            " diffusers' own in the same way"
            if put
            else ", so nothing to restore"
        )
        raise ValueError(f"model_or_pipe: {type(model).__name__} is not linearized{why}")
    if marker["attention_weights"]:
        warnings.warn(
            f"{type(model).__name__} was saved with the projections of its linear student; its own"
            " are not in that file, so this is not the softmax model it was made from",
            UserWarning,
            stacklevel=3,
        )
    mark(model, None)


def _processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def _take_pag(model_or_pipe: Any, mechanism: Any) -> int:
    """Give a pipeline with perturbed-attention guidance the processors that are linear."""
    if not hasattr(model_or_pipe, "set_pag_applied_layers") or hasattr(model_or_pipe, _PAG):
        return 0
    assert mechanism.pag_processors is not None  # linearize has refused the pipeline
    setattr(model_or_pipe, _PAG, model_or_pipe._pag_attn_processors)
    model_or_pipe.set_pag_applied_layers(
        model_or_pipe.pag_applied_layers, mechanism.pag_processors()
    )
    return 1


def _leave_pag(model_or_pipe: Any) -> None:
    """Undo `_take_pag`, where it was done."""
    if hasattr(model_or_pipe, _PAG):
        model_or_pipe._pag_attn_processors = getattr(model_or_pipe, _PAG)
        delattr(model_or_pipe, _PAG)
