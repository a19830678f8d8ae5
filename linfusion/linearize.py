"""Put a method on a model, and take it off exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linfusion.attention import get_method
from linfusion.attention.grids import video as volumes
from linfusion.layers.find import candidates, compute_dtype, model_of, select, tokens_at
from linfusion.layers.offload import lifted
from linfusion.layers.projections import projections, put_in, refuse_copied, swap
from linfusion.layers.record import MARKER, RECORD, Record, TakenLayer, mark, record_of
from linfusion.students.loading import fit, method_of, student_of

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
        model_or_pipe: a pipeline (its `unet` or `transformer` is taken; pass `pipe.controlnet` to
            take that), or a model: for "linfusion" one whose self-attention is diffusers'
            `Attention`, for "clear" a FLUX or Stable Diffusion 3 transformer, for "lit" a DiT or
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
            those of `Maps` for "linfusion", `Window` for "clear", `Form` (and `softmax_every`) for
            "lit", `Mixture` for "mate". None is as if it were not given; what is not given is as
            the weights say.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is linearized already; nothing to take; weights that do not fit or are for
            another method; a selector that selects nothing. The model is as it was.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if method is None:
        method = record.method if record else method_of(weights, _marker(model))
    mechanism = get_method(method)
    if hasattr(model_or_pipe, "set_pag_applied_layers") and mechanism.pag_processors is None:
        raise ValueError(
            f"model_or_pipe: {type(model_or_pipe).__name__} guides with perturbed attention, which"
            f" method {method!r} does not have; use the pipeline without PAG"
        )
    if record is not None:
        if weights is None and layers is None and not options and method == record.method:
            repaired = _put_back(model, record) + _take_pag(model_or_pipe, mechanism)
            if repaired:
                return model_or_pipe
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is linearized already ({record.method},"
            f" {len(record.layers)} layers); call linfusion.restore first"
        )
    found: dict[str, Any] = dict(candidates(model, method))
    if layers == "auto":
        latent = _latent_size(model_or_pipe, size)
    elif size is not None:
        raise ValueError(f'size: got {size!r}, which only layers="auto" takes')
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
    if layers == "auto":
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

    chosen = {path: settings[path] for path in paths}
    record = Record(mechanism.name, {}, chosen, fresh=side is None)
    mechanism.attach(model, chosen)
    with lifted(model):
        processor = mechanism.processor()
        for path in paths:
            attn = found[path]
            taken = record.layers[path] = TakenLayer(attn.processor)
            if side is None and mechanism.inherit is not None:
                mechanism.inherit(attn, children[path])
            put_in(attn, learned[path], taken)
            device = projections(attn)["to_q"].weight.device
            attn.add_module(mechanism.name, children[path].to(device))
            attn.set_processor(processor)
    setattr(model, RECORD, record)
    model.register_forward_pre_hook(_look)
    mark(
        model,
        {
            "method": mechanism.name,
            "layers": chosen,
            "attention_weights": any(t.base_weights for t in record.layers.values()),
        },
    )
    _take_pag(model_or_pipe, mechanism)
    return model_or_pipe


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
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is not linearized, so nothing to restore"
        )
    for path, taken in record.layers.items():
        if taken.base_weights:
            refuse_copied(path, model.get_submodule(path))
    mechanism = get_method(record.method)
    with lifted(model):
        mechanism.detach(model)
        for path, taken in record.layers.items():
            attn: Any = model.get_submodule(path)
            for name in (mechanism.name, mechanism.fused_name or ""):
                attn._modules.pop(name, None)
            swap(attn, taken)
            attn.set_processor(taken.processor)
    # What fuse_qkv_projections laid aside would bring our processors back.
    stash = getattr(model, "original_attn_processors", None)
    for path, taken in record.layers.items():
        if stash and isinstance(stash.get(f"{path}.processor"), mechanism.processor):
            stash[f"{path}.processor"] = taken.processor
    delattr(model, RECORD)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _look:
            del model._forward_pre_hooks[key]
    mark(model, None)
    if hasattr(model_or_pipe, _PAG):
        model_or_pipe._pag_attn_processors = getattr(model_or_pipe, _PAG)
        delattr(model_or_pipe, _PAG)
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
    layers: list[tuple[Any, TakenLayer]] = [
        (model.get_submodule(path), taken) for path, taken in record.layers.items()
    ]
    ours = [attn.processor for attn, _ in layers]
    swaps = any(taken.base_weights for _, taken in layers)
    for path, taken in record.layers.items():
        if taken.base_weights:
            refuse_copied(path, model.get_submodule(path))
    mechanism = get_method(record.method)
    with lifted(model) if swaps else nullcontext():
        mechanism.detach(model)
        for attn, taken in layers:
            swap(attn, taken)
            attn.set_processor(taken.processor)
    delattr(model, RECORD)  # so that nothing says our processors are missing
    try:
        yield model_or_pipe
    finally:
        setattr(model, RECORD, record)
        with lifted(model) if swaps else nullcontext():
            for (attn, taken), processor in zip(layers, ours, strict=True):
                swap(attn, taken)
                attn.set_processor(processor)
            mechanism.attach(model, record.settings)


def _put_back(model: nn.Module, record: Record) -> int:
    """Set our processors where something else has taken over; how many."""
    mechanism = get_method(record.method)
    lost = _displaced(model, record)
    processor = mechanism.processor()
    for path in lost:
        attn: Any = model.get_submodule(path)
        attn.set_processor(processor)
    record.warned.discard("displaced")
    return len(lost)


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


def _displaced(model: nn.Module, record: Record) -> dict[str, str]:
    """Layers whose processor is no longer ours, and the class it is of."""
    ours = get_method(record.method).processor
    processors = {path: model.get_submodule(path).processor for path in record.layers}
    return {p: type(x).__name__ for p, x in processors.items() if not isinstance(x, ours)}


def _look(model: nn.Module, args: Any) -> None:
    """Before a forward: say, once each, that we were displaced or that nothing was learned."""
    record = record_of(model)
    if record is None or torch.compiler.is_compiling():
        return
    if "displaced" not in record.warned:
        lost = _displaced(model, record)
        if lost:
            record.warned.add("displaced")
            kinds = ", ".join(sorted(set(lost.values())))
            what = (
                "linfusion.linearize(pipe) on that pipeline makes its guidance linear"
                if kinds.startswith("PAG")
                else f"linfusion.linearize(model, {record.method!r}) puts them back with the"
                " weights they had,"
                " linfusion.restore(model) makes the model softmax for good"
            )
            warnings.warn(
                f"{len(lost)} of {len(record.layers)} linear attention layers run {kinds} instead:"
                " a later call replaced their processors (enable_attention_slicing,"
                " fuse_qkv_projections, xformers and set_attn_processor do), and softmax with the"
                f" weights of a linear student gives wrong pictures. {what}.",
                UserWarning,
                stacklevel=2,
            )
    if record.fresh and "fresh" not in record.warned and not torch.is_grad_enabled():
        record.warned.add("fresh")
        mechanism = get_method(record.method)
        learned = [model.get_submodule(f"{path}.{mechanism.name}") for path in record.layers]
        if all(mechanism.is_fresh(child) for child in learned):
            warnings.warn(
                f"{type(model).__name__} is linearized without weights: pictures will be wrong"
                " until those of a distilled student are loaded (restore, then"
                f" linearize(pipe, {mechanism.student})) or trained.",
                UserWarning,
                stacklevel=2,
            )


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
