"""Put a method on a model, and take it off exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from linfusion.attention import get_method, names
from linfusion.attention.method import Method
from linfusion.layers.find import compute_dtype, models_of
from linfusion.layers.projections import all_or_nothing, refuse_copied
from linfusion.layers.record import Record, mark, marker_of, record_of
from linfusion.layers.switch import Plan, put_on, softmax, take_off
from linfusion.layers.watch import put_back
from linfusion.students.loading import method_of, student_of, weights_by_model
from linfusion.students.wanted import Wanted, layers_for

if TYPE_CHECKING:
    from pathlib import Path

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
        model_or_pipe: a pipeline (all its denoising models are taken, as `transformer` and
            `transformer_2` of Wan 2.2; pass `pipe.controlnet` to take that), or a model: for
            "clear" and "hybrid" any whose grid of tokens is known (`linfusion.describe_host`), for
            "linfusion" one whose self-attention is diffusers' `Attention`, for "lit" a DiT or
            PixArt transformer, for "mate" that of Wan, SANA-Video or CogVideoX.
        method: name of the mechanism, one of `linfusion.attention.names()`; None is that of the
            weights, and "linfusion" without weights.
        weights: a distilled student: a folder or hub name in our form or the authors', a
            `.safetensors` file of CLEAR's authors (a path, or "user/repository/file.safetensors" on
            the hub), or a `LinFusion`. Where it holds attention projections they replace the
            model's own until `restore`. None attaches a fresh learned part, which is for training;
            that of "mate" starts from the model's own projections.
        layers: None takes every layer the weights are for, or every one there is; else a level
            ("down_blocks.0", "mid_block"), a regular expression over layer paths, several of
            those, or "auto": those that cost less than softmax at `size`: on a GPU in time that is
            computed from bytes and products for a card of its kind, elsewhere in multiplications.
        size: for "auto", height and width of the picture in pixels, or one number for both, of a
            video frames, height and width. A bare model counts 8 pixels to a latent, and 4 frames
            after the first.
        **options: fields of the method's options, `linfusion.attention.get_method(method).options`:
            those of `Maps` for "linfusion", `Window` for "clear", `Rest` for "hybrid", `Form` (and
            `softmax_every`) for "lit", `Mixture` for "mate". None is as if it were not given; what
            is not given is as the weights say.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is linearized already, otherwise; nothing to take; weights that do not fit
            or are for another method; a selector that selects nothing; quantised weights that
            would be replaced. The model is as it was, as after any other error.
    """
    models = models_of(model_or_pipe)
    first = next(iter(models.values()))
    students = weights_by_model(weights, models)
    if method is None:
        record = record_of(first)
        method = record.method if record else method_of(next(iter(students.values())), first)
    mechanism = get_method(method)
    if hasattr(model_or_pipe, "set_pag_applied_layers") and mechanism.pag_processors is None:
        raise ValueError(
            f"model_or_pipe: {type(model_or_pipe).__name__} guides with perturbed attention, which"
            f" method {method!r} does not have; use the pipeline without PAG"
        )
    wanted = Wanted(model_or_pipe, mechanism, layers, size, options)
    records = [record for record in map(record_of, models.values()) if record is not None]
    if records:
        if len(records) == len(models) and {r.method for r in records} == {method}:
            plain = weights is None and layers is None and not options
            if plain and _repair(model_or_pipe, mechanism):
                return model_or_pipe
            if all(wanted.is_there(model, students[name]) for name, model in models.items()):
                _repair(model_or_pipe, mechanism)
                return model_or_pipe
        kinds = ", ".join(type(m).__name__ for m in models.values() if record_of(m) is not None)
        raise ValueError(
            f"model_or_pipe: {kinds} is linearized already ({records[0].method},"
            f" {sum(len(r.layers) for r in records)} layers); call linfusion.restore first"
        )
    plans = [_plan(model, wanted, students[name]) for name, model in models.items()]
    with all_or_nothing() as undo:
        for plan in plans:
            undo.callback(_off_again, plan.model)
            put_on(plan)
        undo.callback(_leave_pag, model_or_pipe)
        _take_pag(model_or_pipe, mechanism)
    return model_or_pipe


def _repair(model_or_pipe: Any, mechanism: Method) -> int:
    """Put our processors back where something else has taken over; how many."""
    lost = 0
    for model in models_of(model_or_pipe).values():
        record = record_of(model)
        assert record is not None
        lost += put_back(model, record)
    return lost + _take_pag(model_or_pipe, mechanism)


