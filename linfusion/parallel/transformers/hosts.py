"""How each kind of transformer makes tokens, and what tells its layers the grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linfusion.attention.grids import dit, joint, video
from linfusion.layers.record import record_of
from linfusion.parallel.ranks import Ranks, cut_rows
from linfusion.parallel.shard import Shard
from linfusion.parallel.transformers import sana


@dataclass(frozen=True)
class Host:
    """How the tokens of one kind of model are split.

    Attributes:
        method: that it has to be linearized with.
        shard: (model, inputs, ranks) -> the `Shard` of a call.
        enter: (model, inputs, shard) -> the inputs of the forward on this rank.
        entries: names of modules, and what becomes of their outputs: (output, shard) -> output.
        exit: name of the module whose output is joined.
        attach: (model) -> what takes off the further hooks that it puts on.
    """

    method: str
    shard: Callable[[Any, dict[str, Any], Ranks], Shard]
    enter: Callable[[Any, dict[str, Any], Shard], dict[str, Any]]
    entries: dict[str, Callable[[Any, Shard], Any]]
    exit: str
    attach: Callable[[Any], list[Callable[[], None]]] = lambda model: []


def _tokens(output: Tensor, shard: Shard) -> Tensor:
    return shard.take(output)


# ---- FLUX and Stable Diffusion 3


def _joint_shard(model: Any, inputs: dict[str, Any], ranks: Ranks) -> Shard:
    grids = (inputs.get("joint_attention_kwargs") or {}).get(joint.ARGUMENT)
    if grids is None:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} was called without its hooks, as"
            " model.forward(...); call model(...)"
        )
    if len(grids.sizes) != 1:
        raise ValueError(
            f"img_ids: got {len(grids.sizes)} pictures, {grids.sizes}; pictures to look at see each"
            " other as a whole, and a model that is shared takes one"
        )
    unit = math.lcm(*joint.factors_of(model))
    cuts = cut_rows(grids.sizes[0][0], ranks.world, unit)
    return Shard(ranks, grids.sizes[0], cuts)


def _with_grids(inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    height, width = shard.local
    grids = joint.Grids(((height, width),), (None,), shard)
    arguments = inputs["joint_attention_kwargs"]
    return {**inputs, "joint_attention_kwargs": {**arguments, joint.ARGUMENT: grids}}


def _enter_flux(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    given = _with_grids(inputs, shard)
    given["hidden_states"] = shard.take(inputs["hidden_states"])
    given["img_ids"] = shard.take(inputs["img_ids"], 0)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if given.get(name) is not None:
            given[name] = [shard.take(sample) for sample in given[name]]
    return given


def _enter_sd3(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    given = _with_grids(inputs, shard)
    if given.get("block_controlnet_hidden_states") is not None:
        samples = given["block_controlnet_hidden_states"]
        given["block_controlnet_hidden_states"] = [shard.take(sample) for sample in samples]
    return given


# ---- DiT and PixArt


def _picture_shard(model: Any, inputs: dict[str, Any], ranks: Ranks) -> Shard:
    height, width = inputs[dit._ARGUMENTS][dit.ARGUMENT]
    return Shard(ranks, (height, width), cut_rows(height, ranks.world))


def _enter_picture(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    if inputs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask: got one over the picture, whose rows are on several ranks; one over"
            " the text is encoder_attention_mask"
        )
    return {**inputs, dit._ARGUMENTS: {**inputs[dit._ARGUMENTS], dit.ARGUMENT: shard.local}}


# ---- videos


def _video_shard(model: Any, inputs: dict[str, Any], ranks: Ranks) -> Shard:
    latents = inputs["hidden_states"]
    frames, height, width = latents.shape[2:]
    if video.kind_of(model) == video.JOINT:  # [B, frames, C, h, w]
        frames = latents.shape[1]
    grid = video.grid_of(model.config, (frames, height, width))
    record = record_of(model)
    assert record is not None
    mixtures = list(record.settings.values())
    return Shard(ranks, grid, cut_rows(grid[1], ranks.world, review_rows(mixtures)))


def review_rows(mixtures: list[dict[str, Any]]) -> int:
    """Rows that are pooled to one review token in some layer, which stay on one rank."""
    return math.lcm(*(m["review_pool"][1] for m in mixtures if m["review_placement"] != "none"))


def _enter_video(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    given = dict(inputs)
    timestep = given.get("timestep")
    if isinstance(timestep, Tensor) and timestep.ndim == 2:  # one for every token
        given["timestep"] = shard.take(timestep)
    if given.get("controlnet_block_samples") is not None:
        given["controlnet_block_samples"] = [
            shard.take(sample) for sample in given["controlnet_block_samples"]
        ]
    return given


def _enter_cogvideox(model: Any, inputs: dict[str, Any], shard: Shard) -> dict[str, Any]:
    given = dict(inputs)
    given[video._ARGUMENTS] = {**inputs[video._ARGUMENTS], video.ARGUMENT: shard.local}
    if given.get("image_rotary_emb") is not None:
        given["image_rotary_emb"] = tuple(shard.take(x, 0) for x in given["image_rotary_emb"])
    return given


def _patches(output: Tensor, shard: Shard) -> Tensor:
    """[B, C, T, H, W]"""
    first, end = shard.own
    return output.narrow(3, first, end - first)


def _rotary(output: Any, shard: Shard) -> video.VideoRotary:
    grid: Any = shard.local
    return video.VideoRotary((shard.take(x) for x in output), grid)


def _after_text(output: Tensor, shard: Shard) -> Tensor:
    """[B, text + N, C]"""
    text, tokens = output.split([output.shape[1] - shard.tokens, shard.tokens], 1)
    return torch.cat([text, shard.take(tokens)], 1)


def own_shard(model: Any, ranks: Ranks, grid: tuple[int, ...]) -> Shard:
    """Of a `LinGenTransformer3DModel`, which asks for it: grid (T, H, W) in tokens."""
    rows = model.config.review_pool[1] if model.config.review_placement != "none" else 1
    return Shard(ranks, tuple(grid), cut_rows(grid[1], ranks.world, rows), rows)


HOSTS: dict[str, Host] = {
    "FluxTransformer2DModel": Host("clear", _joint_shard, _enter_flux, {}, "proj_out"),
    "SD3Transformer2DModel": Host(
        "clear", _joint_shard, _enter_sd3, {"pos_embed": _tokens}, "proj_out"
    ),
    "DiTTransformer2DModel": Host(
        "lit", _picture_shard, _enter_picture, {"pos_embed": _tokens}, "proj_out_2"
    ),
    "PixArtTransformer2DModel": Host(
        "lit", _picture_shard, _enter_picture, {"pos_embed": _tokens}, "proj_out"
    ),
    "WanTransformer3DModel": Host(
        "mate",
        _video_shard,
        _enter_video,
        {"patch_embedding": _patches, "rope": _rotary},
        "proj_out",
    ),
    "SanaVideoTransformer3DModel": Host(
        "mate",
        _video_shard,
        _enter_video,
        {"patch_embedding": _patches, "rope": _rotary},
        "proj_out",
        sana.attach,
    ),
    "CogVideoXTransformer3DModel": Host(
        "mate", _video_shard, _enter_cogvideox, {"patch_embed": _after_text}, "proj_out"
    ),
}
