"""UNets, ControlNets and VAEs of pictures: rows shared by the engine that runs stock modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import linfusion.bands.rules  # noqa: F401  fills the table of rules
from linfusion.bands.bounded import fused_on_whole_tokens, parts_uncompiled
from linfusion.bands.rows import Engine, Rows
from linfusion.bands.store import Store
from linfusion.parallel.hooks import put_around
from linfusion.parallel.mesh import Mesh
from linfusion.parallel.ranks import Ranks, cut_rows
from linfusion.parallel.shared_rows import Share

_PICTURES = ("sample", "controlnet_cond")
_ONE_BAND = 1 << 62  # without a budget a rank's rows are one band


def is_picture_model(model: nn.Module) -> bool:
    """Whether it is a UNet of pictures or a ControlNet of one."""
    return hasattr(model, "attn_processors") and hasattr(model, "down_blocks")


def levels(model: Any) -> int:
    """How many times a UNet halves its rows."""
    return sum(
        any(getattr(block, name, None) for name in ("downsamplers", "downsample"))
        for block in model.down_blocks
    )


def share_model(model: Any, mesh: Mesh, around: Callable[..., Any]) -> Callable[[], None]:
    """Have the ranks of `mesh` share the rows of a UNet or ControlNet.

    Args:
        model: whose forward is replaced.
        mesh: its ranks.
        around: (run, inputs) -> output, what is done around every call.
    """
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    unit = 2 ** levels(model)

    def run(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        sample = inputs["sample"]
        if torch.is_grad_enabled():
            raise ValueError(
                "parallelize: gradients are enabled; a UNet's rows are shared for inference, use"
                " torch.no_grad()"
            )
        if sample.ndim != 4:
            raise ValueError(
                f"sample: got {tuple(sample.shape)}; the rows that are shared are those of"
                " [B, C, H, W]"
            )
        if any(getattr(part, "b1", None) is not None for part in model.modules()):
            raise ValueError(
                f"{type(model).__name__}: FreeU is on, which needs whole feature maps; call"
                " disable_freeu()"
            )
        share = Share(mesh.sp, cut_rows(sample.shape[2], mesh.sp.world, unit))
        with parts_uncompiled(model), fused_on_whole_tokens(model):
            return on_rows(forward, inputs, _PICTURES, share)

    return put_around(model, functools.partial(around, run), names)


def share_coder(module: nn.Module, ranks: Ranks, unit: int) -> Callable[[], None]:
    """Have ranks share the rows of the encoder or decoder of a VAE.

    Args:
        module: `vae.encoder` or `vae.decoder`.
        ranks: that share.
        unit: rows of its input that stay together.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]

    def run(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        picture = inputs[names[0]]
        # In bands of a budget of its own, every rank decodes what it is asked for.
        if isinstance(picture, Rows) or torch.is_grad_enabled() or picture.shape[2] < ranks.world:
            return forward(**inputs)
        share = Share(ranks, cut_rows(picture.shape[2], ranks.world, _unit(picture, unit, ranks)))
        return on_rows(forward, inputs, names[:1], share)

    return put_around(module, run, names)


def _unit(picture: Tensor, unit: int, ranks: Ranks) -> int:
    """`unit`, or 1 where there are too few rows for it; the result is the same."""
    return unit if -(-picture.shape[2] // unit) >= ranks.world else 1


def on_rows(
    forward: Callable[..., Any], inputs: dict[str, Any], pictures: Any, share: Share
) -> Any:
    """A forward of which each rank computes its rows; the result is whole on all of them."""
    first = inputs[pictures[0]]
    if isinstance(first, Rows):  # within `bounded`: its engine, and its budget for this rank's rows
        first.node.engine.share = share
        return forward(**inputs)
    engine = Engine(Store(), band_bytes=_ONE_BAND, share=share)
    wrapped = {name: engine.wrap(inputs[name]) for name in pictures if name in inputs}
    out = forward(**{**inputs, **wrapped})
    return tree_map(functools.partial(_whole, engine), out)


def _whole(engine: Engine, value: Any) -> Any:
    return engine.whole(value) if isinstance(value, Rows) else value
