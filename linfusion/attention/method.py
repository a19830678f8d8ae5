"""What a method has to offer, and which attention layers one may take over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linfusion.attention.hosts.layers import pixel_layers

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from linfusion.attention.cost import Pass

# Attention over frames, which sees one pixel through time: linear in the number of pixels already.
_TEMPORAL = re.compile(r"(^|\.)(motion_modules|temp_\w+|temporal_\w+|transformer_in)(\.|$)")

# Processors that compute softmax(q·kᵀ/√D)·v and nothing besides. A layer that carries any other one
# (rotary embedding, joint text stream, a method of its own) would lose something.
_PLAIN = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}


@dataclass(frozen=True)
class Method:
    """One published mechanism.

    A *setting* is what tells the learned parts of layers apart: plain data, as it stands in a
    config.json under `setting_key`.

    Attributes:
        name: what `linearize(model, name)` takes, and the trainer and the command line.
        processor: class, or classes, of its processors.
        options: dataclass of what `linearize(model, name, **options)` takes, each with a default;
            it checks their values.
        layers: `(model) -> {path: attention layer}` that the method may take; ValueError if there
            are none.
        setting_key: name of a layer's setting in a checkpoint's `modules_list`.
        settings: `(layers, stored, options) -> {path: setting}`, from all layers by path, the
            options of `linearize`, of which all are fields of `options`, and the settings `stored`
            with the weights, by path, or None without weights; a path left out stays softmax.
            ValueError for an option the weights do not allow.
        child: `(attn, setting) -> module`, the freshly initialised learned part that hangs on the
            layer as `attn.<name>`; a fresh one changes nothing. Of `attn` only `query_dim` and
            `heads` are read, which an entry of a checkpoint has as well.
        inherit: `(attn, child)`, gives a fresh child what it takes over of the layer's weights, or
            None if that is nothing; called where those are at hand, whatever offloads them.
        is_fresh: whether a child still has the weights it was made with.
        break_even_tokens: `(attn, setting) -> tokens` from which on the layer has fewer
            multiplications than softmax.
        passes: `(attn, setting, tokens) -> passes` of `linfusion.attention.cost` that the layer
            takes in place of softmax, by which it is judged on a GPU; None judges by
            multiplications.
        state_bytes: bytes of the fp32 state a layer keeps per picture.
        projections: whether to_q, to_k, to_v and to_out are what a student consists of, so that
            they are always saved with it.
        student: arguments of `linearize` after the pipeline that load a published student.
        fused_name: where `fuse` hangs what it made of the layer.
        fused: `(attn, child, dtype) -> module`, the layer for inference with fewer GEMMs, or None
            if there is nothing to fuse.
        pag_processors: the pair for `pipe.set_pag_applied_layers(layers, pair)`, or None if the
            method does not run under perturbed-attention guidance.
        read_file: `(name, tensors) -> StudentFile` of the authors' files that are a bare state
            dict, or None if they published none.
        nullable: names of options for which None is a value, not as if they were not given.
        attach: `(model, settings)`, puts on the whole model what the layers need to know; called
            after `linearize`.
        detach: `(model)`, takes that off again.
        processor_of: `(model) -> (attn) -> processor` that takes a layer over, made of the one it
            has; None is one of the class, without state, for all layers.
    """

    name: str
    processor: type | tuple[type, ...]
    options: type
    layers: Callable[[nn.Module], dict[str, Any]]
    setting_key: str
    settings: Callable[
        [Mapping[str, Any], Mapping[str, Any] | None, dict[str, Any]], dict[str, Any]
    ]
    child: Callable[[Any, Any], nn.Module]
    is_fresh: Callable[[nn.Module], bool]
    break_even_tokens: Callable[[Any, Any], int]
    state_bytes: Callable[[Any], int]
    student: str
    passes: Callable[[Any, Any, int], list[Pass]] | None = None
    inherit: Callable[[Any, nn.Module], None] | None = None
    projections: bool = False
    fused_name: str | None = None
    fused: Callable[[Attention, nn.Module | None, torch.dtype], nn.Module] | None = None
    pag_processors: Callable[[], tuple[object, object]] | None = None
    read_file: Callable[[str, Mapping[str, Tensor]], StudentFile] | None = None
    nullable: tuple[str, ...] = ()
    attach: Callable[[nn.Module, Mapping[str, Any]], None] = lambda model, settings: None
    detach: Callable[[nn.Module], None] = lambda model: None
    processor_of: Callable[[nn.Module], Callable[[Any], Any]] | None = None

    def processors(self, model: nn.Module) -> Callable[[Any], Any]:
        """What makes the processor that takes a layer over."""
        if self.processor_of is not None:
            return self.processor_of(model)
        assert isinstance(self.processor, type)
        one = self.processor()
        return lambda attn: one

    @property
    def option_names(self) -> list[str]:
        """Names of what `linearize(model, name, **options)` takes."""
        return [field.name for field in fields(self.options)]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse what the method does not have, and values out of range.

        Raises:
            ValueError: the message names the option.
        """
        for name in options:
            if name not in self.option_names:
                raise ValueError(
                    f"{name}: method {self.name!r} has no such option; it has"
                    f" {', '.join(self.option_names)}"
                )
        self.options(**options)


