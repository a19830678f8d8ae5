"""What is remembered about the layers taken over, on the model and in its config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

RECORD = "_linfusion_record"
MARKER = "_linfusion"  # key of the model's config; diffusers keeps keys that begin with _ unasked


@dataclass
class TakenLayer:
    """A layer, and what `restore` gives it back.

    Attributes:
        layer: the layer itself, as others may move it to another path of the model.
        processor: that it had.
        base_weights: that a checkpoint replaced, on the CPU.
        put_in: `checksum` of what replaced them, to see whether it was changed since.
    """

    layer: Any
    processor: Any
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    put_in: dict[str, tuple[Any, int]] = field(default_factory=dict)


@dataclass
class Record:
    """Hangs on a linearized model, and is copied with it; layers by the path they had."""

    method: str
    layers: dict[str, TakenLayer]
    settings: dict[str, Any]
    fresh: bool = False  # nothing was loaded
    warned: set[str] = field(default_factory=set)


def record_of(model: nn.Module) -> Record | None:
    return model.__dict__.get(RECORD)


def layer_at(model: nn.Module, path: str) -> Any:
    """The layer that was at a path when it was taken over, wherever it is now, or is there."""
    record = record_of(model)
    if record is not None and path in record.layers:
        return record.layers[path].layer
    return model.get_submodule(path)


def marker_of(model: nn.Module) -> Any:
    """What the config of a model says of its student, or None."""
    config: Any = model.__dict__.get("_internal_dict")
    return config.get(MARKER) if hasattr(config, "get") else None


def source_of(model: nn.Module) -> str | None:
    """The folder or hub name that diffusers loaded a model from, if it did."""
    config: Any = model.__dict__.get("_internal_dict")
    return config.get("_name_or_path") or None if hasattr(config, "get") else None


def mark(model: nn.Module, value: dict[str, Any] | None) -> None:
    """Write what was done into the config of a model, or take it out.

    Not `register_to_config`: that forgets what an IP-Adapter has set on the config as attributes.
    """
    config: Any = model.__dict__.get("_internal_dict")
    if config is None:
        return
    items = {k: v for k, v in config.items() if k != MARKER}
    marked = type(config)(items if value is None else {**items, MARKER: value})
    vars(marked).update({k: v for k, v in vars(config).items() if k != MARKER})
    model.__dict__["_internal_dict"] = marked


def set_processor(attn: Any, processor: Any) -> None:
    """Give a layer of diffusers another processor; not every class of theirs has a method."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        attn.processor = processor
