"""DiT and LiT in their authors' own files: `.pt` checkpoints as models of diffusers."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linfusion.layers.find import shorten

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of softmax, by width: S, B, L, XL
TIMESTEPS = "_linfusion_timesteps"  # key of a model's config

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "attn.q": "attn1.to_q",
    "attn.dwc": "attn1.lit.dwc",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDER = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of an official checkpoint, the averaged ones where it has both.

    Args:
        file: `.pt`, read without running anything that is in it.

    Raises:
        ValueError: there is no such file, or it holds something else than tensors by name.
    """
    path = Path(file)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"file: cannot read {path} as tensors alone: {reason}") from error
    for key in ("ema", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(
            f"file: {path} holds {type(found).__name__}, expected tensors by name, or those under"
            " 'ema' or 'model'"
        )
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def load_dit(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    num_attention_heads: int | None = None,
    heads: int | None = None,
    official_timesteps: bool = True,
) -> DiTTransformer2DModel:
    """A model of diffusers from an official DiT or LiT checkpoint; its sizes follow from the file.

    Args:
        source: a `.pt` file, or its tensors by name.
        num_attention_heads: of softmax; needed where the width is none that was published.
        heads: of LiT's linear attention; needed where its filter is one for every channel, as
            nothing in the file says it then.
        official_timesteps: embed time as the authors do. diffusers' own embedding has other
            frequencies (exponents over 127 instead of 128): at t = 999 the two have a cosine of
            0.49. False leaves diffusers'.

    Returns:
        In eval mode; linearized ("lit") if it is a LiT checkpoint.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen, or only partly LiT's; the positions
            are not those of DiT; heads that are not known or do not fit.
    """
    from diffusers import DiTTransformer2DModel

    from linfusion.linearize import linearize

    tensors = dict(source) if isinstance(source, Mapping) else read_checkpoint(source)
    config = _config(tensors, num_attention_heads)
    model = DiTTransformer2DModel(**config).eval()
    is_lit = any(".attn.kv." in name or ".attn.dwc." in name for name in tensors)
    if is_lit:
        linearize(model, "lit", **_form(tensors, config, heads))
    elif heads is not None:
        raise ValueError(f"heads: got {heads}, but the tensors are those of DiT, with softmax")
    positions = tensors.pop("pos_embed", None)
    if positions is not None:
        _check_positions(model, positions)
    state, unknown = to_diffusers(tensors, config["num_layers"])
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected = {name: shape for name, shape in expected.items() if name != "pos_embed.pos_embed"}
    missing = [name for name in expected if name not in state]
    unexpected = unknown + [name for name in state if name not in expected]
    misshapen = [
        f"{name} {tuple(t.shape)}, expected {expected[name]}"
        for name, t in state.items()
        if name in expected and tuple(t.shape) != expected[name]
    ]
    problems = [
        f"{kind}: {shorten(names)}."
        for kind, names in (
            ("Missing", missing),
            ("Unexpected", unexpected),
            ("Misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"source: not the tensors of a {'LiT' if is_lit else 'DiT'} with"
            f" {config['num_layers']} blocks. " + " ".join(problems)
        )
    model.load_state_dict(state, strict=False)
    if official_timesteps:
        use_official_timesteps(model)
    return model


def use_official_timesteps(model: Any) -> None:
    """Embed time as DiT's authors do: frequencies 10⁴^(-i/128) instead of diffusers' 10⁴^(-i/127).

    The config remembers it; `linfusion.pipelines.DiTPipeline` does it again after loading.

    Args:
        model: a `DiTTransformer2DModel`.
    """
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    model.register_to_config(**{TIMESTEPS: "official"})


def to_diffusers(tensors: Mapping[str, Tensor], blocks: int) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under diffusers' names, which has a copy of the embedders in every block.

    Args:
        tensors: of DiT, or of LiT, which has `q` and `kv` instead of `qkv`, and `dwc`.
        blocks: how many the model has.

    Returns:
        The tensors, and the names that belong to neither.
    """
    state, unknown = {}, []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in _TOP:
            state[f"{_TOP[module]}.{leaf}"] = tensor
        elif module in _EMBEDDER:
            for i in range(blocks):
                state[f"transformer_blocks.{i}.norm1.emb.{_EMBEDDER[module]}.{leaf}"] = tensor
        elif block is not None and block[2] in _BLOCK:
            state[f"transformer_blocks.{block[1]}.{_BLOCK[block[2]]}.{leaf}"] = tensor
        elif block is not None and block[2] in ("attn.qkv", "attn.kv"):
            letters = block[2].removeprefix("attn.")
            for letter, part in zip(letters, tensor.chunk(len(letters)), strict=True):
                state[f"transformer_blocks.{block[1]}.attn1.to_{letter}.{leaf}"] = part
        else:
            unknown.append(name)
    return state, unknown


def _config(tensors: Mapping[str, Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel` that the shapes say."""
    needed = (
        "x_embedder.proj.weight",
        "final_layer.linear.weight",
        "y_embedder.embedding_table.weight",
    )
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"source: not an official DiT checkpoint. Missing: {shorten(missing)}")
    width, channels, patch, _ = tensors[needed[0]].shape
    softmax_heads = HEADS.get(width) if num_attention_heads is None else num_attention_heads
    if softmax_heads is None or softmax_heads < 1 or width % softmax_heads:
        raise ValueError(
            f"num_attention_heads: got {num_attention_heads}; the checkpoint has {width} channels,"
            " which it has to divide"
        )
    numbers = {int(n[1]) for n in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if n}
    side = 32 // patch if "pos_embed" not in tensors else math.isqrt(tensors["pos_embed"].shape[1])
    return {
        "num_attention_heads": softmax_heads,
        "attention_head_dim": width // softmax_heads,
        "in_channels": channels,
        "out_channels": tensors[needed[1]].shape[0] // patch**2,
        "num_layers": len(numbers),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": tensors[needed[2]].shape[0] - 1,
        "norm_eps": 1e-6,
    }


def _form(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], heads: int | None
) -> dict[str, Any]:
    """Options of `linearize` that the filters say."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    filters = tensors.get("blocks.0.attn.dwc.weight")
    if filters is None:
        if heads is None:
            raise ValueError("heads: got None; without filters nothing says how many there are")
        return {"heads": heads, "conv": None}
    found = width // len(filters)
    if found > 1 and heads not in (None, found):
        raise ValueError(f"heads: got {heads}, but filters of {len(filters)} channels say {found}")
    if found == 1 and heads is None:
        raise ValueError(
            f"heads: got None; with a filter for each of {width} channels nothing says how many"
        )
    conv = "value_shared" if found > 1 else "value_full"
    return {
        "heads": found if heads is None else heads,
        "kernel_size": filters.shape[-1],
        "conv": conv,
    }


def _check_positions(model: nn.Module, positions: Tensor) -> None:
    ours: Any = model.get_buffer("pos_embed.pos_embed")
    if ours.shape != positions.shape or not torch.allclose(ours, positions.float(), atol=1e-4):
        raise ValueError(
            f"source: pos_embed {tuple(positions.shape)} is not the sine table of a square of"
            f" {ours.shape[1]} tokens, which is all that diffusers' DiT has"
        )
