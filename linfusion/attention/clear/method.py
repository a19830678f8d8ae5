"""What CLEAR offers `linearize`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from linfusion.attention import cost
from linfusion.attention.clear.processor import CLEARProcessor
from linfusion.attention.clear.window import NAME, LocalWindow, Window
from linfusion.attention.grids import joint as hosts
from linfusion.attention.hosts import layout
from linfusion.attention.hosts.layers import hosted_layers
from linfusion.attention.hosts.processor import HostedProcessor, hosted
from linfusion.attention.method import Method, StudentFile, head_dim_of, heads_of

# Processors that compute softmax attention over text and image and nothing besides.
_PLAIN = {
    "FluxAttnProcessor",
    "FusedJointAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "XFormersJointAttnProcessor",
}


def _is_joint(model: nn.Module) -> bool:
    """Whether it is FLUX or Stable Diffusion 3, which `CLEARProcessor` is for."""
    return bool({kind.__name__ for kind in type(model).__mro__} & set(hosts.HOSTS))


def pixel_attention(model: nn.Module) -> dict[str, Any]:
    """The layers that attend from pixels to pixels, by path.

    Raises:
        ValueError: it is no host that is known, or a layer runs a processor that would lose
            something.
    """
    if not _is_joint(model):
        return hosted_layers(model, NAME)
    found = {
        path: module
        for path, module in model.named_modules()
        if re.search(r"transformer_blocks\.\d+\.attn2?$", path)
    }
    for path, attn in found.items():
        processor = attn.processor
        if type(processor).__name__ not in _PLAIN and not isinstance(processor, CLEARProcessor):
            raise ValueError(
                f"model_or_pipe: {path} runs {type(processor).__name__}, which CLEAR would replace;"
                " call pipe.unload_ip_adapter() or model.set_attn_processor with diffusers' own"
                " processor first"
            )
    return found


def settings(
    paths: Iterable[str], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the `Window` of every layer: the options, else what the weights say.

    Raises:
        ValueError: another `down_factor` than that of the weights, or no radius.
    """
    if stored is None:
        return {path: asdict(Window(**options)) for path in paths}
    found = {}
    for path, window in stored.items():
        factor = options.get("down_factor", window["down_factor"])
        if factor != window["down_factor"]:
            raise ValueError(
                f"down_factor: got {factor}, but {path} of the weights pools by"
                f" {window['down_factor']}; leave it out"
            )
        if "radius" not in {**window, **options}:
            raise ValueError(
                "radius: the weights do not say it and neither does the name of their file; give"
                " the one they were trained with, as radius=8"
            )
        found[path] = asdict(Window(**{**window, **options}))
    return found


def read_file(name: str, tensors: Mapping[str, Tensor]) -> StudentFile:
    """The authors' files: part of the state dict of a FLUX transformer, in diffusers' names.

    Args:
        name: of the file; `clear_local_8_down_4` says the radius, which the tensors do not.
        tensors: `...attn.to_q.weight` and so on, and `...attn.processor.spatial_weight` of shape
            (1, 1, 1, f, 1, f, 1) with pooling.
    """
    radius = re.search(r"local_(\d+)", name)
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+\.attn2?)\.((?:to_[qkv]|to_out\.0)\.\w+|processor\.\w+)", key)
        if found is None or (
            found[2].startswith("processor.")
            and (found[2] != "processor.spatial_weight" or not _is_square(tensor))
        ):
            unknown.append(key)
            continue
        layer = layers.setdefault(found[1], {})
        if found[2] == "processor.spatial_weight":
            layer[f"{NAME}.pool.weight"] = tensor.reshape(1, -1)
        else:
            layer[found[2]] = tensor
    windows = {}
    for path, layer in layers.items():
        pool = layer.get(f"{NAME}.pool.weight")
        factor = 1 if pool is None else math.isqrt(pool.numel())
        windows[path] = {"down_factor": factor} | ({"radius": int(radius[1])} if radius else {})
    return StudentFile(layers, windows, unknown)


def _is_square(weight: Tensor) -> bool:
    return (
        weight.ndim == 7
        and weight.shape[3] == weight.shape[5]
        and weight.numel() == (weight.shape[3] ** 2)
    )


def _is_fresh(child: nn.Module) -> bool:
    return all(p.is_meta or bool((p == p.flatten()[0]).all()) for p in child.parameters())


def break_even_tokens(attn: Any, setting: Mapping[str, Any]) -> int:
    """Image tokens N at which window and pooled tokens together are N: disc + N/f² = N."""
    window = Window(**setting)
    last = math.ceil(window.radius) - 1
    rows = (window.radius**2 - dy * dy for dy in range(-last, last + 1))
    disc = sum(2 * math.ceil(math.sqrt(left)) - 1 for left in rows)
    if window.down_factor == 1:
        return disc
    return math.ceil(disc / (1 - window.down_factor**-2))


def _passes(attn: Any, setting: Mapping[str, Any], tokens: int) -> list[cost.Pass]:
    """Of a square picture, by the keys in the tiles that a window touches, and pooled ones."""
    window, side = Window(**setting), 8 * math.ceil(math.sqrt(tokens) / 8)
    keys = cost.keys_visited((side, side), window.radius)
    keys += tokens / window.down_factor**2 if window.down_factor > 1 else 0
    return cost.softmax_of_any(tokens, heads_of(attn), head_dim_of(attn), keys)


def _processors(model: nn.Module) -> Callable[[Any], Any]:
    if not _is_joint(model):
        return lambda attn: hosted(attn.processor, NAME)
    one = CLEARProcessor()
    return lambda attn: one


def _attach(model: nn.Module, chosen: Mapping[str, Mapping[str, Any]]) -> None:
    if _is_joint(model):
        hosts.attach(model, chosen)
        return
    ntk = {setting["ntk"] for setting in chosen.values()}
    if ntk != {1.0}:
        raise ValueError(
            f"ntk: got {sorted(ntk)}; it stretches the rotary table of FLUX alone, so for"
            f" {type(model).__name__} only 1"
        )
    layout.attach(model, chosen)


def _detach(model: nn.Module) -> None:
    hosts.detach(model)
    layout.detach(model)


METHOD = Method(
    name=NAME,
    processor=(CLEARProcessor, HostedProcessor),
    options=Window,
    layers=pixel_attention,
    setting_key="window",
    settings=settings,
    child=lambda attn, setting: LocalWindow(setting),
    is_fresh=_is_fresh,
    break_even_tokens=break_even_tokens,
    passes=_passes,
    state_bytes=lambda attn: 0,
    student='"clear", weights="Huage001/CLEAR/clear_local_8.safetensors"',
    projections=True,
    read_file=read_file,
    attach=_attach,
    detach=_detach,
    processor_of=_processors,
)