def _plan(model: nn.Module, wanted: Wanted, weights: Any) -> Plan:
    mechanism = wanted.mechanism
    found = layers_for(model, mechanism.name, weights)
    side = student_of(model, found, weights, mechanism.name)
    chosen, learned = wanted.of(model, found, side)
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
    layers = {path: found[path] for path in chosen}
    return Plan(model, mechanism, layers, chosen, learned, children, side is None)


def restore(model_or_pipe: Any) -> Any:
    """Undo `linearize`: processors, weights and outputs are those from before, to the bit.

    Args:
        model_or_pipe: what was linearized, or the model in it.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not linearized, or a LoRA is merged into weights that would be swapped.
    """
    records = _records(model_or_pipe)
    if not records:
        _forget(model_or_pipe)
        return model_or_pipe
    for _, record in records:
        for path, taken in record.layers.items():
            if taken.base_weights:
                refuse_copied(path, taken.layer)
    with all_or_nothing() as undo:
        changed = sum(take_off(model, record, undo) for model, record in records)
        if hasattr(model_or_pipe, _PAG):
            undo.callback(vars(model_or_pipe).update, dict(vars(model_or_pipe)))
        _leave_pag(model_or_pipe)
    if changed:
        warnings.warn(
            f"model_or_pipe: the projections of {changed} linear layers were changed after"
            " linfusion.linearize (a LoRA merged and unloaded, or training); they are again what"
            " they were before it, and other layers keep what was merged into them. For a softmax"
            " model with the LoRA: restore first, then merge",
            UserWarning,
            stacklevel=2,
        )
    return model_or_pipe


def _off_again(model: nn.Module) -> None:
    record = record_of(model)
    if record is not None:
        with all_or_nothing() as undo:
            take_off(model, record, undo)


def _records(model_or_pipe: Any) -> list[tuple[nn.Module, Record]]:
    """The linearized models and what is remembered of each."""
    found = [(model, record_of(model)) for model in models_of(model_or_pipe).values()]
    return [(model, record) for model, record in found if record is not None]


@contextmanager
def as_softmax(model_or_pipe: Any) -> Iterator[Any]:
    """For a while, the model as it was before `linearize`: the teacher of its own student.

    Args:
        model_or_pipe: linearized before.

    Raises:
        ValueError: it is not linearized.
    """
    records = _records(model_or_pipe)
    if not records:
        kinds = ", ".join(type(model).__name__ for model in models_of(model_or_pipe).values())
        raise ValueError(f"model_or_pipe: {kinds} is not linearized")
    for _, record in records:
        for path, taken in record.layers.items():
            if taken.base_weights:
                refuse_copied(path, taken.layer)
    with ExitStack() as stack:
        stack.callback(_softmax_altogether, [model for model, _ in records])
        for model, record in records:
            stack.enter_context(softmax(model, record))
        yield model_or_pipe


def _softmax_altogether(models: list[nn.Module]) -> None:
    """Where one of several models could not come back from `as_softmax`, none does."""
    if any(record_of(model) is None for model in models):
        for model in models:
            _off_again(model)


def _forget(model_or_pipe: Any) -> None:
    """Of models that were saved linearized: that they were.

    Raises:
        ValueError: none was.
    """
    models = models_of(model_or_pipe).values()
    marked = [model for model in models if marker_of(model) is not None]
    if not marked:
        kinds = ", ".join(type(model).__name__ for model in models)
        put = _set_by_hand(models)
        why = (
            f" by linfusion.linearize, but given {', '.join(put)} by set_attn_processor; give it"
            " diffusers' own in the same way"
            if put
            else ", so nothing to restore"
        )
        raise ValueError(f"model_or_pipe: {kinds} is not linearized{why}")
    for model in marked:
        if marker_of(model)["attention_weights"]:
            warnings.warn(
                f"{type(model).__name__} was saved with the projections of its linear student; its"
                " own are not in that file, so this is not the softmax model it was made from",
                UserWarning,
                stacklevel=3,
            )
        mark(model, None)


def _set_by_hand(models: Iterable[nn.Module]) -> list[str]:
    """Names of our processors that are on models nothing is remembered of."""
    modules = [module for model in models for module in model.modules()]
    processors = [module.processor for module in modules if hasattr(module, "processor")]
    methods = [get_method(name) for name in names()]
    ours = [p for p in processors if any(isinstance(p, m.processor) for m in methods)]
    return sorted({type(p).__name__ for p in ours})


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