def same_settings(
    paths: Iterable[str],
    stored: Mapping[str, Any] | None,
    options: Any,
    typed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of a method whose layers all have its options, as plain data.

    Args:
        paths: of all layers.
        stored: settings that came with weights, by path, or None.
        options: a dataclass, or the settings of one layer.
        typed: the options as they came, for the message, where settings are another form of them.

    Raises:
        ValueError: an option other than that of the weights.
    """
    given = asdict(options) if is_dataclass(options) and not isinstance(options, type) else options
    if stored is None:
        return {path: dict(given) for path in paths}
    for path, setting in stored.items():
        for name, value in given.items():
            if setting.get(name) != value:
                came = value if typed is None else typed[name]
                raise ValueError(
                    f"{name}: got {came!r}, but {path} of the weights has {setting.get(name)!r};"
                    " leave it out"
                )
    return dict(stored)


@dataclass(frozen=True)
class StudentFile:
    """What is in a file of the authors'.

    Attributes:
        tensors: by layer path, under the names they have on a layer of ours (`to_q.weight`,
            `clear.pool.weight`).
        settings: by layer path.
        unknown: names that belong to no attention layer.
    """

    tensors: dict[str, dict[str, Tensor]]
    settings: dict[str, Any]
    unknown: list[str]


def channels_of(attn: Any) -> int:
    """Channels of the tokens that come into a layer, or into an entry of a checkpoint."""
    width: int = attn.query_dim if hasattr(attn, "query_dim") else _first_linear(attn).in_features
    return width


def heads_of(attn: Any) -> int:
    """Heads of the queries of a layer, or of an entry of a checkpoint."""
    heads: int = attn.heads if hasattr(attn, "heads") else attn.num_heads
    return heads


def head_dim_of(attn: Any) -> int:
    """Channels of a head of a layer, or of an entry of a checkpoint."""
    if getattr(attn, "head_dim", None) is not None:
        return int(attn.head_dim)
    if getattr(attn, "inner_dim", None) is not None:
        return int(attn.inner_dim) // heads_of(attn)
    return int(_first_linear(attn).out_features) // heads_of(attn)


def _first_linear(attn: Any) -> Any:
    """The projection of the queries, or of queries, keys and values in one."""
    linear = next(m for m in attn.modules() if hasattr(m, "in_features"))
    return getattr(linear, "base_layer", linear)  # LoRA wraps the layer


def unsupported(attn: Attention) -> str | None:
    """Why the weights of this layer have no linear form here, or None if they have."""
    if attn.added_kv_proj_dim is not None:
        return "it projects a second stream of keys (added_kv_proj_dim)"
    if attn.is_causal:
        return "it is causal"
    if attn.inner_kv_dim != attn.inner_dim:
        return f"its keys have {attn.inner_kv_dim} channels, its queries {attn.inner_dim}"
    if attn.to_out is None:
        return "it has no output projection (pre_only)"
    return None


def self_attention(model: nn.Module, *, processor: type) -> dict[str, Attention]:
    """The layers of `model` that a method may take over, by path.

    These are the modules of diffusers' class `Attention` that attend from pixels to pixels: not to
    text, not from frame to frame.

    Args:
        model: any module.
        processor: the method's own processor class, which counts as plain.

    Raises:
        ValueError: the model has none.
    """
    from diffusers.models.attention_processor import Attention

    pixels = pixel_layers(model)
    found = {
        path: module
        for path, module in model.named_modules()
        if path
        and isinstance(module, Attention)
        and (pixels is None or pixels(path))
        and (type(module.processor).__name__ in _PLAIN or isinstance(module.processor, processor))
        and not module.is_cross_attention
        and not _TEMPORAL.search(path)
        and unsupported(module) is None
    }
    if not found:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} has no self-attention of diffusers' class"
            " Attention with a plain processor, so nothing to make linear"
        )
    return found
