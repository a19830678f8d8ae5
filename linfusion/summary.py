"""What is linear in a model, and from when on it pays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from linfusion.attention import get_method, names
from linfusion.attention.method import Method, channels_of, heads_of
from linfusion.layers.find import candidates, models_of, refuse_linear_already, serving
from linfusion.layers.projections import attention_parameters
from linfusion.layers.record import Record, record_of


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer. Sizes are per picture.

    Attributes:
        parameters: of the learned part, with the projections where a student replaced them.
        break_even_tokens: from which on the layer multiplies less than softmax. Time pays later:
            how much, `linfusion bench` measures.
    """

    path: str
    linear: bool
    channels: int
    heads: int
    parameters: int
    state_bytes: int
    break_even_tokens: int


@dataclass(frozen=True)
class Summary:
    """What `summary` found; print it, or take `to_dict()`.

    Attributes:
        method: of the layers that are linear, or None.
        hooked: whether `linearize` made them so, rather than `set_attn_processor`.
    """

    model: str
    method: str | None
    fused: bool
    layers: list[LayerSummary]
    hooked: bool = True

    @property
    def parameters(self) -> int:
        """Parameters of the learned part."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of all states for one picture, of any size."""
        return sum(layer.state_bytes for layer in self.layers if layer.linear)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for json."""
        return asdict(self) | {"parameters": self.parameters, "state_bytes": self.state_bytes}

    def __str__(self) -> str:
        linear = sum(layer.linear for layer in self.layers)
        width = max(len(layer.path) for layer in self.layers)
        set_by_hand = linear and not self.hooked
        how = ", fused" if self.fused else ", by set_attn_processor" if set_by_hand else ""
        head = (
            f"{self.model}: {linear} of {len(self.layers)} self-attention layers linear"
            f" ({self.method or 'softmax'}{how}),"
            f" {self.parameters:,} learned parameters, {self.state_bytes:,} B of state a picture"
        )
        rows = [
            f"{'layer':<{width}}  kind     channels  heads  parameters    state B  fewer FLOPs from"
        ]
        rows += [
            f"{x.path:<{width}}  {'linear' if x.linear else 'softmax':<7}  {x.channels:>8}"
            f"  {x.heads:>5}  {x.parameters:>10,}  {x.state_bytes:>9,}"
            f"  {x.break_even_tokens:>5,} tokens"
            for x in self.layers
        ]
        foot = (
            "FLOPs are counted, not timed: linear attention is faster only from more tokens on,"
            " which `linfusion bench` measures on this machine."
        )
        return "\n".join([head, *rows, foot])


def summary(model_or_pipe: Any, method: str | None = None) -> Summary:
    """What is linear in a model, what it learned, what its state takes, and from when on it pays.

    Args:
        model_or_pipe: a pipeline or a model, linearized or not.
        method: of a model that is not linearized, what it would be with this method; None is the
            first that takes it.

    Raises:
        ValueError: it has no self-attention that could be linear, or is linear by another method.
    """
    models = models_of(model_or_pipe)
    layers: list[LayerSummary] = []
    fused, hooked = False, True
    methods: list[str] = []
    for name, model in models.items():
        record = record_of(model)
        if record is not None and method not in (None, record.method):
            raise ValueError(
                f"method: got {method!r}, but the model is linear by {record.method!r}"
            )
        mechanism = _mechanism(model, record, method)
        prefix = f"{name}." if len(models) > 1 else ""
        own, own_fused = _layers(model, record, mechanism, prefix)
        if record or any(layer.linear for layer in own):
            methods.append(mechanism.name)
            hooked = hooked and record is not None
        layers += own
        fused = fused or own_fused
    kinds = ", ".join(type(model).__name__ for model in models.values())
    return Summary(kinds, " and ".join(dict.fromkeys(methods)) or None, fused, layers, hooked)


def _mechanism(model: nn.Module, record: Record | None, method: str | None) -> Method:
    name = record.method if record is not None else method
    return _first_that_fits(model) if name is None else get_method(name)


def _layers(
    model: nn.Module, record: Record | None, mechanism: Method, prefix: str
) -> tuple[list[LayerSummary], bool]:
    """Those of one model, and whether any is fused."""
    taken = {path: one.layer for path, one in record.layers.items()} if record else {}
    paths = {id(attn): path for path, attn in taken.items()}
    there = (
        {} if paths and mechanism.name not in serving(model) else candidates(model, mechanism.name)
    )
    found = {paths.get(id(attn), path): attn for path, attn in there.items()}
    found |= {path: attn for path, attn in taken.items() if path not in found}
    settings = mechanism.settings(found, None, {}) | (record.settings if record else {})
    layers, fused = [], False
    for path, attn in found.items():
        fused = fused or hasattr(attn, mechanism.fused_name or "")
        layers.append(
            LayerSummary(
                path=f"{prefix}{path}",
                linear=isinstance(attn.processor, mechanism.processor),
                channels=channels_of(attn),
                heads=heads_of(attn),
                parameters=_learned(attn, path, record),
                state_bytes=mechanism.state_bytes(attn),
                break_even_tokens=mechanism.break_even_tokens(attn, settings[path]),
            )
        )
    return layers, fused


def _learned(attn: Any, path: str, record: Record | None) -> int:
    """Parameters of a layer that a student learned."""
    if record is None or path not in record.layers:
        return 0
    child = attn._modules.get(record.method)
    own = {} if not record.layers[path].base_weights else attention_parameters(attn)
    parameters = [*own.values(), *([] if child is None else child.parameters())]
    return sum(p.numel() for p in parameters)


def _first_that_fits(model: nn.Module) -> Method:
    """The first mechanism that takes layers of this model.

    Raises:
        ValueError: none does; the message has the reason of each.
    """
    refuse_linear_already(model)
    reasons = []
    for name in names():
        try:
            candidates(model, name)
        except ValueError as error:
            reasons.append(f"{name}: {str(error).removeprefix('model_or_pipe: ')}")
        else:
            return get_method(name)
    raise ValueError("model_or_pipe: no method fits. " + "; ".join(reasons))
