"""What is linear in a model, and from when on it pays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from linfusion.attention import get_method, names
from linfusion.attention.method import Method, channels_of, heads_of
from linfusion.layers.find import (
    candidates,
    models_of,
    refuse_linear_already,
    serving,
    tokens_at,
)
from linfusion.layers.paying import card_of, times, tokens_from
from linfusion.layers.projections import attention_parameters
from linfusion.layers.record import Record, record_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from linfusion.attention.cost import Card


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer. Sizes are per picture.

    Attributes:
        parameters: of the learned part, with the projections where a student replaced them.
        break_even_tokens: from which on the layer takes less time than softmax, as computed for
            the card of the summary, or without one multiplies less. Time pays later than that: how
            much, `linfusion bench` measures.
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
        card: "H100" or "RTX 4090", whichever is like the GPU that the model is on, if break-evens
            are of time computed for it; None, if they are of multiplications.
        milliseconds: computed for the card, at the size the model was trained for and one picture,
            of all these layers as softmax and with those linear that then pay, without their
            projections. None without a card, or where that size is not known.
    """

    model: str
    method: str | None
    fused: bool
    layers: list[LayerSummary]
    hooked: bool = True
    card: str | None = None
    milliseconds: tuple[float, float] | None = None

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
            f"{'layer':<{width}}  kind     channels  heads  parameters    state B"
            f"  {'fewer FLOPs' if self.card is None else 'less time'} from"
        ]
        rows += [
            f"{x.path:<{width}}  {'linear' if x.linear else 'softmax':<7}  {x.channels:>8}"
            f"  {x.heads:>5}  {x.parameters:>10,}  {x.state_bytes:>9,}"
            f"  {x.break_even_tokens:>5,} tokens"
            for x in self.layers
        ]
        if self.card is not None:
            return "\n".join([head, *rows, *self._times()])
        foot = (
            "FLOPs are counted, not timed: linear attention is faster only from more tokens on,"
            " which `linfusion bench` measures on this machine."
        )
        return "\n".join([head, *rows, foot])

    def _times(self) -> list[str]:
        lines = [
            f"Time is computed from bytes and products for an {self.card}, without launches and the"
            " projections; `linfusion bench` measures it on this machine."
        ]
        if self.milliseconds is not None:
            softmax, linear = self.milliseconds
            lines.append(
                f"At the size of its training these layers take {softmax:.1f} ms a picture as"
                f" softmax, {linear:.1f} ms with those linear that pay there."
            )
        return lines


def summary(model_or_pipe: Any, method: str | None = None) -> Summary:
    """What is linear in a model, what it learned, what its state takes, and from when on it pays.

    That is by the time computed for a card like the GPU the model is on, as
    `linfusion.attention.cost` has it, and by multiplications where it is on none or the method
    knows no time.

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
    cards: set[str | None] = set()
    spent: list[tuple[float, float] | None] = []
    for name, model in models.items():
        record = record_of(model)
        if record is not None and method not in (None, record.method):
            raise ValueError(
                f"method: got {method!r}, but the model is linear by {record.method!r}"
            )
        mechanism = _mechanism(model, record, method)
        prefix = f"{name}." if len(models) > 1 else ""
        card = card_of(model) if mechanism.passes is not None else None
        cards.add(None if card is None else card.name)
        own, own_fused, times = _layers(model, record, mechanism, prefix, card)
        spent.append(times)
        if record or any(layer.linear for layer in own):
            methods.append(mechanism.name)
            hooked = hooked and record is not None
        layers += own
        fused = fused or own_fused
    kinds = ", ".join(type(model).__name__ for model in models.values())
    method = " and ".join(dict.fromkeys(methods)) or None
    one = cards.pop() if len(cards) == 1 else None
    known = [times for times in spent if times is not None]
    both = (sum(t[0] for t in known), sum(t[1] for t in known))
    times = both if one is not None and len(known) == len(spent) else None
    return Summary(kinds, method, fused, layers, hooked, one, times)


def _mechanism(model: nn.Module, record: Record | None, method: str | None) -> Method:
    name = record.method if record is not None else method
    return _first_that_fits(model) if name is None else get_method(name)


def _layers(
    model: nn.Module, record: Record | None, mechanism: Method, prefix: str, card: Card | None
) -> tuple[list[LayerSummary], bool, tuple[float, float] | None]:
    """Those of one model, whether any is fused, and `Summary.milliseconds`."""
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
                break_even_tokens=tokens_from(mechanism, attn, settings[path], card),
            )
        )
    return layers, fused, card and _milliseconds(model, found, mechanism, settings, card)


def _milliseconds(
    model: nn.Module,
    found: Mapping[str, Any],
    mechanism: Method,
    settings: Mapping[str, Any],
    card: Card,
) -> tuple[float, float] | None:
    """As `Summary` has them."""
    size = getattr(getattr(model, "config", None), "sample_size", None)
    if type(size) is not int:
        return None
    softmax = linear = 0.0
    try:
        for path, attn in found.items():
            tokens = tokens_at(model, path, (size, size))
            before, after = times(mechanism, attn, settings[path], card, tokens)
            softmax, linear = softmax + before, linear + min(before, after)
    except ValueError:  # of a model whose tokens are not known, or whose size has more axes
        return None
    return 1e3 * softmax, 1e3 * linear


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
