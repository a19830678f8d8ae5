"""Put a method on a model, and take it off exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from linfusion.attention import get_method
from linfusion.attention.grids import video as volumes
from linfusion.attention.method import Method
from linfusion.layers.find import (
    candidates,
    compute_dtype,
    model_of,
    models_of,
    select,
    tokens_at,
)
from linfusion.layers.offload import lifted
from linfusion.layers.projections import put_in, refuse_copied, swap
from linfusion.layers.record import (
    MARKER,
    RECORD,
    Record,
    TakenLayer,
    mark,
    record_of,
    set_processor,
)
from linfusion.layers.watch import look, put_back
from linfusion.students.loading import fit, method_of, student_of, weights_by_model

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

    Called again after something else has replaced the processors (attention slicing,
    `fuse_qkv_projections`, xformers), it puts them back and keeps the weights. A model that was
    saved linearized with `save_pretrained` and loaded again gets its weights from where it was
    loaded.

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
            those, or "auto": those that cost less than softmax at `size`.
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
        ValueError: it is linearized already; nothing to take; weights that do not fit or are for
            another method; a selector that selects nothing. The model is as it was.
    """
    models = models_of(model_or_pipe)
    first = next(iter(models.values()))
    students = weights_by_model(weights, models)
    if method is None:
        record = record_of(first)
        one = next(iter(students.values()))
        method = record.method if record else method_of(one, _marker(first))
    mechanism = get_method(method)
    if hasattr(model_or_pipe, "set_pag_applied_layers") and mechanism.pag_processors is None:
        raise ValueError(
            f"model_or_pipe: {type(model_or_pipe).__name__} guides with perturbed attention, which"
            f" method {method!r} does not have; use the pipeline without PAG"
        )
    records = [record for record in map(record_of, models.values()) if record is not None]
    if records:
        plain = weights is None and layers is None and not options
        if plain and len(records) == len(models) and {r.method for r in records} == {method}:
            repaired = sum(map(put_back, models.values(), records))
            if repaired + _take_pag(model_or_pipe, mechanism):
                return model_or_pipe
        kinds = ", ".join(type(m).__name__ for m in models.values() if record_of(m) is not None)
        raise ValueError(
            f"model_or_pipe: {kinds} is linearized already ({records[0].method},"
            f" {sum(len(r.layers) for r in records)} layers); call linfusion.restore first"
        )
    if layers != "auto" and size is not None:
        raise ValueError(f'size: got {size!r}, which only layers="auto" takes')
    latent = _latent_size(model_or_pipe, size) if layers == "auto" else None
    plans = [
        _plan(model, mechanism, students[name], layers, latent, size, options)
        for name, model in models.items()
    ]
    for plan in plans:  # nothing can be wrong any more: all of the models are taken, or none
        _put_on(plan)
    _take_pag(model_or_pipe, mechanism)
    return model_or_pipe


@dataclass
class _Plan:
    """What is going to be put on one model, once it is certain that it fits."""

    model: nn.Module
    mechanism: Method
    layers: dict[str, Any]  # by path
    settings: dict[str, Any]
    learned: dict[str, dict[str, Any]]
    children: dict[str, nn.Module]
    fresh: bool


def _plan(
    model: nn.Module,
    mechanism: Method,
    weights: Any,
    layers: str | Iterable[str] | None,
    latent: tuple[int, ...] | None,
    size: Any,
    options: dict[str, Any],
) -> _Plan:
    method = mechanism.name
    found: dict[str, Any] = dict(candidates(model, method))
    side = student_of(model, found, weights, _marker(model), method)
    if side is not None and side.config["method"] != method:
        raise ValueError(
            f"method: got {method!r}, but the weights are a student of method"
            f" {side.config['method']!r}; give the two the same one"
        )
    stored = None if side is None else {entry.path: entry.setting for entry in side.entries}
    options = {
        name: value
        for name, value in options.items()
        if value is not None or name in mechanism.nullable
    }
    mechanism.check_options(options)
    settings = mechanism.settings(found, stored, options)
    learned: dict[str, dict[str, Any]] = (
        {path: {} for path in found}
        if side is None
        else fit(model, found, side, partial=layers is not None)
    )
    paths = [path for path in found if path in learned and path in settings]
    if latent is not None:
        paths = [
            path
            for path in paths
            if tokens_at(model, path, latent)
            > mechanism.break_even_tokens(found[path], settings[path])
        ]
        if not paths:
            raise ValueError(
                f'layers: "auto" found no layer where linear attention costs less at {size} pixels'
            )
    elif layers is not None:
        paths = select(paths, layers)

    dtype = compute_dtype(model)
    children = {}
    for path in paths:
        child = mechanism.child(found[path], settings[path])
        own = {
            name.removeprefix(f"{mechanism.name}."): tensor
            for name, tensor in learned[path].items()
            if name.startswith(f"{mechanism.name}.")
        }
        if own:
            child.load_state_dict(own)
        children[path] = child.to(dtype).train(found[path].training)
    return _Plan(
        model,
        mechanism,
        {path: found[path] for path in paths},
        {path: settings[path] for path in paths},
        learned,
        children,
        side is None,
    )


