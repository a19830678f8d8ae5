"""Put a method on one model, take it off, or lay it aside for a while: all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from linfusion.attention import get_method
from linfusion.attention.method import Method
from linfusion.layers.offload import lifted
from linfusion.layers.parts import guard, unguard
from linfusion.layers.projections import (
    all_or_nothing,
    changed_since,
    give_processor,
    put_in,
    swap,
)
from linfusion.layers.record import RECORD, Record, TakenLayer, mark, record_of
from linfusion.layers.watch import look


@dataclass
class Plan:
    """What is going to be put on one model, once it is certain that it fits."""

    model: nn.Module
    mechanism: Method
    layers: dict[str, Any]  # by path
    settings: dict[str, Any]
    learned: dict[str, dict[str, Any]]
    children: dict[str, nn.Module]
    fresh: bool


def put_on(plan: Plan) -> None:
    """Make the layers linear, all of them or none."""
    model, mechanism = plan.model, plan.mechanism
    record = Record(mechanism.name, {}, plan.settings, fresh=plan.fresh)
    with lifted(model), all_or_nothing() as undo:
        undo.callback(mechanism.detach, model)
        mechanism.attach(model, plan.settings)
        processor_for = mechanism.processors(model)
        for path, attn in plan.layers.items():
            taken = record.layers[path] = TakenLayer(attn, attn.processor)
            if plan.fresh and mechanism.inherit is not None:
                mechanism.inherit(attn, plan.children[path])
            put_in(plan.learned[path], taken, undo)
            child = plan.children[path].to(next(attn.parameters()).device)
            processor = processor_for(attn)
            undo.callback(attn._modules.pop, mechanism.name, None)
            attn.add_module(mechanism.name, child)
            give_processor(attn, processor, undo)
        undo.callback(_strip, model)
        setattr(model, RECORD, record)
        model.register_forward_pre_hook(look)
        guard(model, record)
        mark(
            model,
            {
                "method": mechanism.name,
                "layers": plan.settings,
                "attention_weights": any(t.base_weights for t in record.layers.values()),
            },
        )


def take_off(model: nn.Module, record: Record, undo: ExitStack) -> int:
    """Undo `put_on`; how many layers had changed weights. `undo` puts it on again."""
    mechanism = get_method(record.method)
    steps = ExitStack()
    undo.callback(_undone, model, steps)
    with lifted(model):
        changed = sum(bool(changed_since(taken)) for taken in record.layers.values())
        steps.callback(_attach_again, model, record)
        mechanism.detach(model)
        for taken in record.layers.values():
            swap(taken, steps)
            give_processor(taken.layer, taken.processor, steps)
        # What fuse_qkv_projections laid aside would bring our processors back.
        stash = getattr(model, "original_attn_processors", None) or {}
        for path, taken in record.layers.items():
            if isinstance(stash.get(f"{path}.processor"), mechanism.processor):
                steps.callback(stash.__setitem__, f"{path}.processor", stash[f"{path}.processor"])
                stash[f"{path}.processor"] = taken.processor
        config = model.__dict__.get("_internal_dict")
        steps.callback(_hang, model, record, _hanging(record), config)
        _strip(model)
    return changed


def _undone(model: nn.Module, steps: ExitStack) -> None:
    with lifted(model):
        steps.close()


@contextmanager
def softmax(model: nn.Module, record: Record) -> Iterator[None]:
    """For a while, one model as it was before `put_on`."""
    taken = list(record.layers.values())
    ours = [one.layer.processor for one in taken]
    swaps = any(one.base_weights for one in taken)
    mechanism = get_method(record.method)
    with ExitStack() as end:
        end.callback(_strip_where_softmax, model, record)
        end.callback(_linear_again, model, record, ours)
        with lifted(model) if swaps else nullcontext(), all_or_nothing() as undo:
            undo.callback(_attach_again, model, record)
            mechanism.detach(model)
            for one in taken:
                swap(one, undo)
                give_processor(one.layer, one.processor, undo)
            # So that nothing says our processors are missing.
            undo.callback(setattr, model, RECORD, record)
            delattr(model, RECORD)
        yield


def _linear_again(model: nn.Module, record: Record, processors: list[Any]) -> None:
    """The end of `as_softmax`, if it began."""
    if record_of(model) is not None:
        return
    swaps = any(taken.base_weights for taken in record.layers.values())
    mechanism = get_method(record.method)
    with lifted(model) if swaps else nullcontext(), all_or_nothing() as undo:
        for taken, processor in zip(record.layers.values(), processors, strict=True):
            swap(taken, undo)
            give_processor(taken.layer, processor, undo)
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
    guard(model, record)
    if not any(hook is look for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(look)
    if config is not None:
        model.__dict__["_internal_dict"] = config


def _strip(model: nn.Module) -> None:
    """Take off what hangs on a model whose processors and weights are its own again."""
    record = record_of(model)
    if record is not None:
        mechanism = get_method(record.method)
        unguard(model, record)
        for taken in record.layers.values():
            for name in (mechanism.name, mechanism.fused_name or ""):
                taken.layer._modules.pop(name, None)
    model.__dict__.pop(RECORD, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is look:
            del model._forward_pre_hooks[key]
    mark(model, None)
