"""Where the tokens of a model lie: read when the model is called, handed to its attention layers.

The grid travels with the arguments of the blocks, not beside them: a model may be called at any
number of sizes, and what gradient checkpointing computes again has the grid it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOSTS = ("FluxTransformer2DModel", "FluxControlNetModel", "SD3Transformer2DModel")

# On a model while it is attached, on its pos_embed during a forward, and the name of the argument
# that Stable Diffusion 3's blocks pass on.
_FACTORS = "_linfusion_down_factors"
_PENDING = "_linfusion_pending"
_THETA = "_linfusion_theta"
_NTK = "_linfusion_ntk"
ARGUMENT = "image_grids"


@dataclass(frozen=True)
class Grids:
    """Height and width in tokens of every picture, in the order of their tokens.

    One picture, except where FLUX Kontext appends those it is to look at.
    """

    sizes: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.sizes)


class RotaryTable(tuple):
    """FLUX's rotary table (cos, sin), each [T + N, D], that also knows the grids of its tokens."""

    grids: Grids

    def __new__(cls, pair: Any, grids: Grids) -> RotaryTable:
        table = super().__new__(cls, pair)
        table.grids = grids
        return table

    def to(self, *args: Any, **kwargs: Any) -> RotaryTable:
        """On another device; offloading calls it on what it hands to a block."""
        return RotaryTable([x.to(*args, **kwargs) for x in self], self.grids)


