"""What the hybrid offers `linearize`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from linfusion.attention.hosts import layout
from linfusion.attention.hosts.layers import hosted_layers
from linfusion.attention.hosts.processor import HostedProcessor, hosted
from linfusion.attention.hybrid.form import NAME, Rest, Summarised, window_keys
from linfusion.attention.method import Method, head_dim_of, heads_of


def settings(
    paths: Iterable[str], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the `Rest` of every layer: the options, else what the weights say.

    Raises:
        ValueError: another learned part than that of the weights.
    """
    if stored is None:
        return {path: asdict(Rest(**options)) for path in paths}
    found = {}
    for path, setting in stored.items():
        for name in ("maps", "features"):
            if options.get(name, setting[name]) != setting[name]:
                raise ValueError(
                    f"{name}: got {options[name]!r}, but {path} of the weights has"
                    f" {setting[name]!r}; leave it out"
                )
        found[path] = asdict(Rest(**{**setting, **options}))
    return found


def break_even_tokens(attn: Any, setting: Mapping[str, Any]) -> int:
    """Tokens N of a picture at which window, cells and state have the scores of softmax.

    The cells are N/f² keys; the state, of F features, has 2·F·D products
    a token to be made and read, that is F keys.
    """
    rest = Rest(**setting)
    keys = window_keys(rest.window, 2)
    if rest.features is not None:
        keys += head_dim_of(attn) * (1 if rest.features == "elu1" else 2)
    return math.ceil(keys / (1 - rest.cell**-2) if rest.cell else keys)


def _processors(model: nn.Module) -> Callable[[Any], Any]:
    return lambda attn: hosted(attn.processor, NAME)


METHOD = Method(
    name=NAME,
    processor=HostedProcessor,
    options=Rest,
    layers=lambda model: hosted_layers(model, NAME),
    setting_key="rest",
    settings=settings,
    child=lambda attn, setting: Summarised(heads_of(attn), head_dim_of(attn), setting),
    is_fresh=lambda child: False,  # it works without training
    break_even_tokens=break_even_tokens,
    state_bytes=lambda attn: 0,
    student='"hybrid", weights="a folder of yours"',
    attach=layout.attach,
    detach=layout.detach,
    processor_of=_processors,
)