def _put_on(plan: _Plan) -> None:
    model, mechanism = plan.model, plan.mechanism
    record = Record(mechanism.name, {}, plan.settings, fresh=plan.fresh)
    mechanism.attach(model, plan.settings)
    with lifted(model):
        processor_for = mechanism.processors(model)
        for path, attn in plan.layers.items():
            taken = record.layers[path] = TakenLayer(attn.processor)
            if plan.fresh and mechanism.inherit is not None:
                mechanism.inherit(attn, plan.children[path])
            put_in(attn, plan.learned[path], taken)
            device = next(attn.parameters()).device
            processor = processor_for(attn)
            attn.add_module(mechanism.name, plan.children[path].to(device))
            set_processor(attn, processor)
    setattr(model, RECORD, record)
    model.register_forward_pre_hook(look)
    mark(
        model,
        {
            "method": mechanism.name,
            "layers": plan.settings,
            "attention_weights": any(t.base_weights for t in record.layers.values()),
        },
    )


def restore(model_or_pipe: Any) -> Any:
    """Undo `linearize`: processors, weights and outputs are those from before, to the bit.

    Args:
        model_or_pipe: what was linearized, or the model in it.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not linearized, or a LoRA is merged into weights that would be swapped.
    """
    records = _records(model_or_pipe, ", so nothing to restore")
    for model, record in records:
        for path, taken in record.layers.items():
            if taken.base_weights:
                refuse_copied(path, model.get_submodule(path))
    for model, record in records:
        _take_off(model, record)
    if hasattr(model_or_pipe, _PAG):
        model_or_pipe._pag_attn_processors = getattr(model_or_pipe, _PAG)
        delattr(model_or_pipe, _PAG)
    return model_or_pipe


def _take_off(model: nn.Module, record: Record) -> None:
    mechanism = get_method(record.method)
    with lifted(model):
        mechanism.detach(model)
        for path, taken in record.layers.items():
            attn: Any = model.get_submodule(path)
            for name in (mechanism.name, mechanism.fused_name or ""):
                attn._modules.pop(name, None)
            swap(attn, taken)
            set_processor(attn, taken.processor)
    # What fuse_qkv_projections laid aside would bring our processors back.
    stash = getattr(model, "original_attn_processors", None)
    for path, taken in record.layers.items():
        if stash and isinstance(stash.get(f"{path}.processor"), mechanism.processor):
            stash[f"{path}.processor"] = taken.processor
    delattr(model, RECORD)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is look:
            del model._forward_pre_hooks[key]
    mark(model, None)


def _records(model_or_pipe: Any, consequence: str = "") -> list[tuple[nn.Module, Record]]:
    """The linearized models and what is remembered of each.

    Raises:
        ValueError: none is linearized.
    """
    models = models_of(model_or_pipe).values()
    found = [(model, record_of(model)) for model in models]
    linear = [(model, record) for model, record in found if record is not None]
    if not linear:
        kinds = ", ".join(type(model).__name__ for model in models)
        raise ValueError(f"model_or_pipe: {kinds} is not linearized{consequence}")
    return linear


@contextmanager
def as_softmax(model_or_pipe: Any) -> Iterator[Any]:
    """For a while, the model as it was before `linearize`: the teacher of its own student.

    Args:
        model_or_pipe: linearized before.

    Raises:
        ValueError: it is not linearized.
    """
    records = _records(model_or_pipe)
    for model, record in records:
        for path, taken in record.layers.items():
            if taken.base_weights:
                refuse_copied(path, model.get_submodule(path))
    with ExitStack() as stack:
        for model, record in records:
            stack.enter_context(_softmax(model, record))
        yield model_or_pipe


@contextmanager
def _softmax(model: nn.Module, record: Record) -> Iterator[None]:
    layers: list[tuple[Any, TakenLayer]] = [
        (model.get_submodule(path), taken) for path, taken in record.layers.items()
    ]
    ours = [attn.processor for attn, _ in layers]
    swaps = any(taken.base_weights for _, taken in layers)
    mechanism = get_method(record.method)
    with lifted(model) if swaps else nullcontext():
        mechanism.detach(model)
        for attn, taken in layers:
            swap(attn, taken)
            set_processor(attn, taken.processor)
    delattr(model, RECORD)  # so that nothing says our processors are missing
    try:
        yield
    finally:
        setattr(model, RECORD, record)
        with lifted(model) if swaps else nullcontext():
            for (attn, taken), processor in zip(layers, ours, strict=True):
                swap(attn, taken)
                set_processor(attn, processor)
            mechanism.attach(model, record.settings)


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


def _marker(model: nn.Module) -> Any:
    """What a model that was saved linearized says of it, or None."""
    config = getattr(model, "config", None)
    return config.get(MARKER) if isinstance(config, Mapping) else None


def _latent_size(model_or_pipe: Any, size: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Of what the model is called with: height and width, before them the frames of a video."""
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if volumes.kind_of(model_of(model_or_pipe)) is not None:
        if len(sides) != 3 or not all(isinstance(n, int) and n > 0 for n in sides):
            raise ValueError(
                f'size: got {size!r}; layers="auto" needs frames, and height and width in pixels'
            )
        scale = getattr(model_or_pipe, "vae_scale_factor_spatial", 8)
        step = getattr(model_or_pipe, "vae_scale_factor_temporal", 4)
        return -(-(sides[0] - 1) // step) + 1, -(-sides[1] // scale), -(-sides[2] // scale)
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(
            f'size: got {size!r}; layers="auto" needs height and width in pixels, or one number'
        )
    scale = getattr(model_or_pipe, "vae_scale_factor", 8)
    return -(-sides[0] // scale), -(-sides[1] // scale)