def attach(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Have `model` hand the grid of every call to its attention layers.

    Args:
        model: one of `HOSTS`.
        settings: of its layers, by path: `down_factor`, which has to divide every grid, and `ntk`,
            by which the base of the rotary frequencies is multiplied (Liu et al. 2024, CLEAR).

    Raises:
        ValueError: layers disagree on `ntk`, or the model has no rotary embedding to stretch.
    """
    ntk = {setting["ntk"] for setting in settings.values()}
    if len(ntk) != 1:
        raise ValueError(f"ntk: all layers share one rotary table, but the weights say {ntk}")
    rotary = is_rotary(model)
    if not rotary and ntk != {1.0}:
        raise ValueError(
            f"ntk: got {ntk.pop()}; {type(model).__name__} has no rotary embedding, so only 1"
        )
    setattr(model, _FACTORS, sorted({setting["down_factor"] for setting in settings.values()}))
    if rotary:
        pos_embed: Any = model.pos_embed
        model.register_forward_pre_hook(_read_ids, with_kwargs=True)
        pos_embed.register_forward_hook(_hand_on, always_call=True)
        if ntk != {1.0}:
            setattr(pos_embed, _NTK, ntk.pop())
            pos_embed.register_forward_pre_hook(_stretch)
        return
    model.register_forward_pre_hook(_read_latent, with_kwargs=True)
    for path, module in model.named_modules():
        if path not in settings and hasattr(module, "set_processor"):
            module.register_forward_pre_hook(_drop, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing is left."""
    hooks = (_read_ids, _stretch, _hand_on, _read_latent, _drop)
    for module in model.modules():
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(registry.items()):
                if hook in hooks:
                    del registry[key]
                    for kept in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                        getattr(module, kept).pop(key, None)
        for name in (_FACTORS, _NTK, _PENDING):
            if name in module.__dict__:
                delattr(module, name)


def is_rotary(model: nn.Module) -> bool:
    """Whether the model gives its attention a rotary table."""
    return hasattr(model.pos_embed, "theta")


def grids_of(ids: Tensor) -> Grids:
    """The pictures that the position ids of FLUX describe.

    Args:
        ids: [N, 3]: which picture, row and column of every token, in raster order.

    Raises:
        ValueError: the tokens are not those of whole pictures, row by row.
    """
    picture, y, x = ids.long().cpu().unbind(-1)
    # A new picture begins where its number changes or the rows begin again.
    new = (picture[1:] != picture[:-1]) | (y[1:] < y[:-1])
    starts = [0, *(new.nonzero().flatten() + 1).tolist(), len(ids)]
    sizes = []
    for start, end in zip(starts, starts[1:], strict=False):
        rows, columns = y[start:end] - y[start], x[start:end] - x[start]
        height = int(rows[-1]) + 1
        width = (end - start) // height
        raster = torch.arange(end - start)
        if (
            height * width != end - start
            or not torch.equal(rows, raster // width)
            or not torch.equal(columns, raster % width)
        ):
            raise ValueError(
                f"img_ids: tokens {start} to {end - 1} are no picture in raster order (the last is"
                f" in row {height - 1}, {end - start} tokens in all); expected ids as FluxPipeline"
                " makes them"
            )
        sizes.append((height, width))
    return Grids(tuple(sizes))


def _read_ids(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Before FLUX: the grids of its tokens, or an error before any work is done."""
    given = _named(model, args, kwargs)
    _refuse_unknown(given.get("joint_attention_kwargs"))
    ids, x = given["img_ids"], given["hidden_states"]
    grids = grids_of(ids[0] if ids.ndim == 3 else ids)
    if x.shape[1] != grids.tokens:
        raise ValueError(
            f"img_ids: they describe {grids.sizes}, {grids.tokens} tokens, but hidden_states has"
            f" {x.shape[1]}"
        )
    _check_factors(model, grids)
    setattr(model.pos_embed, _PENDING, grids)


def _stretch(pos_embed: Any, args: Any) -> None:
    """Before the rotary table: the base of its frequencies for this call."""
    setattr(pos_embed, _THETA, pos_embed.theta)
    pos_embed.theta = pos_embed.theta * getattr(pos_embed, _NTK)


def _hand_on(pos_embed: Any, args: Any, output: Any) -> Any:
    """After the rotary table, also after an error: its own base, and the grids go with it."""
    if hasattr(pos_embed, _THETA):
        pos_embed.theta = getattr(pos_embed, _THETA)
        delattr(pos_embed, _THETA)
    grids = getattr(pos_embed, _PENDING, None)
    if grids is None:
        return output
    delattr(pos_embed, _PENDING)
    return None if output is None else RotaryTable(output, grids)


def _read_latent(model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
    """Before Stable Diffusion 3: the grid of its patches, handed on among the arguments."""
    given = _named(model, args, kwargs)
    arguments = given.get("joint_attention_kwargs")
    _refuse_unknown(arguments)
    height, width = given["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    grids = Grids(((height // patch, width // patch),))
    _check_factors(model, grids)
    return (), {**given, "joint_attention_kwargs": {**(arguments or {}), ARGUMENT: grids}}


def _drop(attn: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Before a layer that was not taken: it would warn of an argument it does not know."""
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}


def _named(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _refuse_unknown(arguments: Mapping[str, Any] | None) -> None:
    unknown = sorted(set(arguments or {}) - {"scale"})
    if "ip_adapter_image_embeds" in unknown:
        raise ValueError(
            "joint_attention_kwargs: got ip_adapter_image_embeds; CLEAR has no processors for an"
            " IP-Adapter; call pipe.unload_ip_adapter() and linfusion.linearize again, or"
            " linfusion.restore"
        )
    if unknown:
        raise ValueError(
            f"joint_attention_kwargs: got {', '.join(unknown)}; CLEAR's attention takes none but"
            " scale, the scale of a LoRA"
        )


def _check_factors(model: nn.Module, grids: Grids) -> None:
    for factor in getattr(model, _FACTORS):
        for size in grids.sizes:
            if size[0] % factor or size[1] % factor:
                raise ValueError(
                    f"down_factor: {factor} does not divide the grid of {size[0]} by {size[1]}"
                    f" tokens; with these weights height and width have to be multiples of"
                    f" {factor} tokens ({16 * factor} pixels)"
                )
