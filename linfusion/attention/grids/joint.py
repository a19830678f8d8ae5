"""Where the tokens of a model lie: read when the model is called, handed to its attention layers.

The grid travels with the arguments of the blocks, not beside them: a model may be called at any
number of sizes, from several threads at once, and what gradient checkpointing computes again has
the grid it had. Hooks sit on the model itself and on its table of positions, which no adapter and
no quantisation replaces, and remember nothing of a call.

Without gradients the tokens also go through the transformers in tile order, in which kernels find a
window's keys together. Everything there but attention acts on single tokens, so this is a
permutation at the entry and its inverse at the exit. With gradients they stay in raster order:
whoever trains compares layers with those of a teacher.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from linfusion.attention.grids.local import SHARED
from linfusion.kernels import TileOrder

HOSTS = ("FluxTransformer2DModel", "FluxControlNetModel", "SD3Transformer2DModel")
CONTROLNET = "FluxControlNetModel"  # its blocks take no arguments but the rotary table

ARGUMENT = "image_grids"
_ARGUMENTS = "joint_attention_kwargs"  # the hosts' own name

# Of a call, from its beginning to its embedding of positions.
_TOLD: ContextVar[Grids | None] = ContextVar("linfusion_grids", default=None)


@dataclass(frozen=True)
class Grids:
    """Height and width in tokens of every picture, in the order of their tokens.

    One picture, except where FLUX Kontext appends those it is to look at.

    Attributes:
        sizes: (h, w) of each.
        orders: of the tokens of each, as `window_attention` takes it; None is raster order.
        shard: where the tokens are those of one of several ranks, `linfusion.parallel.Shard`.
    """

    sizes: tuple[tuple[int, int], ...]
    orders: tuple[TileOrder | None, ...]
    shard: Any = None

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.sizes)

    def permute(self, x: Tensor, dim: int = 1) -> Tensor:
        """`x` with the tokens along `dim` taken from raster order to that of these grids."""
        return self._reorder(x, dim, TileOrder.permute)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """`x` with the tokens along `dim` taken back to raster order."""
        return self._reorder(x, dim, TileOrder.undo)

    def _reorder(self, x: Tensor, dim: int, how: Callable[..., Tensor]) -> Tensor:
        parts = x.split([h * w for h, w in self.sizes], dim)
        moved = [
            part if order is None else how(order, part, dim)
            for order, part in zip(self.orders, parts, strict=True)
        ]
        return moved[0] if len(moved) == 1 else torch.cat(moved, dim)


class RotaryTable(tuple):
    """FLUX's rotary table (cos, sin), each [T + N, D], that also knows the grids of its tokens."""

    grids: Grids

    def __new__(cls, pair: Any, grids: Grids) -> RotaryTable:
        table = super().__new__(cls, pair)
        table.grids = grids
        return table

    def __reduce__(self) -> Any:
        return RotaryTable, (tuple(self), self.grids)

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
    rotary = hasattr(model.pos_embed, "theta")
    if not rotary and ntk != {1.0}:
        raise ValueError(
            f"ntk: got {ntk.pop()}; {type(model).__name__} has no rotary embedding, so only 1"
        )
    factors = tuple(sorted({setting["down_factor"] for setting in settings.values()}))
    model.register_forward_pre_hook(_Begin(factors), with_kwargs=True)
    pos_embed: Any = model.pos_embed
    if not rotary:
        pos_embed.register_forward_hook(_order_patches)
    elif ntk != {1.0}:
        pos_embed.register_forward_hook(_Stretch(pos_embed, ntk.pop()))
    if _is_controlnet(model):
        pos_embed.register_forward_hook(_hand_on)
    else:
        model.register_forward_hook(_finish, with_kwargs=True)
    for path, module in model.named_modules():
        if path not in settings and hasattr(module, "set_processor"):
            module.register_forward_pre_hook(_drop, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing is left."""
    for module in model.modules():
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(registry.items()):
                if isinstance(hook, (_Begin, _Stretch)) or hook in _HOOKS:
                    del registry[key]
                    for kept in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"):
                        getattr(module, kept).pop(key, None)


def _once_a_tensor(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Pipelines give every step the same ids: they are read back from the device once."""
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @functools.wraps(read)
    def once(ids: Tensor) -> Any:
        # Nobody counts what is done to a tensor of inference mode.
        if ids.is_inference() or torch.compiler.is_compiling():
            return read(ids)
        version, found = known.get(ids, (None, None))
        if version != ids._version:
            grids, exact = read(ids)
            found = grids, exact.to(ids.device)
            known[ids] = ids._version, found
        return found

    return once


@_once_a_tensor
def grids_of(ids: Tensor) -> tuple[Grids, Tensor]:
    """The pictures that the position ids of FLUX describe.

    Args:
        ids: [N, 3]: which picture, row and column of every token, in raster order. In bfloat16, as
            pipelines make them, rows and columns above 256 are rounded to even ones.

    Returns:
        The grids, and the ids before such rounding, float32; of the same tensor the same ones.

    Raises:
        ValueError: the tokens are not those of whole pictures, row by row.
    """
    picture, y, x = ids.float().cpu().unbind(-1)
    # A new picture begins where its number changes or the rows begin again.
    new = (picture[1:] != picture[:-1]) | (y[1:] < y[:-1])
    starts = [0, *(new.nonzero().flatten() + 1).tolist(), len(ids)]
    sizes, exact = [], []
    for start, end in pairwise(starts):
        tokens = end - start
        # A new row begins where the columns begin again, or, in a column, at every token.
        drop = (x[start + 1 : end] < x[start : end - 1]).nonzero().flatten()
        in_column = bool((x[start:end] == x[start]).all())
        width = 1 if in_column else int(drop[0]) + 1 if len(drop) else tokens
        raster = torch.arange(tokens)
        rows = torch.div(raster, width, rounding_mode="floor") + y[start]
        place = torch.stack([picture[start:end], rows, raster % width + x[start]], 1)
        if tokens % width or not torch.equal(
            place.to(ids.dtype).float(), ids[start:end].cpu().float()
        ):
            raise ValueError(
                f"img_ids: tokens {start} to {end - 1} are no picture in raster order with rows of"
                f" {width}; expected ids as FluxPipeline makes them"
            )
        sizes.append((tokens // width, width))
        exact.append(place)
    return Grids(tuple(sizes), (None,) * len(sizes)), torch.cat(exact)


class _Begin:
    """Before the model: the grids of its tokens go with the arguments, or an error before any work.

    Args:
        factors: `down_factor` of its layers, each of which has to divide every grid.
    """

    def __init__(self, factors: tuple[int, ...]) -> None:
        self.factors = factors

    def __call__(self, model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        given = _named(model, args, kwargs)
        arguments = given.get(_ARGUMENTS)
        _refuse_unknown(arguments)
        grids = self._read_ids(model, given) if "img_ids" in given else self._read(model, given)
        given[_ARGUMENTS] = {**(arguments or {}), ARGUMENT: grids}
        if _is_controlnet(model) or not torch.compiler.is_compiling():  # it traces no such set
            _TOLD.set(grids)
        for name in (
            "block_controlnet_hidden_states",
            "controlnet_block_samples",
            "controlnet_single_block_samples",
        ):
            if given.get(name) is not None:
                given[name] = [grids.permute(sample) for sample in given[name]]
        return (), given

    def _read_ids(self, model: Any, given: dict[str, Any]) -> Grids:
        """Of FLUX.

        Positions go on exact: rounded, tokens beyond the 256th row or column share them in pairs.
        """
        ids, x = given["img_ids"], given["hidden_states"]
        ids = ids[0] if ids.ndim == 3 else ids
        grids, exact = grids_of(ids)
        if x.shape[1] != grids.tokens:
            raise ValueError(
                f"img_ids: they describe {grids.sizes}, {grids.tokens} tokens, but hidden_states"
                f" has {x.shape[1]}"
            )
        grids = self._ordered(model, grids)
        given["img_ids"] = grids.permute(exact.to(ids.device), 0)
        given["hidden_states"] = grids.permute(x)
        return grids

    def _read(self, model: Any, given: dict[str, Any]) -> Grids:
        """Of Stable Diffusion 3: the grid of its patches."""
        height, width = given["hidden_states"].shape[-2:]
        patch = model.config.patch_size
        return self._ordered(model, Grids(((height // patch, width // patch),), (None,)))

    def _ordered(self, model: Any, grids: Grids) -> Grids:
        """With the order of this call's tokens."""
        for factor in self.factors:
            refuse_undivided(factor, grids.sizes)
        # What a ControlNet returns is for a model that has an order of its own; and by rows, a
        # rank's tiles are not those of the picture.
        if _is_controlnet(model) or hasattr(model, SHARED) or torch.is_grad_enabled():
            return grids
        return replace(grids, orders=tuple(TileOrder(size) for size in grids.sizes))


def refuse_undivided(factor: int, sizes: Iterable[Sequence[int]]) -> None:
    """Refuse grids that cells of `factor` by `factor` tokens do not fill.

    Raises:
        ValueError: one of them.
    """
    for height, width in sizes:
        if height % factor or width % factor:
            raise ValueError(
                f"down_factor: {factor} does not divide the grid of {height} by {width} tokens;"
                f" with these weights height and width have to be multiples of {factor} tokens"
                f" ({16 * factor} pixels)"
            )


def factors_of(model: nn.Module) -> tuple[int, ...]:
    """The `down_factor`s of the layers of a model that `attach` was called with."""
    hooks = model._forward_pre_hooks.values()
    return next(hook.factors for hook in hooks if isinstance(hook, _Begin))


class _Stretch:
    """After FLUX's rotary table: that of a longer base. The model's own base is not touched.

    Args:
        pos_embed: the table of the model.
        ntk: by which its base is multiplied.
    """

    def __init__(self, pos_embed: Any, ntk: float) -> None:
        self.table = type(pos_embed)(pos_embed.theta * ntk, pos_embed.axes_dim)

    def __call__(self, pos_embed: Any, args: Any, output: Any) -> Any:
        return self.table(*args)


def _hand_on(pos_embed: Any, args: Any, output: Any) -> RotaryTable:
    """After a ControlNet's rotary table, which takes the grids to every block."""
    grids = _TOLD.get()
    assert grids is not None  # the model's hook ran before
    return RotaryTable(output, grids)


def _order_patches(pos_embed: Any, args: Any, output: Tensor) -> Tensor:
    """After the patches of Stable Diffusion 3, which come as a picture: in order."""
    if torch.compiler.is_compiling():  # as the model's hook has it
        height, width = (n // pos_embed.patch_size for n in args[0].shape[-2:])
        return output if torch.is_grad_enabled() else TileOrder((height, width)).permute(output)
    grids = _TOLD.get()
    assert grids is not None  # the model's hook ran before
    return grids.permute(output)


def _finish(model: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """After the model: tokens as they came."""
    grids: Grids = kwargs[_ARGUMENTS][ARGUMENT]
    if grids.orders == (None,) * len(grids.orders):
        return output
    sample = output[0]
    if "img_ids" in kwargs:
        sample = grids.undo(sample)
    else:
        (height, width), patch = grids.sizes[0], model.config.patch_size
        tokens = sample.unflatten(3, (width, patch)).unflatten(2, (height, patch))
        tokens = grids.undo(tokens.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))
        tokens = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 4, 2, 5)
        sample = tokens.flatten(4, 5).flatten(2, 3)
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def _is_controlnet(model: nn.Module) -> bool:
    return any(kind.__name__ == CONTROLNET for kind in type(model).__mro__)


def _drop(attn: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Before a layer that was not taken: it would warn of an argument it does not know."""
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}


_HOOKS = (_finish, _hand_on, _order_patches, _drop)


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
